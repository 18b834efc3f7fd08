"""What people need beside the core: each file is one capability, with its tests beside it."""
