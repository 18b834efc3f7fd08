"""Mistakes that a port of this model has made, or could make, as edits of ernie_vl.py. The tests plant each of them, and the
numbers in reference.safetensors must notice it."""
import re
import sys
import types

from ernie_vl import ErnieVL

FILE = "<ernie_vl>"                          # the name under which an edited copy is compiled
TOKEN = re.compile(r"\w+|[^\w\s]")

MISTAKES = {  # what stands in ernie_vl.py, and what would stand there
    "markers go to text experts": ("| torch.isin(ids, torch.tensor(markers))", ""),
    "everything goes to text experts": ("y[mask] = experts(x[mask])", "y[mask] = self.text_moe(x[mask])"),
    "router bias also weighs": ("p.gather(", "(p + self.e_score_correction_bias).gather("),
    "router bias ignored": ("(p + self.e_score_correction_bias).topk", "p.topk"),
    "router bias on logits": ("chosen = (p + ", "chosen = (F.linear(x.float(), self.weight) + "),
    "expert weights not renormalised": ("(weights / weights.sum(-1, keepdim=True).clamp(min=1e-12))", "weights"),
    "sigmoid for softmax": ("self.weight.float()).softmax(-1)", "self.weight.float()).sigmoid()"),
    "shared experts forgotten": ("else y + self.shared_experts(x)", "else y"),
    "h and w swapped": ("[1, 2] * pairs_h", "[2, 1] * pairs_h"),
    "sections side by side": ("[1, 2] * pairs_h", "[1] * pairs_h + [2] * pairs_h"),
    "time takes the fast pairs": ("[1, 2] * pairs_h + [0] * pairs_t", "[0] * pairs_t + [1, 2] * pairs_h"),
    "rope theta 10,000": ("cfg.rope_theta, positions.device", "10_000.0, positions.device"),
    "halves for pairs in the decoder": ("class KVCache:", "rotate_pairs = rotate_halves\nclass KVCache:"),
    "pairs for halves in the ViT": ("class VisionMLP", "rotate_halves = lambda *x: rotate_pairs(*x)\nclass VisionMLP"),
    "one position an image token": ("torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).T",
                                    "torch.arange(t * h * w)"),
    "text continues after the count": ("+= max(t, h, w) - len(run)", "+= 0"),
    "text continues after the rows": ("+= max(t, h, w) - len(run)", "+= h - len(run)"),
    "text continues without the time": ("+= max(t, h, w) - len(run)", "+= max(h, w) - len(run)"),
    "key heads tiled": ("x[:, None].expand(-1, len(q) // len(x), -1, -1)",
                        "x.tile(len(q) // len(x), 1, 1).unflatten(0, (len(x), -1))"),
    "no causal mask": ("is_causal=T == S", "is_causal=False"),
    "ViT row and column swapped": ("return blocks.transpose(1, 2)", "return blocks.flip(-1).transpose(1, 2)"),
    "ViT positions in raster order": ("return blocks.transpose(1, 2).reshape(h * w, 2)", "return raster"),
    "ViT frequencies over d": ("VISION_ROPE_THETA = 10_000.0", "VISION_ROPE_THETA = 100.0"),
    "frames see each other": ("[h * w for t, h, w in grids for _ in range(t)]", "[t * h * w for t, h, w in grids]"),
    "images see each other": ("[h * w for t, h, w in grids for _ in range(t)]", "[len(patches)]"),
    "GELU for QuickGELU": ("a * torch.sigmoid(1.702 * a)", "F.gelu(a)"),
    "last norm of the ViT forgotten": ("return self.ln(x)", "return x"),
    "tanh GELU in the resampler": ("nn.GELU()", 'nn.GELU("tanh")'),
    "an image paired with zeros": ("(frames, frames) if", "(frames, 0 * frames) if"),
    "odd and even frames swapped": ("(frames[0::2], frames[1::2])", "(frames[1::2], frames[0::2])"),
    "after_norm forgotten": ("self.after_norm(", "("),
}


def plant(source: str, old: str, new: str) -> str:
    """The source with `old` replaced by `new`, whatever the spacing and line breaks of `old` are there. Raises
    ValueError unless it stands in exactly one place."""
    tokens = [rf"\b{token}\b" if re.match(r"\w", token) else re.escape(token) for token in TOKEN.findall(old)]
    pattern = r"\s*".join(tokens)
    places = re.findall(pattern, source)
    if len(places) != 1:
        raise ValueError(f"{old!r} stands in {len(places)} places of the source, and must stand in one")
    return re.sub(pattern, lambda match: new, source)


def execute(source: str) -> types.ModuleType:
    sys.modules["edited"] = module = types.ModuleType("edited")
    exec(compile(source, FILE, "exec"), module.__dict__)
    return module


def like(model: ErnieVL, source: str) -> ErnieVL:
    """The same weights in an edited copy of ernie_vl.py."""
    edited = execute(source).ErnieVL(model.cfg)
    edited.load_state_dict(model.state_dict(), assign=True)
    edited.tie_weights()
    return edited.eval()
