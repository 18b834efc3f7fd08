"""Writes reference.safetensors: what transformers computes, stage by stage, on a small random model.

    pip install transformers==5.23.0 && python reference/make_reference.py

Beside the benchmark the only file that imports transformers. The model is not stored: `write_checkpoint` makes it anew from a
seed, in the hub's spelling, for the reference here and for the tests. Its numbers are chosen so that mistakes show:
correction biases are not zero, norm weights not one, pictures not square, and the clip is longer than it is wide.
"""
import importlib.metadata
import itertools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).parent
TRANSFORMERS = "5.23.0"
RULES = ("official", "hf_5_23")             # of positions after a clip; see `positions` in ernie_vl.py
IMAGE, VIDEO, IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END = 10, 11, 12, 13, 14, 15      # token ids of the small model

# The two shapes of the family: tied with shared experts (28B), and untied without them and more dense layers (424B).
MODELS = {
    "28b": dict(tie=True, layers=("dense", "sparse", "sparse"), shared=2, experts=12, k=3),
    "424b": dict(tie=False, layers=("dense", "dense", "sparse"), shared=0, experts=8, k=4),
}
D, HEADS, KV_HEADS, HEAD_DIM, DENSE, WIDTHS, VOCAB = 96, 4, 2, 128, 176, (24, 14), 72      # widths: (text, vision) experts
VIT_DEPTH, VIT_WIDTH, VIT_HEADS, VIT_MLP = 2, 48, 3, 200                                   # no two lengths are equal


# ------------------------------------------------------------------------------------------------ the small model
def config(name: str) -> dict:
    """The nested layout, as transformers writes it."""
    m = MODELS[name]
    return {
        "model_type": "ernie4_5_vl_moe", "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "image_token_id": IMAGE, "image_start_token_id": IMAGE_START, "image_end_token_id": IMAGE_END,
        "video_token_id": VIDEO, "video_start_token_id": VIDEO_START, "video_end_token_id": VIDEO_END,
        "tie_word_embeddings": m["tie"],
        "text_config": {
            "model_type": "ernie4_5_vl_moe_text", "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": DENSE,
            "num_hidden_layers": len(m["layers"]), "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "use_bias": False, "tie_word_embeddings": m["tie"], "mlp_layer_types": list(m["layers"]),
            "moe_num_experts": m["experts"], "moe_intermediate_size": list(WIDTHS), "moe_k": m["k"],
            "moe_num_shared_experts": m["shared"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [22, 22, 20]},
        },
        "vision_config": {
            "model_type": "ernie4_5_vl_moe_vision", "depth": VIT_DEPTH, "hidden_size": VIT_WIDTH, "num_heads": VIT_HEADS,
            "intermediate_size": VIT_MLP, "hidden_act": "quick_gelu", "in_channels": 3, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_merge_size": 2, "rms_norm_eps": 1e-6,
        },
    }


