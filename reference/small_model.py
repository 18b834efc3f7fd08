"""A small random model in the released layout, and the prompts whose true values stand in reference.safetensors.

The model is not stored: `write_checkpoint` makes it anew from a seed, under the names of the released files. Its
numbers are chosen so that mistakes show: correction biases are not zero, norm weights not one, images not square, no
two lengths are equal, and the video has more pairs of frames than rows or columns of tokens. A test that needs other
sizes makes its own `Shapes`; the released models, and other spellings of a checkpoint, are in fixtures.py.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ernie_vl import Config, ErnieVL, Inputs, KVCache, generate, greedy, is_placeholder, token_grid
from stage_names import names_of

HERE = Path(__file__).resolve().parent

IMAGE, VIDEO, IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END = 10, 11, 12, 13, 14, 15      # token ids
SEED = 45


@dataclass(frozen=True)
class Shapes:
    """The sizes of a checkpoint. The defaults are the small ones that both models below share."""

    tie: bool                               # the head is the embedding matrix
    layers: tuple[str, ...]                 # "dense" or "sparse", one for every layer
    shared: int                             # shared experts: the width of one MLP, in widths of a text expert
    experts: int                            # of one modality
    k: int                                  # experts chosen for a token
    hidden: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    dense: int = 176                        # width inside the dense layers
    widths: tuple[int, int] = (24, 14)      # width inside a (text, vision) expert
    vocab: int = 72
    vit_depth: int = 2
    vit_width: int = 48
    vit_heads: int = 3
    vit_mlp: int = 200


# The two kinds of the family: tied with shared experts (28B); untied, without them, with more dense layers (424B).
MODELS = {
    "28b": Shapes(tie=True, layers=("dense", "sparse", "sparse"), shared=2, experts=12, k=3),
    "424b": Shapes(tie=False, layers=("dense", "dense", "sparse"), shared=0, experts=8, k=4),
}


# ------------------------------------------------------------------------------------------------ config.json
def config(shapes: Shapes) -> dict:
    """The nested layout, as transformers writes it."""
    return {
        "model_type": "ernie4_5_vl_moe", "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "image_token_id": IMAGE, "image_start_token_id": IMAGE_START, "image_end_token_id": IMAGE_END,
        "video_token_id": VIDEO, "video_start_token_id": VIDEO_START, "video_end_token_id": VIDEO_END,
        "tie_word_embeddings": shapes.tie, "text_config": text_config(shapes), "vision_config": vision_config(shapes),
    }


def text_config(shapes: Shapes) -> dict:
    return {
        "model_type": "ernie4_5_vl_moe_text", "vocab_size": shapes.vocab, "hidden_size": shapes.hidden,
        "intermediate_size": shapes.dense, "num_hidden_layers": len(shapes.layers), "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.kv_heads, "head_dim": shapes.head_dim, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "use_bias": False, "tie_word_embeddings": shapes.tie,
        "mlp_layer_types": list(shapes.layers), "moe_num_experts": shapes.experts, "moe_k": shapes.k,
        "moe_intermediate_size": list(shapes.widths), "moe_num_shared_experts": shapes.shared,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [22, 22, 20]},
    }


def vision_config(shapes: Shapes) -> dict:
    return {
        "model_type": "ernie4_5_vl_moe_vision", "depth": shapes.vit_depth, "hidden_size": shapes.vit_width,
        "num_heads": shapes.vit_heads, "intermediate_size": shapes.vit_mlp, "hidden_act": "quick_gelu",
        "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_merge_size": 2, "rms_norm_eps": 1e-6,
    }


# ---------------------------------------------------------------------------- tensors, named as in the released files
def mlp(at: str, hidden: int, width: int) -> dict[str, tuple]:
    return {f"{at}.gate_proj.weight": (width, hidden), f"{at}.up_proj.weight": (width, hidden),
            f"{at}.down_proj.weight": (hidden, width)}


def linear(at: str, rows: int, columns: int) -> dict[str, tuple]:
    return {f"{at}.weight": (rows, columns), f"{at}.bias": (rows,)}


def layer_norm(at: str, width: int) -> dict[str, tuple]:
    return {f"{at}.weight": (width,), f"{at}.bias": (width,)}


def hub_shapes(shapes: Shapes) -> dict[str, tuple]:
    """Name and shape of every tensor, in the order in which `hub_tensors` draws them."""
    out = {"model.embed_tokens.weight": (shapes.vocab, shapes.hidden), "model.norm.weight": (shapes.hidden,)}
    if not shapes.tie:
        out["lm_head.weight"] = (shapes.vocab, shapes.hidden)
    for number, kind in enumerate(shapes.layers):
        out |= layer_shapes(f"model.layers.{number}", kind, shapes)
    return out | vit_shapes(shapes) | resampler_shapes(shapes)


def layer_shapes(at: str, kind: str, shapes: Shapes) -> dict[str, tuple]:
    hidden, queries, keys = shapes.hidden, shapes.heads * shapes.head_dim, shapes.kv_heads * shapes.head_dim
    out = {f"{at}.input_layernorm.weight": (hidden,), f"{at}.post_attention_layernorm.weight": (hidden,),
           f"{at}.self_attn.q_proj.weight": (queries, hidden), f"{at}.self_attn.o_proj.weight": (hidden, queries),
           f"{at}.self_attn.k_proj.weight": (keys, hidden), f"{at}.self_attn.v_proj.weight": (keys, hidden)}
    return out | (mlp(f"{at}.mlp", hidden, shapes.dense) if kind == "dense" else moe_shapes(f"{at}.mlp", shapes))


def moe_shapes(at: str, shapes: Shapes) -> dict[str, tuple]:
    out = {f"{at}.gate.weight": (shapes.hidden, shapes.experts), f"{at}.gate.weight_1": (shapes.hidden, shapes.experts),
           f"{at}.moe_statics.e_score_correction_bias": (2, shapes.experts)}
    for e in range(2 * shapes.experts):
        out |= mlp(f"{at}.experts.{e}", shapes.hidden, shapes.widths[e >= shapes.experts])
    return out | (mlp(f"{at}.shared_experts", shapes.hidden, shapes.shared * shapes.widths[0]) if shapes.shared else {})


def vit_shapes(shapes: Shapes) -> dict[str, tuple]:
    width = shapes.vit_width
    out = {"vision_model.patch_embed.proj.weight": (width, 588)} | layer_norm("vision_model.ln", width)
    for block in range(shapes.vit_depth):
        at = f"vision_model.blocks.{block}"
        out |= layer_norm(f"{at}.norm1", width) | layer_norm(f"{at}.norm2", width)
        out |= linear(f"{at}.attn.qkv", 3 * width, width) | linear(f"{at}.attn.proj", width, width)
        out |= linear(f"{at}.mlp.fc1", shapes.vit_mlp, width) | linear(f"{at}.mlp.fc2", width, shapes.vit_mlp)
    return out


def resampler_shapes(shapes: Shapes) -> dict[str, tuple]:
    out, wide = {}, 4 * shapes.vit_width
    for stage, columns in (("spatial", wide), ("temporal", 2 * wide)):
        at = f"model.resampler_model.{stage}_linear"
        out |= linear(f"{at}.0", wide, columns) | linear(f"{at}.2", wide, wide) | layer_norm(f"{at}.3", wide)
    return out | linear("model.resampler_model.mlp", shapes.hidden, wide) | {
        "model.resampler_model.after_norm.weight": (shapes.hidden,)}


def hub_tensors(shapes: Shapes) -> dict[str, Tensor]:
    """Random weights. numpy promises that RandomState's stream never changes, so they are the same everywhere."""
    random = np.random.RandomState(SEED)
    return {at: torch.from_numpy((random.standard_normal(shape) * scale(at) + is_norm(at)).astype(np.float32))
            for at, shape in hub_shapes(shapes).items()}


