"""Writes reference.safetensors: true values by stage, of the models and prompts of small_model.py.

    pip install transformers==5.23.0 && python reference/make_reference.py

With --compare it writes nothing, and prints how far this project and transformers are from the truth.
Truth is what the stored weights, the token ids and the fp32 patches give when transformers' own modules compute all
in fp64, with the fp32 rotary frequencies of training. It is stored rounded to fp32, with a relative error below 2^-24.
Names of tensors, with STAGE as in stage_names.py:

    patches.MEDIUM                     of an image or a video, from transformers' image processor
    MODEL.PROMPT.STAGE                 all stages of "mixed"; of the other prompts positions and logits
    MODEL.PROMPT.STAGE.rms             (2,): root mean square distance of transformers' own fp32 and bf16 runs from it
    MODEL.PROMPT.{positions, logits}.hf_5_23      with transformers' positions after a video, where they are others
    MODEL.PROMPT.greedy                32 ids, with transformers' positions

Beside the benchmark this is the only file that imports transformers.
"""
import contextlib
import importlib.metadata
import itertools
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from load_weights import load                                                                    # noqa: E402
from small_model import (GRIDS, IMAGE, IMAGE_END, IMAGE_START, MEDIA, MODELS, PROMPTS, VIDEO,      # noqa: E402
                         Shapes, VIDEO_END, VIDEO_START, answer, distance, image, prepared, prompt_ids, prompt_patches,
                         rms, write_checkpoint)
from stage_names import ROUTER, by_token, names_of, our_stages                                     # noqa: E402
from tokenizer import Tokenizer, encode_chat, load_image, patchify, pixel_budget                   # noqa: E402

TRANSFORMERS = "5.23.0"
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
RULES = ("official", "hf_5_23")      # of positions after a video: Baidu's own, and `small_model.hf_positions`
OTHER = ("clip", "mixed")            # the prompts in which these differ


# --------------------------------------------------------------------------------------------- transformers' side
class Wide(TorchFunctionMode):
    """fp64 wherever transformers' code asks for fp32: in its `.float()` calls, and in casts, softmaxes and new tensors
    of which the dtype is fp32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        wide = lambda value: torch.float64 if value is torch.float32 else value
        function = torch.Tensor.double if function is torch.Tensor.float else function
        return function(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def in_precision(model):
    """To run transformers' model in: an fp64 one stays in fp64 throughout."""
    return Wide() if model.dtype == torch.float64 else contextlib.nullcontext()


def their_model(folder: Path, dtype: torch.dtype = torch.float32):
    """In fp64 it is loaded in fp32 first, as rotary frequencies have to be computed in fp32."""
    from transformers import Ernie4_5_VLMoeForConditionalGeneration
    loaded = torch.float32 if dtype == torch.float64 else dtype
    model = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
        folder, dtype=loaded, attn_implementation="eager", experts_implementation="eager").eval()
    return model.double() if dtype == torch.float64 else model


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
    given = {} if position_ids is None else {"position_ids": position_ids[:, None]}
    with in_precision(model):
        return model(**inputs, **given).logits[0]


@torch.no_grad()
def their_greedy(model, inputs: dict, tokens: int = 32) -> torch.Tensor:
    model.model.rope_deltas = None
    never = model.config.text_config.vocab_size          # nothing stops it, and no id is suppressed
    with in_precision(model):
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