def hub_shapes(name: str) -> dict[str, tuple]:
    """Every tensor of the small model as the released files spell it."""
    m, wide = MODELS[name], 4 * VIT_WIDTH
    mlp = lambda at, width: {f"{at}.gate_proj.weight": (width, D), f"{at}.up_proj.weight": (width, D),
                             f"{at}.down_proj.weight": (D, width)}
    linear = lambda at, out, into: {f"{at}.weight": (out, into), f"{at}.bias": (out,)}
    norm = lambda at, width: {f"{at}.weight": (width,), f"{at}.bias": (width,)}
    shapes = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,)}
    if not m["tie"]:
        shapes["lm_head.weight"] = (VOCAB, D)
    for l, kind in enumerate(m["layers"]):
        at = f"model.layers.{l}"
        queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        shapes |= {f"{at}.input_layernorm.weight": (D,), f"{at}.post_attention_layernorm.weight": (D,),
                   f"{at}.self_attn.q_proj.weight": (queries, D), f"{at}.self_attn.o_proj.weight": (D, queries),
                   f"{at}.self_attn.k_proj.weight": (keys, D), f"{at}.self_attn.v_proj.weight": (keys, D)}
        if kind == "dense":
            shapes |= mlp(f"{at}.mlp", DENSE)
            continue
        shapes |= {f"{at}.mlp.gate.weight": (D, m["experts"]), f"{at}.mlp.gate.weight_1": (D, m["experts"]),
                   f"{at}.mlp.moe_statics.e_score_correction_bias": (2, m["experts"])}
        for e in range(2 * m["experts"]):
            shapes |= mlp(f"{at}.mlp.experts.{e}", WIDTHS[e >= m["experts"]])
        if m["shared"]:
            shapes |= mlp(f"{at}.mlp.shared_experts", m["shared"] * WIDTHS[0])
    shapes |= {"vision_model.patch_embed.proj.weight": (VIT_WIDTH, 588)} | norm("vision_model.ln", VIT_WIDTH)
    for i in range(VIT_DEPTH):
        at = f"vision_model.blocks.{i}"
        shapes |= norm(f"{at}.norm1", VIT_WIDTH) | norm(f"{at}.norm2", VIT_WIDTH)
        shapes |= linear(f"{at}.attn.qkv", 3 * VIT_WIDTH, VIT_WIDTH) | linear(f"{at}.attn.proj", VIT_WIDTH, VIT_WIDTH)
        shapes |= linear(f"{at}.mlp.fc1", VIT_MLP, VIT_WIDTH) | linear(f"{at}.mlp.fc2", VIT_WIDTH, VIT_MLP)
    for stage, into in (("spatial", wide), ("temporal", 2 * wide)):
        at = f"model.resampler_model.{stage}_linear"
        shapes |= linear(f"{at}.0", wide, into) | linear(f"{at}.2", wide, wide) | norm(f"{at}.3", wide)
    return shapes | linear("model.resampler_model.mlp", D, wide) | {"model.resampler_model.after_norm.weight": (D,)}


def hub_tensors(name: str) -> dict[str, torch.Tensor]:
    """Random weights. numpy promises that RandomState's stream never changes, so they are the same everywhere."""
    random = np.random.RandomState(45)
    is_norm = lambda at: at.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln.weight", "3.weight"))
    def scale(at):
        if "correction_bias" in at:
            return 0.05
        return 0.3 if ".gate.weight" in at else 0.1 if at.endswith("bias") else 0.2 if is_norm(at) else 0.12
    return {at: torch.from_numpy((random.standard_normal(shape) * scale(at) + is_norm(at)).astype(np.float32))
            for at, shape in hub_shapes(name).items()}


