"""`--save-logits FILE --stages`: beside the logits every stage before them, for compare.py or to debug a port."""
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parent))

from ernie_vl import ErnieVL, Inputs                                                             # noqa: E402
from run import log, write_atomically                                                            # noqa: E402
from stage_names import our_stages                                                               # noqa: E402


def save(model: ErnieVL, inputs: Inputs, path: Path) -> None:
    """Writes ids, patches, grids and all stages; the dtype that they were computed in stands in the metadata."""
    grids = torch.tensor(inputs.grids, dtype=torch.long).view(-1, 3)
    tensors = {"ids": inputs.ids, "patches": inputs.patches, "grids": grids} | our_stages(model, inputs)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    dtype = str(model.norm.weight.dtype).removeprefix("torch.")
    write_atomically(path, lambda path: save_file(tensors, path, metadata={"dtype": dtype}))
    log(f"wrote {path}: {len(tensors)} tensors, computed in {dtype}")
