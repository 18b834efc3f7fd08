"""Checkpoint folder -> model: config.json and *.safetensors, memory-mapped, strict.

    python load_weights.py FOLDER                              checks a folder and prints what it holds; config.json and the
                                                               index are enough
    python load_weights.py FOLDER --quantize int4 --save OUT   writes a smaller copy, which loads like any other folder

Reads the released "-PT" checkpoints of ERNIE-4.5-VL (28B-A3B, 28B-A3B-Thinking, 424B-A47B), of the text-only relatives
(21B-A3B, 300B-A47B, 0.3B), and whatever transformers saves of them. On the CPU, a tensor in its stored dtype is mapped
and not read (routers are): its pages come from the file when a token first needs them, and experts that nobody picks stay
on disk.
"""
import os
import signal

if __name__ == "__main__":      # Ctrl-C ends the program at once, also while the libraries are loading
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import difflib
import functools
import json
import math
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ernie_vl import (PATCH, SPATIAL_MERGE, TEMPORAL_MERGE, Cache, Config, ErnieVL, Experts, InputError, Inputs, TextConfig,
                      VisionConfig, rope_angles, rotate_pairs)

FAMILIES = {  # model_type -> what it is
    "ernie4_5_moe_vl": "ERNIE-4.5-VL, flat config",
    "ernie4_5_vl_moe": "ERNIE-4.5-VL, nested config",
    "ernie4_5_moe": "ERNIE-4.5, text only",
    "ernie4_5": "ERNIE-4.5, text only, dense",
}


# --------------------------------------------------------------------------------- 1. config.json -> Config
def read_config(raw: dict) -> Config:
    """Both layouts; fields as lists, scalars, null or absent. Raises InputError for what no released model has."""
    try:
        return read_fields(without_nulls(raw))
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise InputError(f"config.json has a field of a wrong type ({error}): download it again") from None


def without_nulls(raw: dict) -> dict:
    return {name: without_nulls(value) if isinstance(value, dict) else value for name, value in raw.items() if value is not None}


def read_fields(raw: dict) -> Config:
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"config.json says model_type {kind!r}, and these can be loaded: {', '.join(FAMILIES)}")
    vision = need(raw, "vision_config") if "_vl" in kind else None
    text = need(raw, "text_config") if kind == "ernie4_5_vl_moe" else raw
    # In the nested layout converters set one of the two fields and leave the other at its default, True.
    tied = all(part.get("tie_word_embeddings", kind != "ernie4_5_moe_vl") for part in (raw, text))
    return Config(read_text_config(text, tied, bool(vision)), read_vision_config(vision, raw), **read_token_ids(raw, vision))


