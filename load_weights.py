"""Checkpoint folder -> model: config.json and *.safetensors, memory-mapped, strict.

Reads the released "-PT" checkpoints of ERNIE-4.5-VL (28B-A3B, 28B-A3B-Thinking, 424B-A47B), of the text-only relatives
(21B-A3B, 300B-A47B, 0.3B), and whatever transformers saves of them. On the CPU a tensor in its stored dtype is mapped
and not read (routers, which become fp32, are): its pages come from the file when a token first needs them, and experts
that nobody picks stay on disk. Definitions stand in the order in which `load`, the last of them, is done with them.
"""
import functools
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ernie_vl import (PATCH, SPATIAL_MERGE, TEMPORAL_MERGE, Config, ErnieVL, InputError, TextConfig, VisionConfig,
                      read_json, require)

FAMILIES = {  # model_type -> what it is
    "ernie4_5_moe_vl": "ERNIE-4.5-VL, flat config",
    "ernie4_5_vl_moe": "ERNIE-4.5-VL, nested config",
    "ernie4_5_moe": "ERNIE-4.5, text only",
    "ernie4_5": "ERNIE-4.5, text only, dense",
}
MODALITIES = "text", "vision"           # in the order of their experts in the files
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "U8": torch.uint8}
LEFT_OUT = re.compile(r"(^|\.)mtp")     # heads that predict several tokens ahead: training leftovers


def find_folder(model: str) -> Path:
    """A folder, or the newest snapshot of a hub id in the local Hugging Face cache. Nothing is downloaded."""
    if Path(model).is_dir():
        return Path(model)
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{model.replace('/', '--')}"
    main = cache / "refs" / "main"
    newest = main.read_text(errors="replace").strip() if main.is_file() else ""
    snapshots = [folder for folder in cache.glob("snapshots/*") if folder.is_dir()]
    require(snapshots, f"{model} is neither a folder nor a model in the local Hugging Face cache; to download one: "
                       "pip install huggingface_hub && hf download baidu/ERNIE-4.5-VL-28B-A3B-PT")
    return max(snapshots, key=lambda folder: (folder.name == newest, folder.stat().st_mtime))


# --------------------------------------------------------------------------------- 1. config.json -> Config
def without_nulls(raw: dict) -> dict:
    return {name: without_nulls(value) if isinstance(value, dict) else value
            for name, value in raw.items() if value is not None}


def require_key(raw: dict, name: str):
    require(name in raw, f"config.json has no {name}: is it the file of an ERNIE-4.5 checkpoint?")
    return raw[name]


def require_values(raw: dict, **values) -> None:
    for name, value in values.items():
        require(raw.get(name, value) == value, f"config.json has {name} {raw.get(name)!r}; only {value!r} is supported")


def is_count(value, most: int = 10**7) -> bool:
    return type(value) is int and 0 < value <= most


def check(condition: bool, what: str) -> None:
    require(condition, f"the {what} in config.json cannot be right: download the file again")


def positive_int(raw: dict, name: str, most: int = 10**7) -> int:
    check(is_count(require_key(raw, name), most), name)
    return raw[name]


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def mlp_layer_types(raw: dict, layers: int) -> tuple[str, ...]:
    """Nested: a list. Flat: bounds, one number or one a modality, which may reach past the last layer; absent or -1
    means the last layer. A model without experts has neither."""
    if types := tuple(raw.get("mlp_layer_types") or ()):
        check(len(types) == layers and set(types) <= {"dense", "sparse"}, "mlp_layer_types and num_hidden_layers")
        return types
    if not raw.get("moe_num_experts"):
        return ("dense",) * layers
    start, interval = min(as_list(raw.get("moe_layer_start_index", 0))), raw.get("moe_layer_interval", 1)
    end = max(layers - 1 if end in (-1, None) else end for end in as_list(raw.get("moe_layer_end_index", -1)))
    return tuple("sparse" if start <= l <= end and (l + 1) % interval == 0 else "dense" for l in range(layers))