def in_prompt_order(calls: list[torch.Tensor], grids: list[tuple], merge: int, pair: int) -> torch.Tensor:
    """They run all images, and then all videos. merge: how many patches became one row here; pair: how many frames of a
    video did."""
    order = sorted(range(len(grids)), key=lambda i: grids[i][0] > 1)
    rows = [grids[i][0] * grids[i][1] * grids[i][2] // merge // (pair if grids[i][0] > 1 else 1) for i in order]
    parts = dict(zip(order, torch.cat(calls).split(rows)))
    return torch.cat([parts[i] for i in range(len(grids))])


def vision_modules(depth: int) -> dict[str, tuple]:
    """Stage -> (transformers' module, how many patches become one row, how many frames of a video do)."""
    out = {f"vit.block.{number}": (f"model.vision_tower.blocks.{number}", 1, 1) for number in (0, depth - 1)}
    out["vit"] = ("model.vision_tower.ln", 1, 1)
    merges = {"spatial": ("spatial_linear", 4, 1), "temporal": ("temporal_linear", 4, 2), "mlp": ("mlp", 4, 2),
              "after_norm": ("after_norm", 4, 2)}
    return out | {f"resampler.{stage}": (f"model.resampler_model.{at}", *rows) for stage, (at, *rows) in merges.items()}


def text_modules(layers: int) -> dict[str, str]:
    """Stage -> transformers' module whose output it is."""
    decoder = "model.language_model"
    out = {f"layer.{l}.attention": f"{decoder}.layers.{l}.self_attn" for l in range(layers)}
    out |= {f"layer.{l}.output": f"{decoder}.layers.{l}" for l in range(layers)}
    return out | {"norm": f"{decoder}.norm", "logits": "lm_head"}


def their_stages(model, inputs: dict, grids: list[tuple], positions=None) -> dict[str, torch.Tensor]:
    """Every stage of a pass by the names of stage_names.py, but for the patches, which are given."""
    config, kinds = model.config, model.config.text_config.mlp_layer_types
    depth = config.vision_config.depth if grids else 0
    vision, text = vision_modules(depth) if grids else {}, text_modules(len(kinds))
    seen, module, first = {}, model.get_submodule, lambda out: out[0] if isinstance(out, tuple) else out
    remember = lambda stage: lambda module, given, out: seen.setdefault(stage, []).append(first(out).clone())
    is_vision = inputs["moe_mm_token_type_ids"][0].bool()
    positions = their_positions(model, inputs) if positions is None else positions
    with contextlib.ExitStack() as hooks:
        for stage, path in (text | {stage: path for stage, (path, *_) in vision.items()}).items():
            hooks.enter_context(module(path).register_forward_hook(remember(stage)))
        hooks.enter_context(module("model.language_model.layers.0").register_forward_pre_hook(
            lambda module, given: seen.update(embedding=[given[0].clone()])))
        routers = {l: watch_routers(module(f"model.language_model.layers.{l}.mlp"), hooks)
                   for l, kind in enumerate(kinds) if kind == "sparse"}
        their_logits(model, inputs, positions)
    out = {stage: in_prompt_order(seen[stage], grids, *rows) for stage, (_, *rows) in vision.items()}
    out |= {stage: seen[stage][0][0] for stage in ("embedding", *text)}
    out |= {"positions": positions, "is_vision": is_vision}
    for l, calls in routers.items():
        out |= {f"layer.{l}.router.{part}": rows for part, rows in zip(ROUTER, by_token(calls, is_vision))}
    return {stage: out[stage] for stage in names_of(depth, kinds) if stage != "patches"}


def watch_routers(moe, hooks: contextlib.ExitStack) -> list:
    """A list to which each call of a router of this layer appends (probabilities, chosen, weights). Their probabilities
    are what is given to the module that adds the bias."""
    calls, of_call = [], {}
    for gate in (moe.text_moe.gate, moe.vision_moe.gate):
        hooks.enter_context(gate.moe_statics.register_forward_pre_hook(
            lambda module, given: of_call.update(p=given[0].clone())))
        hooks.enter_context(gate.register_forward_hook(
            lambda module, given, out: calls.append((of_call.pop("p"), out[2], out[1]))))
    return calls


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


OTHERS = {  # checkpoints that are like none of MODELS; the last one is untied, without shared experts
    "6 heads on 1": Shapes(tie=True, layers=("dense", "sparse", "sparse"), shared=1, experts=10, k=2, hidden=120,
                           heads=6, kv_heads=1, dense=200, vit_depth=3),
    "24 experts": Shapes(tie=True, layers=("dense", "sparse", "sparse", "sparse"), shared=2, experts=24, k=6,
                         hidden=160, widths=(20, 10), vocab=90, vit_width=64, vit_heads=2),
    "two dense layers": Shapes(tie=False, layers=("dense", "dense", "sparse", "sparse"), shared=0, experts=8, k=4,
                               hidden=128, heads=8, widths=(40, 18), vit_depth=1),
}


def both_models(folder: Path) -> tuple[dict, dict]:
    """(ours, transformers'), each by dtype."""
    ours = {dtype: load(folder, dtype=dtype) for dtype in DTYPES}
    return ours, {dtype: their_model(folder, dtype) for dtype in DTYPES}


def one_pass(ours: dict, theirs: dict, inputs, given: dict, positions=None) -> tuple:
    """(the greatest difference in fp64 over all stages; errors of the logits: (fp32, bf16), (ours, theirs), T, V)"""
    wide = our_stages(ours[torch.float64], inputs)
    truth = their_stages(theirs[torch.float64], given, inputs.grids, positions)
    logits = [(ours[dtype](inputs), their_logits(theirs[dtype], given, positions)) for dtype in DTYPES[1:]]
    errors = torch.stack([torch.stack(pair).double() - truth["logits"] for pair in logits])
    return max(distance(wide[stage], truth[stage]) for stage in truth), errors


def judge(passes: list[tuple], others: int) -> dict[str, float]:
    """Over all passes of a checkpoint: the greatest difference in fp64; in fp32 and bf16 the rms distance of our logits
    from the truth over that of transformers'. For the few tokens of one prompt this ratio would be a matter of luck."""
    differences, errors = zip(*passes)
    pairs = dict(zip(("fp32", "bf16"), torch.cat(errors, dim=2).square().mean((2, 3)).sqrt().tolist()))
    columns = [f"{name}: ours {a:.3g}, transformers' {b:.3g}, ratio {a / b:.3f}" for name, (a, b) in pairs.items()]
    print(f"  fp64: {max(differences):.1e}", *columns, sep="; ")
    ratios = {name: a / b for name, (a, b) in pairs.items()}
    return {"fp64": max(differences), "other greedy answers": others} | ratios


def compare_small(folder: Path) -> dict[str, float]:
    """Both implementations on a checkpoint with the fixtures' token ids, over all prompts."""
    (ours, theirs), passes, others = both_models(folder), [], 0
    for prompt in PROMPTS:
        for rule in RULES[: 1 + (prompt in OTHER)]:
            inputs = prepared(ours[torch.float64], prompt, rule)
            given = their_inputs(inputs.ids.tolist(), prompt_patches(prompt), inputs.grids)
            passes.append(one_pass(ours, theirs, inputs, given, inputs.positions if rule == "official" else None))
        expected = their_greedy(theirs[torch.float64], given).tolist()
        others += sum(answer(ours[dtype], inputs, max_new_tokens=32)[0] != expected for dtype in DTYPES[:2])
    return judge(passes, others)


def compare_models(root: Path) -> dict[str, dict[str, float]]:
    """`compare_small` of the small models and of OTHERS."""
    found = {}
    for name, shapes in (MODELS | OTHERS).items():
        print(name, end=":")
        found[name] = compare_small(write_checkpoint(shapes, root / name))
    return found


def compare_tiny() -> dict[str, float]:
    """The bundled checkpoint, which transformers opens too, about an image."""
    folder, tokenizer = HERE.parent / "tiny", Tokenizer(HERE.parent / "tiny")
    (ours, theirs), media = both_models(folder), load_image(HERE.parent / "examples" / "shapes.png", folder)
    conversation, cfg = [{"role": "user", "content": ["Describe this image.", media]}], ours[torch.float64].cfg
    inputs = ours[torch.float64].prepare(*encode_chat(tokenizer, conversation))
    ids, budget = inputs.ids[None], dict(zip(("shortest_edge", "longest_edge"), pixel_budget(folder, "image")))
    patches, grids = their_patches([media.image], size=budget)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs.patches,
             "image_grid_thw": grids, "moe_mm_token_type_ids": inputs.is_vision[None].long(),
             "mm_token_type_ids": (ids == cfg.image_token_id).long()}
    expected = their_greedy(theirs[torch.float64], given, 12).tolist()
    others = sum(answer(ours[dtype], inputs)[0] != expected for dtype in DTYPES[:2])
    print("tiny", end=":")
    return judge([one_pass(ours, theirs, inputs, given)], others) | {
        "patches": distance(inputs.patches, patches), "other grids": grids.tolist() != [list(media.grid)]}