def write_checkpoint(name: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(name), indent=1))
    save_file(hub_tensors(name), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ----------------------------------------------------------------------------------------------------- the prompts
def picture(width: int, height: int, phase: int = 0) -> Image.Image:
    """Numbers that differ between rows, columns, colours and frames."""
    y, x = np.mgrid[:height, :width]
    colours = (7 * x + 3 * y + 40 * phase, 5 * x + 11 * y, 13 * x + 2 * y + 9 * phase)
    return Image.fromarray(np.stack(colours, -1).astype(np.uint8))


MEDIA = {"wide": [picture(84, 56)], "tall": [picture(56, 112, 1)], "clip": [picture(56, 56, phase) for phase in range(8)]}
GRIDS = {"wide": (1, 4, 6), "tall": (1, 8, 4), "clip": (8, 4, 4)}
IMAGES, CLIP = (IMAGE_START, IMAGE, IMAGE_END), (VIDEO_START, VIDEO, VIDEO_END)
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
        if isinstance(part, int):
            ids.append(part)
        else:
            t, h, w = GRIDS[part]
            start, placeholder, end = CLIP if t > 1 else IMAGES
            ids += [start] + [placeholder] * (t * h * w // (8 if t > 1 else 4)) + [end]
    return ids, [part for part in PROMPTS[name] if isinstance(part, str)]


# --------------------------------------------------------------------------------------------- transformers' side
def their_model(folder: Path, dtype: torch.dtype = torch.float32):
    from transformers import Ernie4_5_VLMoeForConditionalGeneration
    return Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager").eval()


def their_patches(images: list[Image.Image], **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil
    out = Ernie4_5_VLMoeImageProcessorPil(**kwargs)(images=images, return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


def their_inputs(ids: list[int], patches: list[torch.Tensor], grids: list[tuple]) -> dict:
    """Pictures and clips go in separately there, and token types are the caller's business."""
    ids = torch.tensor([ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
              "mm_token_type_ids": (ids == IMAGE) * 1 + (ids == VIDEO) * 2,
              "moe_mm_token_type_ids": torch.isin(ids, torch.tensor([IMAGE, IMAGE_START, IMAGE_END])) * 1
                                       + torch.isin(ids, torch.tensor([VIDEO, VIDEO_START, VIDEO_END])) * 2}
    for pixels, grid, mine in (("pixel_values", "image_grid_thw", lambda g: g[0] == 1),
                               ("pixel_values_videos", "video_grid_thw", lambda g: g[0] > 1)):
        if any(map(mine, grids)):
            inputs[pixels] = torch.cat([p for p, g in zip(patches, grids) if mine(g)])
            inputs[grid] = torch.tensor([g for g in grids if mine(g)])
    return inputs


@torch.no_grad()
def their_logits(model, inputs: dict, position_ids: torch.Tensor | None = None) -> torch.Tensor:      # -> (T, V)
    model.model.rope_deltas = None                       # it would remember the last call's
    return model(**inputs, **({} if position_ids is None else {"position_ids": position_ids[:, None]})).logits[0]


@torch.no_grad()
def their_greedy(model, inputs: dict, tokens: int = 32) -> torch.Tensor:
    model.model.rope_deltas = None
    never = model.config.text_config.vocab_size          # nothing stops it, and no id is suppressed
    out = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, pad_token_id=0, eos_token_id=never)
    return out[0, inputs["input_ids"].shape[1]:]


def their_positions(model, inputs: dict) -> torch.Tensor:      # -> (3, T)
    """As they reach the rotary embedding of the decoder."""
    seen = {}
    hook = model.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(zip(("x", "position_ids"), args)) or seen.update(kwargs), with_kwargs=True)
    their_logits(model, inputs)
    hook.remove()
    return seen["position_ids"][:, 0].expand(3, -1)


# ------------------------------------------------------------------------------------------------ stages, by hooks
def official_positions(ids: list[int], grids: list[tuple]) -> torch.Tensor:      # -> (3, T)
    """The rule of Baidu's own code, token by token: what follows a picture or clip has one more than any number before."""
    out, start, grids = [], 0, iter(grids)
    while len(out) < len(ids):
        if ids[len(out)] in (IMAGE, VIDEO):
            t, h, w = next(grids)
            cells = itertools.product(range((t + 1) // 2), range(h // 2), range(w // 2))
            out += [(start + a, start + b, start + c) for a, b, c in cells]
        else:
            out.append((start, start, start))
        start = 1 + max(map(max, out))
    return torch.tensor(out).T


def watch(model, modules: dict[str, str]) -> dict[str, list]:
    """Forward hooks that append each module's output to its list in the dictionary that is returned."""
    seen = {key: [] for key in modules}
    for key, path in modules.items():
        model.get_submodule(path).register_forward_hook(lambda module, given, out, key=key: seen[key].append(out))
    return seen


def in_prompt_order(pictures: torch.Tensor, clips: torch.Tensor, grids: list[tuple], rows) -> torch.Tensor:
    """They run pictures and clips apart. rows(grid): how many rows it has here."""
    parts = {clip: iter(x.split([rows(grid) for grid in grids if (grid[0] > 1) == clip]))
             for clip, x in enumerate((pictures, clips))}
    return torch.cat([next(parts[grid[0] > 1]) for grid in grids])


def their_stages(model, inputs: dict, grids: list[tuple], layers: tuple[str, ...], positions) -> dict[str, torch.Tensor]:
    decoder, sparse = "model.language_model.layers", [l for l, kind in enumerate(layers) if kind == "sparse"]
    watched = {"vit": "model.vision_tower", "resampler": "model.resampler_model"}
    watched |= {f"layer.{l}": f"{decoder}.{l}" for l in (layers.index("dense"), layers.index("sparse"))}
    watched |= {f"router.{l}.{kind}": f"{decoder}.{l}.mlp.{kind}_moe.gate" for l in sparse for kind in ("text", "vision")}
    seen = watch(model, watched)
    their_logits(model, inputs, positions)
    patches = lambda grid: grid[0] * grid[1] * grid[2]
    stages = {"vit": in_prompt_order(*(out.last_hidden_state for out in seen["vit"]), grids, patches),
              "resampler": in_prompt_order(*seen["resampler"], grids, lambda g: patches(g) // (8 if g[0] > 1 else 4))}
    for key in watched:
        if key.startswith("layer"):
            stages[key] = seen[key][0][0]
        if key.startswith("router"):
            _, stages[f"{key}.weights"], chosen = seen[key][0]
            stages[f"{key}.chosen"] = chosen.to(torch.int16)
    return stages


# ------------------------------------------------------------------------------------------------------------ main
def compute(root: Path) -> dict[str, torch.Tensor]:
    patches = {medium: their_patches(images)[0] for medium, images in MEDIA.items()}
    out = {f"patches.{medium}": rows for medium, rows in patches.items()}
    for name, shape in MODELS.items():
        folder = write_checkpoint(name, root / name)
        model = their_model(folder)
        for prompt in PROMPTS:
            ids, media = prompt_ids(prompt)
            grids = [GRIDS[medium] for medium in media]
            inputs = their_inputs(ids, [patches[medium] for medium in media], grids)
            positions = {"official": official_positions(ids, grids), "hf_5_23": their_positions(model, inputs)}
            for rule in RULES:
                out[f"{name}.{prompt}.positions.{rule}"] = positions[rule].to(torch.int16)
            out[f"{name}.{prompt}.logits.official"] = their_logits(model, inputs, positions["official"])
            out[f"{name}.{prompt}.logits.hf_5_23"] = their_logits(model, inputs)
            out[f"{name}.{prompt}.greedy"] = their_greedy(model, inputs).to(torch.int16)
            if prompt == "mixed":
                stages = their_stages(their_model(folder), inputs, grids, shape["layers"], positions["official"])
                out |= {f"{name}.mixed.{stage}": tensor for stage, tensor in stages.items()}
    return {key: tensor.clone().contiguous() for key, tensor in out.items()}


def main() -> int:
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        version = "missing"
    if version != TRANSFORMERS:
        print(f"error: the reference is computed by transformers {TRANSFORMERS}, and here it is {version}: "
              f"pip install transformers=={TRANSFORMERS}", file=sys.stderr)
        return 2
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)                             # the same sums in the same order, wherever it runs
    with tempfile.TemporaryDirectory() as root:
        out = compute(Path(root))
    for group, keys in itertools.groupby(out, lambda key: ".".join(key.split(".")[:2])):
        sizes = [out[key].nbytes for key in keys]
        print(f"{group:24s} {len(sizes):3d} tensors {sum(sizes):9,} bytes")
    save_file(out, HERE / "reference.safetensors", metadata={"transformers": version})
    print(f"{'reference.safetensors':24s} {len(out):3d} tensors {(HERE / 'reference.safetensors').stat().st_size:9,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