def mrope_section(given: list | None, pairs_t: int, pairs: int) -> tuple[int, int, int]:
    """(h, w, t). In a text-only model the three positions are equal, and the split has no effect."""
    section = tuple(given or ((pairs - pairs_t) // 2, (pairs - pairs_t) // 2, pairs_t))
    fits = len(section) == 3 and sum(section) == pairs and section[0] == section[1] and min(section) >= 0
    require(fits, f"config.json divides {pairs} rotary pairs into (h, w, t) = {section}, and h must equal w")
    return section


def read_text_config(raw: dict, tied: bool, vision: bool) -> TextConfig:
    require_values(raw, hidden_act="silu", use_bias=False, moe_gate="topk", moe_gate_act="softmax",
                   moe_norm_gate_logits=True, moe_group_experts=False, moe_use_token_type_bias=False,
                   compression_ratio=1.0)
    heads, key_heads = positive_int(raw, "num_attention_heads"), positive_int(raw, "num_key_value_heads")
    head_dim = positive_int(raw, "head_dim") if raw.get("head_dim") else positive_int(raw, "hidden_size") // heads
    check(heads % key_heads == 0 and head_dim % 2 == 0, "numbers of heads and their width")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    require_values(rope, rope_type="default", type="default")
    theta = rope.get("rope_theta", raw.get("rope_theta", 500_000))
    check(0 < require_key(raw, "rms_norm_eps") < 1 <= float(theta) < 1e12, "rms_norm_eps and rope_theta")
    pairs_t = raw.get("freq_allocation", 20 if vision else 0)
    experts, widths = (as_list(raw.get(name, 0)) for name in ("moe_num_experts", "moe_intermediate_size"))
    require(len(set(experts)) == 1, f"config.json gives unequal numbers of experts, {experts}, to the modalities")
    layers, shared = positive_int(raw, "num_hidden_layers", 1000), raw.get("moe_num_shared_experts", 0)
    types = mlp_layer_types(raw, layers)
    if "sparse" in types:
        require_values(raw, moe_use_aux_free=True)
        check(positive_int(raw, "moe_k") <= experts[0] <= 10_000 and all(map(is_count, widths)), "experts and widths")
        check(not shared or is_count(shared, 1000), "moe_num_shared_experts")
    return TextConfig(
        **{name: positive_int(raw, name)
           for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")},
        num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=head_dim,
        rms_norm_eps=raw["rms_norm_eps"], rope_theta=float(theta),
        mrope_section=mrope_section(rope.get("mrope_section"), pairs_t, head_dim // 2),
        tie_word_embeddings=tied, mlp_layer_types=types,
        moe_num_experts=experts[0], moe_k=raw.get("moe_k", 0), moe_num_shared_experts=shared,
        moe_intermediate_size=(widths[0], widths[-1]) if vision else (widths[0],))


def read_vision_config(vision: dict, raw: dict) -> VisionConfig:
    require_values(vision, hidden_act="quick_gelu", patch_size=PATCH, in_channels=3, spatial_merge_size=SPATIAL_MERGE,
                   temporal_merge_size=TEMPORAL_MERGE, rms_norm_eps=1e-6, embed_dim=require_key(vision, "hidden_size"))
    require_values(vision.get("rope_parameters") or {}, rope_type="axial", rope_theta=10_000)
    require_values(raw, spatial_conv_size=SPATIAL_MERGE, temporal_conv_size=TEMPORAL_MERGE, use_temporal_conv=True,
                   pixel_hidden_size=vision["hidden_size"])
    width, heads = positive_int(vision, "hidden_size"), positive_int(vision, "num_heads")
    inner = vision.get("intermediate_size") or width * require_key(vision, "mlp_ratio")
    check(width % (4 * heads) == 0 and 0 < inner < 10**7, "widths and heads of vision_config")
    return VisionConfig(positive_int(vision, "depth", 1000), width, int(inner), heads)


def read_token_ids(raw: dict, vision: dict | None) -> dict:
    """The flat layout has one placeholder for images and videos, and may leave out the ids of the vocabulary that all
    released models share. In a text-only model no id is special: -1."""
    image = raw.get("image_token_id", raw.get("im_patch_id", 100295))
    ids = {"image_token_id": image, "video_token_id": raw.get("video_token_id", image)}
    usual = {"image_start": 101304, "image_end": 101305, "video_start": 101306, "video_end": 101307}
    ids |= {f"{name}_token_id": raw.get(f"{name}_token_id", number) for name, number in usual.items()}
    check(all(map(is_count, ids.values())), "ids of the media tokens")
    return ids if vision else dict.fromkeys(ids, -1)


def read_config(raw: dict) -> Config:
    """Both layouts; fields as lists, scalars, null or absent. Raises InputError for what no released model has."""
    try:
        raw = without_nulls(raw)
        kind = str(raw.get("model_type"))
        require(kind in FAMILIES, f"config.json says model_type {kind!r}, which is none of {', '.join(FAMILIES)}")
        vision = require_key(raw, "vision_config") if "_vl" in kind else None
        text = require_key(raw, "text_config") if kind == "ernie4_5_vl_moe" else raw
        # In the nested layout converters set one of the two fields and leave the other at its default, True.
        tied = all(part.get("tie_word_embeddings", kind != "ernie4_5_moe_vl") for part in (raw, text))
        return Config(read_text_config(text, tied, bool(vision)),
                      read_vision_config(vision, raw) if vision else None, **read_token_ids(raw, vision))
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise InputError(f"config.json has a field of a wrong type ({error}): download it again") from None


class SkipInit(TorchFunctionMode):
    """Skips weight initialisation, which even on the meta device takes a quarter of the time of loading."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (nn.init.kaiming_uniform_, nn.init.normal_):
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def build_model(config: dict) -> ErnieVL:
    """config.json -> the model on the meta device: shapes without memory."""
    require(not config.get("quantization_config"), "quantised weights: open_quantized in extras/quantize.py reads them")
    with torch.device("meta"), SkipInit():
        return ErnieVL(read_config(config))


# ------------------------------------------------------------------------- 2. the files, and what they hold
class TensorInfo(NamedTuple):
    name: str                            # name in the file
    file: Path
    shape: list[int] | None              # None where the file is not there (extras/check.py)
    dtype: str | None
    start: int = 0                       # of its bytes in the file


def read_index(folder: Path) -> dict[str, Path]:
    """The file of every tensor; empty where the folder has no index."""
    files = read_json(folder / INDEX, {"weight_map": {}}).get("weight_map")
    valid = isinstance(files, dict) and all(Path(str(name)).name == name for name in files.values())
    require(valid, f"{folder / INDEX} has no weight_map from tensors to files beside it: download it again")
    return {tensor: folder / name for tensor, name in files.items()}


def read_header(file: Path) -> dict[str, TensorInfo]:
    """A safetensors file is the length of a JSON header, the header, and the tensors' bytes."""
    try:
        with safe_open(file, framework="pt"), open(file, "rb") as raw:      # the library checks the whole header
            start = 8 + int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(start - 8))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read, or is truncated or damaged ({error}): download it again") from None
    return {name: TensorInfo(name, file, at["shape"], at["dtype"], start + at["data_offsets"][0])
            for name, at in header.items() if name != "__metadata__"}


def canonical(name: str) -> str:
    """Without the prefixes in which the hub's files, what transformers saves, and what it holds in memory differ."""
    return re.sub(r"^vision_tower\.", "vision_model.", re.sub(r"^(model\.)?(language_model\.)?", "", name))


def by_canonical_name(folder: Path, found: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    stored = {canonical(info.name): info for info in found if not LEFT_OUT.search(info.name)}
    paddle = any(name.startswith("ernie.") for name in stored)
    require(not paddle, f"{folder} holds a -Paddle checkpoint: download the one whose name ends in -PT instead")
    return stored


def stored_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder by its name without prefixes, from the headers of its files."""
    index = {name: file for name, file in read_index(folder).items() if not LEFT_OUT.search(name)}
    files = sorted(set(index.values()) or folder.glob("*.safetensors"))
    require(files, f"{folder} has no *.safetensors files with weights: download the whole -PT checkpoint")
    absent = [file.name for file in files if not file.is_file()]
    require(not absent, f"{folder} lacks {len(absent)} files: download {', '.join(absent[:3])} ... into it")
    return by_canonical_name(folder, [info for file in files for info in read_header(file).values()])


# ------------------------------------------------------------------------- 3. the table of names, ours <- theirs
identity: Callable = lambda stored, index, cfg: stored
router: Callable = lambda stored, index, cfg: stored.T.contiguous() if cfg.vision else stored    # in VL files (D, E)
part: Callable = lambda stored, index, cfg: stored[index]                      # of (modalities, E), or of (E, D, F)
only_row: Callable = lambda stored, index, cfg: stored[0]                      # of (1, E)
gate_half: Callable = lambda stored, index, cfg: stored[index].chunk(2)[0]     # of (E, 2F, D), gate rows on top
up_half: Callable = lambda stored, index, cfg: stored[index].chunk(2)[1]

# Names that are equal need no row. {m} is a modality, {i} its place behind an underscore, or nothing for the first;
# {e} is the number of an expert in its modality, {n} among all. The index of a transform is e, or the modality's place.
MOE = "layers.{l}.mlp.{m}_moe"
TABLE = [
    # ours                                   theirs                                     transform
    ("vision_model.patch_embed.weight",      "vision_model.patch_embed.proj.weight",    identity),
    (MOE + ".gate.weight",                   "layers.{l}.mlp.gate.weight{i}",           router),
    (MOE + ".gate.e_{x}_bias",               "layers.{l}.mlp.moe_statics.e_{x}_bias",   part),
    (MOE + ".experts.{e}.{x}.weight",        "layers.{l}.mlp.experts.{n}.{x}.weight",   identity),
    # as transformers holds them in memory
    ("resampler_model.{x}_linear.0.{y}",     "resampler_model.{x}_linear.fc1.{y}",      identity),
    ("resampler_model.{x}_linear.2.{y}",     "resampler_model.{x}_linear.fc2.{y}",      identity),
    ("resampler_model.{x}_linear.3.{y}",     "resampler_model.{x}_linear.ln.{y}",       identity),
    (MOE + ".gate.e_{x}_bias",               MOE + ".gate.moe_statics.e_{x}_bias",      only_row),
    (MOE + ".experts.{e}.gate_proj.weight",  MOE + ".experts.gate_up_proj",             gate_half),
    (MOE + ".experts.{e}.up_proj.weight",    MOE + ".experts.gate_up_proj",             up_half),
    (MOE + ".experts.{e}.down_proj.weight",  MOE + ".experts.down_proj",                part),
]
PATTERNS = [(re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>[^.]+)", re.escape(ours))), *others) for ours, *others in TABLE]


class Source(NamedTuple):
    info: TensorInfo
    transform: Callable                  # (stored tensor, index, config) -> our parameter
    index: int


def source_names(ours: str, experts: int) -> Iterator[tuple[str, Callable, int]]:
    """(their name, transform, index): possible names in the checkpoint of a parameter, the Hub's layout first."""
    for pattern, theirs, transform in PATTERNS:
        if match := pattern.fullmatch(ours):
            fields = match.groupdict()
            place = MODALITIES.index(fields.get("m", "text"))
            index = int(fields.get("e", place))
            yield theirs.format(**fields, n=index + experts * place, i=f"_{place}" * (place > 0)), transform, index
    yield ours, identity, 0


def mismatch(source: Source, parameter: Tensor, cfg: Config) -> str | None:
    """Describes a shape or dtype mismatch of what a file gives for a parameter, or None."""
    info = source.info
    if info.dtype not in DTYPES or DTYPES[info.dtype].is_floating_point != parameter.dtype.is_floating_point:
        return f"{info.name} is stored as {info.dtype}, which is not supported here"
    try:
        found = source.transform(torch.empty(info.shape, device="meta"), source.index, cfg).shape
    except (IndexError, RuntimeError):      # it cannot even be cut like this
        found = info.shape
    return None if found == parameter.shape else f"{info.name} gives {tuple(found)}"


# ---------------------------------------------------------------------------------------- 4. a checkpoint, opened
@dataclass
class Checkpoint:
    """A folder whose names and shapes have been compared with its model; no weights have been read."""
    folder: Path
    config: dict                         # config.json
    model: ErnieVL                       # on the meta device
    sources: dict[str, Source]           # by our name
    missing_keys: list[str]              # ours
    unexpected_keys: list[str]           # theirs
    mismatched: dict[str, str]           # ours: what the file gives instead

    def problems(self) -> dict[str, str]:
        """A sentence for every name that does not fit."""
        shape = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        lines = {name: f"{name} {shape[name]} is missing" for name in self.missing_keys}
        lines |= {name: f"{name} is not a tensor of this model" for name in self.unexpected_keys}
        return lines | {name: f"{name} should be {shape[name]}, and {given}" for name, given in self.mismatched.items()}


def match_tensors(folder: Path, config: dict, model: ErnieVL, stored: dict[str, TensorInfo]) -> Checkpoint:
    """Finds where each of our parameters stands in the files. What does not fit is in the Checkpoint."""
    parameters, experts, sources = dict(model.named_parameters()), model.cfg.text.moe_num_experts, {}
    for ours in parameters:
        for theirs, transform, index in source_names(ours, experts):
            if theirs in stored:
                sources[ours] = Source(stored[theirs], transform, index)
                break
    used = {source.info.name for source in sources.values()}
    used |= {"lm_head.weight"} if model.cfg.text.tie_word_embeddings else set()       # may be stored all the same
    unexpected = [info.name for info in stored.values() if info.name not in used]
    known = {ours: source for ours, source in sources.items() if source.info.shape is not None}
    wrong = {ours: mismatch(source, parameters[ours], model.cfg) for ours, source in known.items()}
    return Checkpoint(folder, config, model, sources, [ours for ours in parameters if ours not in sources], unexpected,
                      {ours: given for ours, given in wrong.items() if given})


def open_checkpoint(folder: Path, build: Callable[[dict], ErnieVL] = build_model) -> Checkpoint:
    """Reads config.json and all names and shapes, and no weights. build: config.json -> the model on the meta device.
    Raises InputError where something does not fit, is missing or left over."""
    config = read_json(folder / "config.json")
    checkpoint = match_tensors(folder, config, build(config), stored_tensors(folder))
    problems = list(checkpoint.problems().values())
    rest = f"; and {len(problems) - 1} more, which python -m extras.check {folder} lists" if problems[1:] else ""
    require(not problems, f"{folder} does not fit its config.json: {''.join(problems[:1])}{rest}")
    return checkpoint


# ------------------------------------------------------------------------------------------------ 5. the weights
def mapped_tensor(storage: torch.UntypedStorage, info: TensorInfo) -> Tensor:
    """A tensor that is a piece of a file. safetensors' own get_tensor looks at the first number of each, and the disk's
    read-ahead then reads most of the file: 60 s instead of 3 s for the 28B."""
    dtype = DTYPES[info.dtype]
    raw = torch.empty(0, dtype=torch.uint8).set_(storage, info.start, (math.prod(info.shape) * dtype.itemsize,))
    raw = raw.clone() if info.start % dtype.itemsize else raw      # some writers do not align their tensors
    return raw.view(dtype).view(info.shape)


def read_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Our parameters one by one, mapped from the files; pages are private, so that training never writes to a file."""
    storage = functools.cache(lambda file: torch.UntypedStorage.from_file(str(file), False, file.stat().st_size))
    for name, (info, transform, index) in checkpoint.sources.items():
        yield name, transform(mapped_tensor(storage(info.file), info), index, checkpoint.model.cfg)


def wanted_dtype(name: str, parameter: Tensor, stored: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """Routers and their biases are fp32 whatever is stored, as in training, or fp64 in an fp64 model. What a stage has
    given a dtype of its own keeps it. fp16 would overflow."""
    if "_moe.gate." in name:
        return torch.promote_types(asked or torch.float32, torch.float32)
    if parameter.dtype != torch.get_default_dtype():
        return parameter.dtype
    return asked or {torch.float16: torch.float32}.get(stored, stored)


def load(folder: Path | Checkpoint, device: str = "cpu", dtype: torch.dtype | None = None,
         stages: Iterable[Callable] = ()) -> ErnieVL:
    """The model of a folder, strictly: every parameter from a file, every tensor of the files used.

    folder: a checkpoint folder, or an opened Checkpoint, whose model is filled. dtype: None is as stored (fp16: fp32).
    stages: functions (model on the meta device, iterator of name and tensor) -> the same, called in this order before
    any tensor is read: they exchange modules or tensors, or watch them pass. Raises InputError."""
    checkpoint = folder if isinstance(folder, Checkpoint) else open_checkpoint(Path(folder))
    model, tensors = checkpoint.model, read_tensors(checkpoint)
    for stage in stages:
        model, tensors = stage(model, tensors)
    modules = dict(model.named_modules())
    for name, tensor in tensors:      # load_state_dict would take a sixth of the time of loading
        module, last = modules[name.rpartition(".")[0]], name.rpartition(".")[2]
        parameter = getattr(module, last)
        tensor = tensor.to(device, wanted_dtype(name, parameter, tensor.dtype, dtype))
        setattr(module, last, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    require(not empty, f"no tensor has reached {', '.join(empty[:3])}: a stage has kept it")
    return model.eval()


if __name__ == "__main__":
    print("error: python -m extras.check checks a folder, python -m extras.quantize quantises one", file=sys.stderr)
    sys.exit(2)