# ------------------------------------------------------------------------------------------------------------ main
def compute(root: Path) -> dict[str, torch.Tensor]:
    patches = {medium: their_patches(images)[0] for medium, images in MEDIA.items()}
    out = {f"patches.{medium}": rows for medium, rows in patches.items()}
    for name, shapes in MODELS.items():
        folder = write_checkpoint(shapes, root / name)
        models = [their_model(folder, dtype) for dtype in DTYPES]
        for prompt in PROMPTS:
            ids, media = prompt_ids(prompt)
            grids, at = [GRIDS[medium] for medium in media], f"{name}.{prompt}"
            inputs = their_inputs(ids, [patches[medium] for medium in media], grids)
            runs = [their_stages(model, inputs, grids, official_positions(ids, grids)) for model in models]
            kept = [stage for stage in runs[0] if prompt == "mixed" or stage in ("positions", "logits")]
            out |= with_distances({f"{at}.{stage}": [run[stage] for run in runs] for stage in kept})
            if prompt in OTHER:
                runs = [their_stages(model, inputs, grids) for model in models]
                out |= with_distances({f"{at}.{stage}.hf_5_23": [run[stage] for run in runs]
                                       for stage in ("positions", "logits")})
            out[f"{at}.greedy"] = their_greedy(models[0], inputs).to(torch.int16)
    return {key: tensor.clone().contiguous() for key, tensor in out.items()}


def with_distances(runs: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What is stored of the same stage in fp64, fp32 and bf16. Whole numbers become int16: all are small."""
    out = {}
    for key, (truth, *others) in runs.items():
        stored = {torch.float64: torch.float32, torch.int64: torch.int16}.get(truth.dtype, truth.dtype)
        out[key] = truth.to(stored)
        if truth.is_floating_point():
            out[f"{key}.rms"] = torch.tensor([rms(other, truth) for other in others])
    return out


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
        if sys.argv[1:] == ["--compare"]:
            compare_models(Path(root))
            compare_tiny()
            return 0
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
