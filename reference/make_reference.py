"""Writes reference.safetensors: what transformers computes, stage by stage, on the models of small_model.py.

    pip install transformers==5.23.0 && python reference/make_reference.py

Beside the benchmark this is the only file that imports transformers.
"""
import importlib.metadata
import itertools
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from load_weights import load                                                                    # noqa: E402
from small_model import (GRIDS, IMAGE, IMAGE_END, IMAGE_START, MEDIA, MODELS, PROMPTS, VIDEO,      # noqa: E402
                         VIDEO_END, VIDEO_START, answer, distance, image, prepared, prompt_ids, prompt_patches,
                         watch, write_checkpoint)
from tokenizer import Tokenizer, encode_chat, load_image, patchify, pixel_budget                   # noqa: E402

TRANSFORMERS = "5.23.0"
RULES = ("official", "hf_5_23")      # of positions after a video: Baidu's own, and `small_model.hf_positions`


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
    """Images and videos go in separately there, and token types are the caller's business."""
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

    def remember(module, args, kwargs):
        seen.update(zip(("x", "position_ids"), args))
        seen.update(kwargs)
    hook = model.model.language_model.rotary_emb.register_forward_pre_hook(remember, with_kwargs=True)
    their_logits(model, inputs)
    hook.remove()
    return seen["position_ids"][:, 0].expand(3, -1)


# ------------------------------------------------------------------------------------ positions, and stages by hooks
def official_positions(ids: list[int], grids: list[tuple]) -> torch.Tensor:      # -> (3, T)
    """The rule of Baidu's own code, token by token: what follows an image or a video has one more than any number
    before."""
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


def in_prompt_order(images: torch.Tensor, videos: torch.Tensor, grids: list[tuple], rows) -> torch.Tensor:
    """They run images and videos apart. rows(grid): how many rows it has here."""
    of_images = iter(images.split([rows(grid) for grid in grids if grid[0] == 1]))
    of_videos = iter(videos.split([rows(grid) for grid in grids if grid[0] > 1]))
    return torch.cat([next(of_images if grid[0] == 1 else of_videos) for grid in grids])


def their_stages(model, inputs: dict, grids: list[tuple], layers: tuple[str, ...], positions) -> dict:
    decoder, sparse = "model.language_model.layers", [l for l, kind in enumerate(layers) if kind == "sparse"]
    watched = {"vit": "model.vision_tower", "resampler": "model.resampler_model"}
    watched |= {f"layer.{l}": f"{decoder}.{l}" for l in (layers.index("dense"), layers.index("sparse"))}
    for kind in ("text", "vision"):
        watched |= {f"router.{l}.{kind}": f"{decoder}.{l}.mlp.{kind}_moe.gate" for l in sparse}
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


# ---------------------------------------------------------------------------- live comparisons, for the core's tests
SIZES = ((56, 56), (100, 75), (30, 20), (640, 480), (14, 300), (301, 299), (1, 1), (1280, 720), (97, 1033),
         (2500, 2300), (4000, 700), (28, 112))      # width, height


def compare_patches() -> dict[str, float]:
    """The greatest difference of pixels over all SIZES, and how many of them become other grids."""
    furthest, others = 0.0, 0
    for size in SIZES:
        theirs, [grid] = their_patches([image(*size)])
        patches, ours = patchify([image(*size)])
        others += ours != tuple(grid.tolist())
        furthest = max(furthest, distance(patches, theirs))
    return {"patches": furthest, "other grids": others}


def compare_small(folder: Path) -> dict[str, float]:
    """One of the small models on both sides: the greatest difference of logits, how many of the greedy answers differ,
    and our mean error in bf16 in parts of theirs, over all prompts, since routing can flip there."""
    ours, theirs = load(folder), their_model(folder)
    ours_bf16, theirs_bf16 = load(folder, dtype=torch.bfloat16), their_model(folder, torch.bfloat16)
    furthest, others, errors = 0.0, 0, torch.zeros(2)
    for prompt in PROMPTS:
        for rule in RULES:
            inputs = prepared(ours, prompt, rule)
            given = their_inputs(inputs.ids.tolist(), prompt_patches(prompt), inputs.grids)
            exact = their_logits(theirs, given, inputs.positions if rule == "official" else None)
            furthest = max(furthest, distance(ours(inputs), exact))
        others += answer(ours, inputs, max_new_tokens=32)[0] != their_greedy(theirs, given).tolist()
        errors += (torch.stack((ours_bf16(inputs), their_logits(theirs_bf16, given))) - exact).abs().mean((1, 2))
    return {"logits": furthest, "other greedy answers": others, "bf16 error": float(errors[0] / errors[1])}


def compare_tiny() -> dict[str, float]:
    """The bundled checkpoint, which transformers opens too, about an image."""
    folder, tokenizer = HERE.parent / "tiny", Tokenizer(HERE.parent / "tiny")
    ours, theirs, media = load(folder), their_model(folder), load_image(HERE.parent / "examples" / "shapes.png", folder)
    inputs = ours.prepare(*encode_chat(tokenizer, [{"role": "user", "content": ["Describe this image.", media]}]))
    ids, budget = inputs.ids[None], dict(zip(("shortest_edge", "longest_edge"), pixel_budget(folder, "image")))
    patches, grids = their_patches([media.image], size=budget)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": patches, "image_grid_thw": grids,
             "moe_mm_token_type_ids": inputs.is_vision[None].long(),
             "mm_token_type_ids": (ids == ours.cfg.image_token_id).long()}
    others = answer(ours, inputs)[0] != their_greedy(theirs, given, 12).tolist()
    return {"logits of tiny": distance(ours(inputs), their_logits(theirs, given)), "other greedy answers": others,
            "patches": distance(inputs.patches, patches), "other grids": grids.tolist() != [list(media.grid)]}


# ------------------------------------------------------------------------------------------------------------ main
def compute(root: Path) -> dict[str, torch.Tensor]:
    patches = {medium: their_patches(images)[0] for medium, images in MEDIA.items()}
    out = {f"patches.{medium}": rows for medium, rows in patches.items()}
    for name, shapes in MODELS.items():
        folder = write_checkpoint(shapes, root / name)
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
                stages = their_stages(their_model(folder), inputs, grids, shapes.layers, positions["official"])
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
    size = (HERE / "reference.safetensors").stat().st_size
    print(f"{'reference.safetensors':24s} {len(out):3d} tensors {size:9,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