def is_norm(at: str) -> bool:
    return at.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln.weight", "3.weight"))


def scale(at: str) -> float:
    """How far the numbers of a tensor reach."""
    kinds = {"correction_bias": 0.05, ".gate.weight": 0.3, "bias": 0.1}
    return next((size for kind, size in kinds.items() if kind in at), 0.2 if is_norm(at) else 0.12)


def write_checkpoint(shapes: Shapes, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(shapes), indent=1))
    save_file(hub_tensors(shapes), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ----------------------------------------------------------------------------------------------------- the prompts
def image(width: int, height: int, phase: int = 0) -> Image.Image:
    """Numbers that differ between rows, columns, colours and frames."""
    y, x = np.mgrid[:height, :width]
    colours = (7 * x + 3 * y + 40 * phase, 5 * x + 11 * y, 13 * x + 2 * y + 9 * phase)
    return Image.fromarray(np.stack(colours, -1).astype(np.uint8))


# The names of media and prompts are keys of reference.safetensors, which is why a video is called "clip" here.
MEDIA = {"wide": [image(84, 56)], "tall": [image(56, 112, 1)], "clip": [image(56, 56, phase) for phase in range(8)]}
GRIDS = {"wide": (1, 4, 6), "tall": (1, 8, 4), "clip": (8, 4, 4)}
PROMPTS = {  # text as token ids, media by name
    "text": [3, 20, 21, 22, 33, 7],
    "picture": [3, 20, "wide", 30, 31],
    "two pictures": [3, "wide", 25, "tall", 40, 41, 42],
    "clip": [3, 44, "clip", 30, 31, 5],
    "mixed": [3, 20, 21, "clip", 22, 23, "tall", 33, "wide", 34, 35],
}


def prompt_ids(name: str) -> tuple[list[int], list[str]]:
    """(token ids, names of the media in their order)"""
    ids = []
    for part in PROMPTS[name]:
        ids += [part] if isinstance(part, int) else media_ids(GRIDS[part])
    return ids, [part for part in PROMPTS[name] if isinstance(part, str)]


def media_ids(grid: tuple) -> list[int]:
    """An image or a video as tokens: a placeholder for 2 x 2 patches of an image, or of two frames, between markers."""
    t, h, w = grid
    if t == 1:
        return [IMAGE_START, *[IMAGE] * (h * w // 4), IMAGE_END]
    return [VIDEO_START, *[VIDEO] * (t * h * w // 8), VIDEO_END]


# --------------------------------------------------------------------------------------- for tests and the reference
def true_values() -> dict[str, Tensor]:
    """What transformers computes in fp64, written by make_reference.py, which says what the names mean."""
    return load_file(HERE / "reference.safetensors")


def true_stages(name: str, prompt: str, end: str = "") -> dict[str, Tensor]:
    """The true values of a prompt on a model by stage, in the order of computing: all of "mixed", otherwise few. With
    end ".rms": how far transformers' own (fp32, bf16) runs are from each, as a root mean square."""
    values, media = true_values(), prompt_ids(prompt)[1]
    if media and not end:
        values[f"{name}.{prompt}.patches"] = torch.cat([values[f"patches.{medium}"] for medium in media])
    names = names_of(MODELS[name].vit_depth, MODELS[name].layers)
    return {stage: values[key] for stage in names if (key := f"{name}.{prompt}.{stage}{end}") in values}


def prompt_patches(name: str) -> list[Tensor]:
    """Those of each medium of a prompt, as transformers makes them."""
    values = true_values()
    return [values[f"patches.{medium}"] for medium in prompt_ids(name)[1]]


def prepared(model: ErnieVL, name: str, rule: str = "official") -> Inputs:
    """One of the prompts. rule: "official", or "hf_5_23" for the positions of transformers."""
    (ids, media), patches = prompt_ids(name), prompt_patches(name)
    inputs = model.prepare(ids, torch.cat(patches) if media else None, [GRIDS[medium] for medium in media])
    return hf_positions(inputs, model.cfg) if rule == "hf_5_23" else inputs


def hf_positions(inputs: Inputs, cfg: Config) -> Inputs:
    """The same inputs with the positions that transformers 5.23 gives them: text after a video continues behind the
    larger of its rows and columns, and time is left out. All other positions are the official ones."""
    positions, placed = inputs.positions.clone(), 0
    placeholder_idx = is_placeholder(inputs.ids, cfg).nonzero().flatten().tolist()
    for t, h, w in map(token_grid, inputs.grids):
        placed += t * h * w
        positions[:, placeholder_idx[placed - 1] + 1 :] -= max(0, t - max(h, w))
    return inputs._replace(positions=positions)


def between(inputs: Inputs, begin: int, end: int | None = None, patches=slice(0, 0), grids=()) -> Inputs:
    """The tokens begin..end, with the media that stand among them, which the caller names."""
    ids, positions, is_vision = inputs.ids[begin:end], inputs.positions[:, begin:end], inputs.is_vision[begin:end]
    return Inputs(ids, positions, is_vision, inputs.patches[patches], list(grids))


def new_cache(model: ErnieVL) -> list[KVCache]:
    return [KVCache() for _ in model.layers]


def answer(model: ErnieVL, inputs: Inputs, choose=greedy, stop=(), max_new_tokens=12, cache=None) -> tuple[list, str]:
    """(all ids of an answer, why it ended)"""
    ids, steps = [], generate(model, inputs, choose, stop, max_new_tokens, cache)
    while True:
        try:
            ids.append(next(steps))
        except StopIteration as end:
            return ids, end.value


def watch(model: nn.Module, modules: dict[str, str]) -> dict[str, list]:
    """Forward hooks that append each module's output to its list in the dictionary that is returned."""
    seen = {key: [] for key in modules}
    for key, path in modules.items():
        model.get_submodule(path).register_forward_hook(lambda module, given, out, key=key: seen[key].append(out))
    return seen


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.double() - b.double()).abs().max())


def is_true(found: Tensor, truth: Tensor) -> bool:
    """Whether this is, in fp64, a stored true value. 2e-7 of the largest number is more than it loses in fp32; whole
    numbers have to be equal."""
    return found.shape == truth.shape and distance(found, truth) <= 2e-7 * float(truth.double().abs().max())


def rms(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference: unlike the greatest, hardly a matter of luck."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.double() - b.double()).square().mean().sqrt())