def read_text_config(raw: dict, tied: bool, vision: bool) -> TextConfig:
    expect(raw, hidden_act="silu", use_bias=False, moe_gate="topk", moe_gate_act="softmax", moe_norm_gate_logits=True,
           moe_group_experts=False, moe_use_token_type_bias=False, compression_ratio=1.0)
    heads, key_heads = count(raw, "num_attention_heads"), count(raw, "num_key_value_heads")
    head_dim = count(raw, "head_dim") if raw.get("head_dim") else count(raw, "hidden_size") // heads
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    expect(rope, rope_type="default", type="default")
    types = mlp_layer_types(raw, count(raw, "num_hidden_layers", 1000))
    experts, widths = (listed(raw.get(name, 0)) for name in ("moe_num_experts", "moe_intermediate_size"))
    shared = raw.get("moe_num_shared_experts", 0)
    if len(set(experts)) > 1:
        raise InputError(f"config.json gives the modalities unequal numbers of experts, {experts}, and they must be equal")
    if "sparse" in types:
        expect(raw, moe_use_aux_free=True)
        fits(count(raw, "moe_k") <= experts[0] <= 10_000 and all(map(is_count, widths)), "moe_k, experts and widths")
        fits(not shared or is_count(shared, 1000), "moe_num_shared_experts")
    fits(heads % key_heads == 0 and head_dim % 2 == 0, "numbers of heads and their width")
    theta = rope.get("rope_theta", raw.get("rope_theta", 500_000))
    fits(0 < need(raw, "rms_norm_eps") < 1 <= float(theta) < 1e12, "rms_norm_eps and rope_theta")
    return TextConfig(
        **{name: count(raw, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")},
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        rms_norm_eps=raw["rms_norm_eps"],
        rope_theta=float(theta),
        mrope_section=mrope_section(rope.get("mrope_section"), raw.get("freq_allocation", 20 if vision else 0), head_dim // 2),
        tie_word_embeddings=tied,
        mlp_layer_types=types,
        moe_num_experts=experts[0],
        moe_intermediate_size=(widths[0], widths[-1]) if vision else (widths[0],),
        moe_k=raw.get("moe_k", 0),
        moe_num_shared_experts=shared,
    )


def read_vision_config(vision: dict | None, raw: dict) -> VisionConfig | None:
    if not vision:
        return None
    expect(vision, hidden_act="quick_gelu", patch_size=PATCH, in_channels=3, spatial_merge_size=SPATIAL_MERGE,
           temporal_merge_size=TEMPORAL_MERGE, rms_norm_eps=1e-6, embed_dim=need(vision, "hidden_size"))
    expect(vision.get("rope_parameters") or {}, rope_type="axial", rope_theta=10_000)
    expect(raw, spatial_conv_size=SPATIAL_MERGE, temporal_conv_size=TEMPORAL_MERGE, use_temporal_conv=True,
           pixel_hidden_size=vision["hidden_size"])
    width, heads = count(vision, "hidden_size"), count(vision, "num_heads")
    inner = vision.get("intermediate_size") or width * need(vision, "mlp_ratio")
    fits(width % (4 * heads) == 0 and 0 < inner < 10**7, "widths and heads of vision_config")
    return VisionConfig(count(vision, "depth", 1000), width, int(inner), heads)


def read_token_ids(raw: dict, vision: dict | None) -> dict:
    """The flat layout has one placeholder for pictures and clips, and may leave out the ids of the vocabulary that all
    released models share. In a text-only model no id is special: -1."""
    image = raw.get("image_token_id", raw.get("im_patch_id", 100295))
    ids = {"image_token_id": image, "video_token_id": raw.get("video_token_id", image)}
    usual = {"image_start": 101304, "image_end": 101305, "video_start": 101306, "video_end": 101307}
    ids |= {f"{name}_token_id": raw.get(f"{name}_token_id", id) for name, id in usual.items()}
    fits(all(map(is_count, ids.values())), "ids of the media tokens")
    return ids if vision else dict.fromkeys(ids, -1)


def mlp_layer_types(raw: dict, layers: int) -> tuple[str, ...]:
    """Nested: a list. Flat: bounds, one number or one a modality, which may reach past the last layer; absent or -1 means
    the last layer. A model without experts has neither."""
    if types := tuple(raw.get("mlp_layer_types") or ()):
        fits(len(types) == layers and set(types) <= {"dense", "sparse"}, "mlp_layer_types and num_hidden_layers")
        return types
    if not raw.get("moe_num_experts"):
        return ("dense",) * layers
    start, interval = min(listed(raw.get("moe_layer_start_index", 0))), raw.get("moe_layer_interval", 1)
    end = max(layers - 1 if end in (-1, None) else end for end in listed(raw.get("moe_layer_end_index", -1)))
    return tuple("sparse" if start <= l <= end and (l + 1) % interval == 0 else "dense" for l in range(layers))


def mrope_section(given: list | None, times: int, pairs: int) -> tuple[int, int, int]:
    """(h, w, t). In a text-only model the three positions are equal, and the split has no effect."""
    section = tuple(given or ((pairs - times) // 2, (pairs - times) // 2, times))
    if len(section) != 3 or sum(section) != pairs or section[0] != section[1] or min(section) < 0:
        raise InputError(f"config.json divides the rotary pairs into (h, w, t) = {section}; h must equal w, the sum be {pairs}")
    return section


def need(raw: dict, name: str):
    if name not in raw:
        raise InputError(f"config.json has no {name}: is it the file of an ERNIE-4.5 checkpoint?")
    return raw[name]


def is_count(value, most: int = 10**7) -> bool:
    return type(value) is int and 0 < value <= most


def count(raw: dict, name: str, most: int = 10**7) -> int:
    fits(is_count(need(raw, name), most), name)
    return raw[name]


def fits(condition: bool, what: str) -> None:
    if not condition:
        raise InputError(f"the {what} in config.json cannot be right: download the file again")


def expect(raw: dict, **values) -> None:
    for name, value in values.items():
        if raw.get(name, value) != value:
            raise InputError(f"config.json says {name} {raw[name]!r}, and only {value!r} is supported")


def listed(value) -> list:
    return value if isinstance(value, list) else [value]


# ------------------------------------------------------------------------- 2. the table of names, ours <- theirs
whole: Callable = lambda stored, e, cfg: stored
router: Callable = lambda stored, e, cfg: stored.T.contiguous() if cfg.vision else stored     # the VL files have it as (D, E)
text_row: Callable = lambda stored, e, cfg: stored[0]                             # of a tensor (2, E) or (1, E)
vision_row: Callable = lambda stored, e, cfg: stored[1]
expert: Callable = lambda stored, e, cfg: stored[e]                               # of a stack (E, D, F)
expert_gate: Callable = lambda stored, e, cfg: stored[e].chunk(2)[0]              # of a stack (E, 2F, D), gate rows on top
expert_up: Callable = lambda stored, e, cfg: stored[e].chunk(2)[1]

# Names that are equal need no row. {n} is an expert's number among all: text experts come first, then vision experts.
TABLE = [
    # ours                                                    theirs                                                what of it
    ("vision_model.patch_embed.weight",                       "vision_model.patch_embed.proj.weight",               whole),
    ("layers.{l}.mlp.text_moe.gate.weight",                   "layers.{l}.mlp.gate.weight",                         router),
    ("layers.{l}.mlp.vision_moe.gate.weight",                 "layers.{l}.mlp.gate.weight_1",                       router),
    ("layers.{l}.mlp.text_moe.gate.e_{x}_bias",               "layers.{l}.mlp.moe_statics.e_{x}_bias",              text_row),
    ("layers.{l}.mlp.vision_moe.gate.e_{x}_bias",             "layers.{l}.mlp.moe_statics.e_{x}_bias",              vision_row),
    ("layers.{l}.mlp.{x}_moe.experts.{e}.{y}.weight",         "layers.{l}.mlp.experts.{n}.{y}.weight",              whole),
    # as transformers holds them in memory
    ("resampler_model.{x}_linear.0.{y}",                      "resampler_model.{x}_linear.fc1.{y}",                 whole),
    ("resampler_model.{x}_linear.2.{y}",                      "resampler_model.{x}_linear.fc2.{y}",                 whole),
    ("resampler_model.{x}_linear.3.{y}",                      "resampler_model.{x}_linear.ln.{y}",                  whole),
    ("layers.{l}.mlp.{x}_moe.gate.e_{y}_bias",                "layers.{l}.mlp.{x}_moe.gate.moe_statics.e_{y}_bias", text_row),
    ("layers.{l}.mlp.{x}_moe.experts.{e}.gate_proj.weight",   "layers.{l}.mlp.{x}_moe.experts.gate_up_proj",        expert_gate),
    ("layers.{l}.mlp.{x}_moe.experts.{e}.up_proj.weight",     "layers.{l}.mlp.{x}_moe.experts.gate_up_proj",        expert_up),
    ("layers.{l}.mlp.{x}_moe.experts.{e}.down_proj.weight",   "layers.{l}.mlp.{x}_moe.experts.down_proj",           expert),
]
PATTERNS = [(re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>[^.]+)", re.escape(ours))), theirs, take) for ours, theirs, take in TABLE]
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "U8": torch.uint8}
INDEX = "model.safetensors.index.json"
SHARD = 4 << 30                         # bytes of a file of a quantised copy, about
LEFT_OUT = re.compile(r"(^|\.)mtp")     # heads that predict several tokens ahead: training leftovers


class Stored(NamedTuple):
    name: str                            # as the file spells it
    file: Path
    shape: list[int] | None = None       # None: known from the index alone
    dtype: str | None = None
    start: int = 0                       # of its bytes in the file


class Source(NamedTuple):
    stored: Stored
    take: Callable                       # (stored tensor, expert number, config) -> our parameter
    expert: int


def candidates(ours: str, experts: int) -> Iterator[tuple[str, Callable, int]]:
    """(their name, what to take of it, expert number) for one of our parameters, the hub's spelling first."""
    for pattern, theirs, take in PATTERNS:
        if match := pattern.fullmatch(ours):
            fields = match.groupdict()
            e = int(fields.get("e", 0))
            yield theirs.format(**fields, n=e + experts * (fields.get("x") == "vision")), take, e
    yield ours, whole, 0


# --------------------------------------------------------------------------------------------------- 3. quantising
GROUPS = 128, 64, 32, 16      # so many weights of a row share a scale in int4: the most of these that divide the row


class QuantizedLinear(nn.Module):
    """A linear layer whose weights are whole numbers. int8: a scale for every row. int4: two weights in a byte, the first in
    the low bits, and for every group along a row a scale and an offset: weight = (number - 8) * scale + offset. It computes
    in bf16, with torch's own kernels on a CPU; elsewhere the weights are written out for every product."""

    def __init__(self, columns: int, rows: int, kind: str, name: str = "a layer"):
        super().__init__()
        self.kind, self.in_features, self.packed = kind, columns, False
        if kind == "int8":
            weight, scale = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, dtype=torch.bfloat16)
        else:
            self.group = next((group for group in GROUPS if columns % group == 0), 0)
            if not self.group:
                raise InputError(f"{name} has rows of {columns} weights, which int4 cannot divide into groups of {GROUPS[-1]}: use int8")
            weight = torch.empty(rows, columns // 2, dtype=torch.uint8)
            scale = torch.empty(columns // self.group, rows, 2, dtype=torch.bfloat16)
        self.weight, self.scale = nn.Parameter(weight, requires_grad=False), nn.Parameter(scale, requires_grad=False)

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, columns) -> the whole numbers and their scales. These are rounded to bf16 before they are used."""
        weight = weight.float()
        if self.kind == "int8":
            scale = (weight.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
            return (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale
        groups = weight.unflatten(1, (-1, self.group))
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).clamp(min=1e-12).bfloat16()
        offset = (low + 8 * scale.float()).bfloat16()
        number = ((groups - offset.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
        number = number.to(torch.uint8).flatten(1)
        return number[:, 0::2] | number[:, 1::2] << 4, torch.stack((scale, offset), -1).transpose(0, 1).contiguous()

    def numbers(self, weight: Tensor) -> Tensor:                                            # -> (..., rows, columns)
        return torch.stack((weight & 15, weight >> 4), dim=-1).flatten(-2) if self.kind == "int4" else weight

    def pack(self, weight: Tensor) -> Tensor:
        """int4 as the CPU's kernel wants it, which depends on the CPU; it knows no groups of 16."""
        self.packed = self.kind == "int4" and self.group >= 32 and weight.device.type == "cpu"
        return torch._convert_weight_to_int4pack_for_cpu(self.numbers(weight).int(), 1) if self.packed else weight

    def dequantized(self, weight: Tensor, scale: Tensor) -> Tensor:                         # -> (..., rows, columns)
        """Of this layer, or of a stack of such layers."""
        number = self.numbers(weight).bfloat16()
        if self.kind == "int8":
            return number * scale[..., None]
        scale, offset = scale.transpose(-3, -2)[..., None].unbind(-2)                       # (..., rows, groups, 1) each
        return ((number.unflatten(-1, (-1, self.group)) - 8) * scale + offset).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:                                                 # (T, columns) -> (T, rows)
        y = x.bfloat16().contiguous()
        if len(x) == 1 and torch.compiler.is_compiling():
            y = one_row(self.dequantized(self.weight, self.scale), y)
        elif self.packed:
            y = torch._weight_int4pack_mm_for_cpu(y, self.weight, self.group, self.scale)
        elif self.kind == "int8" and x.device.type == "cpu":
            y = torch._weight_int8pack_mm(y, self.weight, self.scale)
        else:
            y = F.linear(y, self.dequantized(self.weight, self.scale))
        return y.type_as(x)


def one_row(weight: Tensor, x: Tensor) -> Tensor:                                           # -> (..., rows)
    """(..., rows, columns) times (..., columns). A compiler makes one loop of this, which reads each weight once."""
    return (weight * x[..., None, :].float()).sum(-1).type_as(x)


class ThroughFP32(nn.Linear):
    """A bf16 layer on a CPU without bf16 instructions: from 4 rows on its products are faster in fp32, the conversion of the
    weights included (7 times at 64 rows, measured with AVX2), and no less exact."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 4:
            return super().forward(x)
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float()).type_as(x)


class StepsWithoutOneDNN(ErnieVL):
    """With AVX-512, oneDNN reads the bf16 weights of a product of one row at half the speed of torch's own kernels (11 GB/s a
    core instead of 22), which are several times slower from a few rows on: it is off while one token goes through."""

    def forward(self, inputs: Inputs, cache: Cache | None = None, only_last: bool = False) -> Tensor:
        if len(inputs.ids) > 1:
            return super().forward(inputs, cache, only_last)
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):       # None: as it is
            return super().forward(inputs, cache, only_last)


def quantize_layers(model: ErnieVL, kind: str) -> dict[str, QuantizedLinear]:
    """Puts a QuantizedLinear in place of every linear layer of the decoder, and returns them by the name of their weight.
    Router, norms, embedding, head and the whole vision part stay as they are."""
    linears = {name: module for name, module in model.layers.named_modules() if isinstance(module, nn.Linear)}
    out = {}
    for name, linear in linears.items():
        small = QuantizedLinear(linear.in_features, linear.out_features, kind, f"layers.{name}")
        parent, _, last = name.rpartition(".")
        setattr(model.layers.get_submodule(parent), last, small)
        out[f"layers.{name}.weight"] = small
    return out


# ----------------------------------------------------------------------------------- 4. a folder and its problems
@dataclass
class Checkpoint:
    folder: Path
    kind: str
    cfg: Config
    model: ErnieVL                       # on the meta device: shapes without memory
    sources: dict[str, Source]           # by our name
    missing: list[str]                   # ours
    surplus: list[str]                   # theirs
    wrong_shape: dict[str, str]          # ours: what the file gives instead
    quantized: dict[str, QuantizedLinear]        # the layers that are stored as whole numbers, by their weight's name

    def problems(self, most: int) -> list[str]:
        shape = {name: tuple(parameter.shape) for name, parameter in self.model.state_dict().items()}
        lines = [f"{name} {shape[name]} is missing{closest(name, self.surplus)}" for name in self.missing[:most]]
        lines += [f"{name} is not a tensor of this model{closest(name, self.missing)}" for name in self.surplus[:most]]
        lines += [f"{name} should be {shape[name]}, and {given}" for name, given in self.wrong_shape.items()]
        return lines[:most]


def closest(name: str, others: list[str]) -> str:
    match = difflib.get_close_matches(name, others[:1000], 1)
    return f" (closest name: {match[0]})" if match else ""


def find_folder(model: str) -> Path:
    """A folder, or the newest snapshot of a hub id in the local Hugging Face cache. Nothing is downloaded."""
    if Path(model).is_dir():
        return Path(model)
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{model.replace('/', '--')}"
    main = cache / "refs" / "main"
    newest = main.read_text(errors="replace").strip() if main.is_file() else ""
    snapshots = sorted(filter(Path.is_dir, cache.glob("snapshots/*")), key=lambda f: (f.name == newest, f.stat().st_mtime))
    if not snapshots:
        raise InputError(f"{model} is neither a folder nor a model in the local Hugging Face cache; to download one: "
                         "pip install huggingface_hub && hf download baidu/ERNIE-4.5-VL-28B-A3B-PT")
    return snapshots[-1]


def read_json(path: Path, absent: dict | None = None) -> dict:
    """The object in a JSON file; `absent` when there is no such file, if that is given."""
    if absent is not None and not path.is_file():
        return absent
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: is {path.parent} a checkpoint folder?") from None
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no valid JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object: download it again")
    return value


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder by its name without prefixes: from the files' headers, or from the index alone where a file
    is not there (yet)."""
    index, found = folder / INDEX, {}
    if index.is_file():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) and Path(file).name == file for file in files.values()):
            raise InputError(f"{index} has no weight_map from tensors to files beside it: download it again")
        found = {name: Stored(name, folder / file) for name, file in files.items()}
    for file in sorted({stored.file for stored in found.values()} or folder.glob("*.safetensors")):
        if file.is_file():
            found |= read_header(file)
    there = {name: s for name, s in found.items() if not LEFT_OUT.search(name) and (s.shape is not None or not s.file.is_file())}
    return {canonical(name): stored for name, stored in there.items()}


def read_header(file: Path) -> dict[str, Stored]:
    """A safetensors file is the length of a JSON header, the header, and the tensors' bytes."""
    try:
        with safe_open(file, framework="pt"), open(file, "rb") as raw:      # the library checks the whole header
            start = 8 + int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(start - 8))
    except OSError as error:
        raise InputError(f"{file} cannot be opened: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError(f"{file} is truncated or damaged ({error}): download it again") from None
    header.pop("__metadata__", None)
    return {name: Stored(name, file, at["shape"], at["dtype"], start + at["data_offsets"][0]) for name, at in header.items()}


def canonical(name: str) -> str:
    """Without the prefixes in which the hub's files, what transformers saves, and what it holds in memory differ."""
    return re.sub(r"^vision_tower\.", "vision_model.", re.sub(r"^(model\.)?(language_model\.)?", "", name))


class Unfilled(TorchFunctionMode):
    """Linear layers are made without their random numbers, which even on the meta device take a quarter of the time of loading."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return kwargs["tensor"] if function is nn.init.kaiming_uniform_ else function(*args, **(kwargs or {}))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads config.json and all names and shapes, and finds where each of our parameters stands. Reads no weights."""
    raw = read_json(folder / "config.json")
    cfg, stored = read_config(raw), stored_tensors(folder)
    if any(name.startswith("ernie.") for name in stored):
        raise InputError(f"{folder} holds a -Paddle checkpoint: download the one whose name ends in -PT instead")
    with torch.device("meta"), Unfilled():
        model = ErnieVL(cfg)
        quantized = quantize_layers(model, stored_kind(raw)) if "quantization_config" in raw else {}
    sources, wrong_shape, parameters = {}, {}, model.state_dict()
    for ours, parameter in parameters.items():
        for theirs, take, e in candidates(ours, cfg.text.moe_num_experts):
            if theirs in stored:
                sources[ours] = Source(stored[theirs], take, e)
                if given := misfit(sources[ours], parameter, cfg):
                    wrong_shape[ours] = given
                break
    used = {source.stored.name for source in sources.values()}
    used |= {"lm_head.weight"} if cfg.text.tie_word_embeddings else set()       # may be stored all the same
    missing = [ours for ours in parameters if ours not in sources]
    surplus = [s.name for s in stored.values() if s.name not in used]
    return Checkpoint(folder, raw["model_type"], cfg, model, sources, missing, surplus, wrong_shape, quantized)


def stored_kind(raw: dict) -> str:
    kind = raw["quantization_config"]
    kind = kind.get("quant_method") if isinstance(kind, dict) else kind
    if kind not in ("int8", "int4"):
        raise InputError(f"config.json says that the weights are quantised by {kind!r}, which is not supported: take the "
                         "checkpoint as it was released, and --quantize int8 or int4")
    return kind


def misfit(source: Source, parameter: Tensor, cfg: Config) -> str | None:
    """What a file gives where another shape or a number type of ours is needed; None when it fits or is not there yet."""
    stored = source.stored
    if stored.shape is None:
        return None
    if stored.dtype not in DTYPES or DTYPES[stored.dtype].is_floating_point != parameter.dtype.is_floating_point:
        return f"{stored.name} is stored as {stored.dtype}, of which nothing is known here"
    try:
        found = source.take(torch.empty(stored.shape, device="meta"), source.expert, cfg).shape
    except (IndexError, RuntimeError):      # it cannot even be cut like this
        found = stored.shape
    return None if found == parameter.shape else f"{stored.name} gives {tuple(found)}"


# ------------------------------------------------------------------------------- 5. one model on several devices
SPLIT = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 0, "up_proj": 0, "o_proj": 1, "down_proj": 1}    # along which dimension


def shard(checkpoint: Checkpoint, ranks: int) -> None:
    """Gives the model the shapes of one process of several: each has a share of the attention heads and of the width of
    every MLP, routed experts included. Embedding, head and the vision part are whole everywhere."""
    if checkpoint.quantized:
        raise InputError(f"{checkpoint.folder} is quantised, and cannot be cut: share the original out, with --quantize")
    text, smaller = checkpoint.cfg.text, {}
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"):
        value = getattr(text, name)
        widths = value if isinstance(value, tuple) else (value,)
        if any(width % ranks for width in widths):
            raise InputError(f"{ranks} processes cannot share {name} {value} among them: take a number that divides it")
        smaller[name] = tuple(width // ranks for width in widths) if isinstance(value, tuple) else value // ranks
    with torch.device("meta"):
        checkpoint.model = ErnieVL(replace(checkpoint.cfg, text=replace(text, **smaller)))


def own_share(ours: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """Rows are a view of the file, of which the other ranks' pages are never read."""
    dim = SPLIT.get(ours.split(".")[-2]) if ours.startswith("layers.") else None
    return tensor if ranks == 1 or dim is None else tensor.chunk(ranks, dim)[rank].contiguous()


def add_up(model: ErnieVL) -> None:
    """Every rank has computed a part of each sum over heads and widths: two all-reduces a layer make them whole."""
    def total(module: nn.Module, given: tuple, part: Tensor) -> Tensor:
        torch.distributed.all_reduce(part)
        return part
    for layer in model.layers:
        layer.self_attn.register_forward_hook(total)
        layer.mlp.register_forward_hook(total)


# ------------------------------------------------------------------------------ 6. one token at a time, compiled
class GroupedExperts(Experts):
    """Experts whose weights (and scales) are views of three stacks (E, rows, columns). All that were chosen run in three
    products, whoever they are, so nothing waits for the device to tell."""

    def stack(self) -> None:
        self.stacks = {name: [] for name in ("gate_proj", "up_proj", "down_proj")}
        for name, stacks in self.stacks.items():
            linears = [getattr(expert, name) for expert in self.experts]
            for part in dict(linears[0].named_parameters()):
                stacks.append(torch.stack([getattr(linear, part).detach() for linear in linears]))
                for linear, its in zip(linears, stacks[-1]):
                    setattr(linear, part, nn.Parameter(its, requires_grad=False))

    def weights(self, name: str, experts: Tensor | slice = slice(None)) -> Tensor:          # -> (experts, rows, columns)
        linear, parts = getattr(self.experts[0], name), [stack[experts] for stack in self.stacks[name]]
        return linear.dequantized(*parts) if isinstance(linear, QuantizedLinear) else parts[0]

    def forward(self, x: Tensor) -> Tensor:                                                 # (T, D) -> (T, D)
        weights, chosen = self.gate(x)                                                      # (T, K), (T, K)
        if len(x) == 1:
            product = lambda rows, name: one_row(self.weights(name, chosen[0]), rows)
            y = product(F.silu(product(x, "gate_proj")) * product(x, "up_proj"), "down_proj")      # (K, D)
            return weights @ y
        order = chosen.flatten().argsort(stable=True)                                       # (T*K,)  expert after expert
        ends = (chosen.flatten() == torch.arange(len(self.experts), device=x.device)[:, None]).sum(1).cumsum(0).int()    # (E,)
        product = lambda rows, name: F.grouped_mm(rows.type_as(w := self.weights(name)), w.mT, offs=ends).type_as(rows)
        rows = x[order // chosen.shape[1]]                                                  # (T*K, D)
        rows = product(F.silu(product(rows, "gate_proj")) * product(rows, "up_proj"), "down_proj")
        return (rows[order.argsort()].view(*chosen.shape, -1) * weights[..., None]).sum(1)


class CompiledErnieVL(ErnieVL):
    """Steps of one token go through a compiled function whose shapes stay the same while the context grows: keys and values
    stand in a window that is at most 256 places or a quarter longer than they are, and masked behind them. Everything else is
    as it was, and this too where nothing can be compiled, after a sentence."""

    def forward(self, inputs: Inputs, cache: Cache | None = None, only_last: bool = False) -> Tensor:
        if cache is None or not cache.layers[0].length or len(inputs.ids) > 1 or inputs.is_vision.any():
            return super().forward(inputs, cache, only_last)
        place, angles = cache.layers[0].length, rope_angles(inputs.positions, self.cfg.text)[:, None]
        more = max(256, 1 << place.bit_length() >> 3)      # in steps of an eighth: seldom a new window, never a long empty one
        window = (place // more + 1) * more
        for kv in cache.layers:
            if kv.buffer.shape[2] != window:
                grown = kv.buffer.new_zeros(*kv.buffer.shape[:2], window, kv.buffer.shape[3])
                grown[:, :, :place] = kv.buffer[:, :, :place]
                kv.buffer = grown
                torch._dynamo.mark_static_address(grown)                    # so a CUDA graph may keep it where it is
                torch._dynamo.maybe_mark_dynamic(grown, 2)                  # so a larger window is not compiled anew
            kv.length += 1
        given = self, inputs.ids, angles.cos(), angles.sin(), inputs.ids.new_tensor([place]), [kv.buffer for kv in cache.layers]
        try:
            return self.step(*given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:        # what goes wrong while compiling is one
            self.announce(f"nothing can be compiled here ({str(error).strip().splitlines()[0]}): going on without")
            self.step = step
            return step(*given)


def compiled(model: ErnieVL, announce: Callable = lambda sentence: None) -> CompiledErnieVL:
    """Turns a model that is not shared into one whose steps are compiled, and compiles one."""
    for module in model.modules():
        if type(module) is Experts:
            module.__class__ = GroupedExperts
            module.stack()
    model.__class__ = CompiledErnieVL
    mode = "reduce-overhead" if model.norm.weight.is_cuda else None        # a CUDA graph: one launch for the whole step
    model.announce, model.step = announce, torch.compile(step, mode=mode, fullgraph=True)
    announce("compiling, which takes up to a few minutes")
    with torch.inference_mode():
        cache = model.new_cache()
        for _ in range(2):      # the second is a step, as generate makes them
            model(model.prepare([0]), cache, only_last=True)
    return model


def step(model: ErnieVL, ids: Tensor, cos: Tensor, sin: Tensor, place: Tensor, buffers: list[Tensor]) -> Tensor:     # -> (1, V)
    """What ErnieVL.forward does with one text token behind `place` others, with no size that depends on the place."""
    x, seen = model.embed_tokens(ids), torch.arange(buffers[0].shape[2], device=ids.device)[None] <= place     # (1, D), (1, window)
    for layer, buffer in zip(model.layers, buffers):
        attention, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (p(y).unflatten(-1, (-1, attention.head_dim)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        buffer.index_copy_(2, place, torch.stack((rotate_pairs(k, cos, sin), v)).transpose(1, 2))         # (2, G, window, d)
        q = rotate_pairs(q, cos, sin).view(1, buffer.shape[1], -1, attention.head_dim)                    # (1, G, H/G, d)
        x = x + attention.o_proj(F.scaled_dot_product_attention(q, *buffer[:, None], attn_mask=seen).reshape(1, -1))
        y, mlp = layer.post_attention_layernorm(x), layer.mlp
        if layer.sparse:
            x = x + mlp.text_moe(y) + (mlp.shared_experts(y) if mlp.shared_experts else 0)
        else:
            x = x + mlp(y)
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    return F.linear(model.norm(x), head.weight)


# ------------------------------------------------------------------------------------------ 7. folder -> model
def load(folder: Path, device: str = "cpu", dtype: torch.dtype | None = None,
         progress: Callable = lambda done, all: None, quantize: str | None = None,
         announce: Callable = lambda sentence: None, rank: int = 0, ranks: int = 1, compile: bool = False) -> ErnieVL:
    """The model of a folder, strictly: every parameter from a file, every tensor of the files used.

    dtype None keeps what is stored (fp16 becomes fp32: it would overflow). Routers and their biases are fp32 whatever is
    stored, as in training. quantize "int8" or "int4" rounds the decoder's weights, tensor by tensor, so that there is never
    more in memory than the small model and one tensor. announce(sentence) says how much memory it will take, before anything
    is read, and progress(done, all) how many tensors are. With several ranks, which torch.distributed connects, each loads
    its own share. compile makes a model whose steps are compiled. Raises InputError, also where the
    memory is not free."""
    checkpoint = open_checkpoint(Path(folder))
    check_complete(checkpoint)
    if compile and ranks > 1:
        raise InputError("a model that is shared among processes is not compiled: leave out --compile")
    if ranks > 1:
        shard(checkpoint, ranks)
        add_up(checkpoint.model)
    layers = quantize_checkpoint(checkpoint, quantize) if quantize else checkpoint.quantized
    announce(check_memory(checkpoint, device, dtype, compile))
    modules = dict(checkpoint.model.named_modules())

    def put(name: str, tensor: Tensor) -> None:      # load_state_dict would take a sixth of the time of loading
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, nn.Parameter(tensor, requires_grad=getattr(modules[parent], last).requires_grad))

    for ours, tensor in read_tensors(checkpoint, progress):
        tensor = own_share(ours, tensor, rank, ranks)
        if ours in layers:
            if quantize:
                tensor, scale = layers[ours].quantize(tensor)
                put(scale_of(ours), scale.to(device))
            put(ours, tensor.to(device) if compile else layers[ours].pack(tensor.to(device)))
        else:
            put(ours, tensor.to(device, wanted_dtype(ours, tensor.dtype, dtype)))
    if device == "cpu":
        suit_cpu(checkpoint.model)
    checkpoint.model.eval()
    return compiled(checkpoint.model, announce) if compile else checkpoint.model


def suit_cpu(model: ErnieVL) -> None:
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        model.__class__ = StepsWithoutOneDNN
    if not has_bf16_products():
        for module in model.modules():
            if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
                module.__class__ = ThroughFP32


def has_bf16_products() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def read_tensors(checkpoint: Checkpoint, progress: Callable) -> Iterator[tuple[str, Tensor]]:
    """Our parameters one by one, mapped from the files."""
    storage = functools.cache(lambda file: torch.UntypedStorage.from_file(str(file), shared=False, nbytes=file.stat().st_size))
    for i, (ours, (stored, take, e)) in enumerate(checkpoint.sources.items(), 1):
        yield ours, take(mapped(storage(stored.file), stored), e, checkpoint.cfg)
        if i % 100 == 0:
            progress(i, len(checkpoint.sources))


def wanted_dtype(ours: str, stored: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    if "_moe.gate." in ours:
        return torch.float32
    if ours.endswith(".scale"):
        return torch.bfloat16
    return asked or (torch.float32 if stored == torch.float16 else stored)


def check_memory(checkpoint: Checkpoint, device: str, dtype: torch.dtype | None, compile: bool = False) -> str:
    """A sentence about the memory that the weights will take, or InputError if so much is not free. What a CPU can use as it
    stands in the file is mapped, and takes none of its own, unless experts are stacked to be compiled."""
    text, own, mapped = checkpoint.cfg.text, 0, 0
    for ours, parameter in checkpoint.model.state_dict().items():
        source = checkpoint.sources.get(ours)
        stored = DTYPES[source.stored.dtype] if source else None                       # a scale that is made while loading
        wanted = wanted_dtype(ours, stored, dtype) if parameter.is_floating_point() else parameter.dtype
        if device == "cpu" and wanted == stored != torch.uint8 and not (compile and "_moe.experts." in ours):    # int4 is packed anew
            mapped += parameter.numel() * wanted.itemsize
        else:
            own += parameter.numel() * wanted.itemsize
    token = 2 * len(text.mlp_layer_types) * text.num_key_value_heads * text.head_dim * (dtype or torch.bfloat16).itemsize
    free = free_memory(device)
    if own > free:
        raise InputError(f"{checkpoint.folder.name} needs {size(own)} on {device}, and {size(free)} are free: {advice(checkpoint, device, free)}")
    parts = [f"{size(own)} of memory"] * (own > 0) + [f"{size(mapped)} mapped from disk"] * (mapped > 0)
    return f"{checkpoint.folder.name} takes {' and '.join(parts)} ({size(free)} are free on {device}), and {size(token)} a token of context"


def advice(checkpoint: Checkpoint, device: str, free: int) -> str:
    """What would fit; torch computes the sizes on meta tensors."""
    for kind in () if checkpoint.quantized else ("int8", "int4"):
        with torch.device("meta"):
            smaller = ErnieVL(checkpoint.model.cfg)      # of several processes, this one's share
            try:
                quantize_layers(smaller, kind)
            except InputError:      # int4 does not divide its rows
                continue
        bytes_needed = sum(p.numel() * min(p.itemsize, 2) for p in smaller.state_dict().values())
        if bytes_needed < free:
            return f"--quantize {kind} would fit"
    return "--device cpu would map it from the disk, and be slow" if device != "cpu" else "it takes a larger machine"


def size(count: float) -> str:
    power = 3 if count >= 1e9 else 2 if count >= 1e6 else 1
    return f"{count / 1000**power:,.1f} {' kMG'[power]}B"


def free_memory(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    if device == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:        # Linux knows what it could make free; elsewhere all that is built in counts
        return next(1024 * int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 60


def scale_of(weight: str) -> str:
    return f"{weight.removesuffix('weight')}scale"


def quantize_checkpoint(checkpoint: Checkpoint, kind: str) -> dict[str, QuantizedLinear]:
    if checkpoint.quantized:
        raise InputError(f"{checkpoint.folder} is quantised already: load it without --quantize")
    with torch.device("meta"):
        return quantize_layers(checkpoint.model, kind)


def save_quantized(folder: Path, kind: str, out: Path, progress: Callable = lambda done, all: None) -> None:
    """Writes a quantised copy of a checkpoint folder, which appears when it is complete. Raises InputError."""
    checkpoint, out = open_checkpoint(folder), out.resolve()
    check_complete(checkpoint)
    layers = quantize_checkpoint(checkpoint, kind)
    if out.exists():
        raise InputError(f"{out} is there already: name a folder that is not")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is no folder: make it first")
    room, wanted = shutil.disk_usage(out.parent).free, sum(p.nbytes for p in checkpoint.model.state_dict().values())
    if room < 1.05 * wanted:
        raise InputError(f"{out} would take {size(wanted)}, and {size(room)} are free there")
    files, shard = {}, {}
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".unfinished-") as unfinished:
        def flush() -> None:
            name = f"model-{1 + len(set(files.values())):05d}.safetensors"
            save_file(shard, Path(unfinished) / name, metadata={"format": "pt"})
            files.update(dict.fromkeys(shard, name))
            shard.clear()
        for ours, tensor in read_tensors(checkpoint, progress):
            if ours in layers:
                shard[ours], shard[scale_of(ours)] = layers[ours].quantize(tensor)
            else:
                shard[ours] = tensor.contiguous()
            if sum(t.nbytes for t in shard.values()) > SHARD:
                flush()
        flush()
        for file in folder.iterdir():        # the tokenizer and its neighbours
            if file.is_file() and file.suffix in (".json", ".jinja", ".model", ".ttf", ".txt", ".md") and file.name != INDEX:
                shutil.copy(file, unfinished)
        raw = read_json(folder / "config.json") | {"quantization_config": {"quant_method": kind}}
        (Path(unfinished) / "config.json").write_text(json.dumps(raw, indent=1))
        (Path(unfinished) / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}, indent=1))
        shutil.copymode(folder, unfinished)      # a temporary folder is its owner's alone
        os.rename(unfinished, out)


def mapped(storage: torch.UntypedStorage, stored: Stored) -> Tensor:
    """A tensor that is a piece of a file. safetensors' own get_tensor looks at the first number of each, and the disk's
    read-ahead then reads most of the file: 60 s instead of 3 s for the 28B."""
    dtype = DTYPES[stored.dtype]
    raw = torch.empty(0, dtype=torch.uint8).set_(storage, stored.start, (math.prod(stored.shape) * dtype.itemsize,))
    raw = raw.clone() if stored.start % dtype.itemsize else raw      # some writers do not align their tensors
    return raw.view(dtype).view(stored.shape)


def check_complete(checkpoint: Checkpoint) -> None:
    folder = checkpoint.folder
    if not checkpoint.sources:
        raise InputError(f"{folder} has no *.safetensors files with weights: download the whole -PT checkpoint")
    absent = sorted({s.stored.file.name for s in checkpoint.sources.values() if s.stored.shape is None})
    if absent:
        raise InputError(f"{folder} lacks {len(absent)} of its files, {absent[0]} first: download the rest into the folder")
    if first := checkpoint.problems(1):
        more = len(checkpoint.missing) + len(checkpoint.surplus) + len(checkpoint.wrong_shape) - 1
        rest = f"; and {more} more, which python load_weights.py {folder} lists" if more else ""
        raise InputError(f"{folder} does not fit its config.json: {first[0]}{rest}")


# --------------------------------------------------------------------------------------------- 8. the summary
def summary(checkpoint: Checkpoint) -> str:
    text, vision = checkpoint.cfg.text, checkpoint.cfg.vision
    dense, sparse = (text.mlp_layer_types.count(kind) for kind in ("dense", "sparse"))
    stored = {source.stored.name: source.stored for source in checkpoint.sources.values()}.values()
    files = {s.file for s in stored}
    here, total = [f for f in files if f.is_file()], sum(p.numel() for p in checkpoint.model.state_dict().values())
    for layer in checkpoint.quantized.values():
        total += layer.in_features * len(layer.weight) - layer.weight.numel() - layer.scale.numel()
    kinds = zip(("text", "vision"), text.moe_intermediate_size)
    experts = " + ".join(f"{text.moe_num_experts} {kind} of width {width}" for kind, width in kinds)
    rows = {
        "family": f"{FAMILIES[checkpoint.kind]} ({checkpoint.kind})",
        "decoder": f"{dense + sparse} layers ({dense} dense, {sparse} sparse), width {text.hidden_size}, "
                   f"{text.num_attention_heads} query and {text.num_key_value_heads} key heads of {text.head_dim}",
        "experts": f"{experts} a layer, {text.moe_k} chosen, {text.moe_num_shared_experts} shared" if sparse else "none",
        "vision": f"{vision.depth} blocks, width {vision.hidden_size}" if vision else "none",
        "parameters": f"{total:,} ({total / 1e9:.2f} B)" if total > 1e8 else f"{total:,}",
        "files": f"{len(here)} of {len(files)} here, {sum(os.path.getsize(f) for f in here):,} bytes, "
                 f"{', '.join(sorted({s.dtype for s in stored if s.dtype})) or 'types and shapes not known yet'}",
        "tensors": f"{len(stored):,} stored and known, {len(checkpoint.missing):,} missing, {len(checkpoint.surplus):,} left "
                   f"over, {len(checkpoint.wrong_shape):,} of a wrong shape",
    }
    return "\n".join(f"{name:11s} {row}" for name, row in rows.items())


def main() -> int:
    parser = argparse.ArgumentParser(description="Check a checkpoint folder and print what it holds, or write a quantised copy.")
    parser.add_argument("folder", help="a folder with config.json and weights (or their index), or a hub id in the local cache")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="round the decoder's weights to 8 or 4 bits; with --save")
    parser.add_argument("--save", metavar="OUT", type=Path, help="the folder to write; it must not exist yet")
    parser.error = lambda message: parser.exit(2, f"error: {message} (python load_weights.py --help)\n")
    args = parser.parse_args()
    if bool(args.quantize) != bool(args.save):
        parser.error("--quantize and --save OUT go together: run.py --quantize needs no copy")
    try:
        folder = find_folder(args.folder)
        if args.save:
            signal.signal(signal.SIGINT, signal.default_int_handler)      # from here on Ctrl-C removes what is not finished
            save_quantized(folder, args.quantize, args.save, lambda done, all: print(f"{done:,} of {all:,} tensors", file=sys.stderr))
            folder = args.save
        checkpoint = open_checkpoint(folder)
        print("\n".join([summary(checkpoint), *checkpoint.problems(20)]), flush=True)
    except KeyboardInterrupt:
        return 130
    except (InputError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 2 if checkpoint.problems(1) else 0


if __name__ == "__main__":
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # nothing is left to interrupt
    sys.exit(code)
