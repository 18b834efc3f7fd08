"""Weight-only quantisation: the decoder's linear layers in int8 or int4, for half or a third of the memory.

    python run.py --quantize int4 --image photo.jpg        quantises while loading, tensor by tensor
    python -m extras.quantize FOLDER int4 --save OUT       writes a smaller copy, which run.py loads like any other
"""
import argparse
import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Callable, Iterator

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ernie_vl import ErnieVL, InputError, read_json, require
from load_weights import INDEX, Checkpoint, build_model, find_folder, open_checkpoint, read_tensors

KINDS = "int8", "int4"
GROUPS = 128, 64, 32, 16      # weights of a row that share a scale in int4: the largest of these that divides the row
SHARD = 2 << 30               # bytes of a file of a quantised copy, about
# Files that a quantised copy replaces, or does not take along.
WEIGHTS = ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".pdparams"


class QuantizedLinear(nn.Module):
    """A linear layer with integer weights. int8: a scale for every row. int4: two weights in a byte, the first in the
    low bits, and a scale and an offset for every group: weight = (number - 8) * scale + offset. It computes in bf16,
    with torch's own kernels on a CPU; elsewhere the weights are dequantised for every product."""

    def __init__(self, in_features: int, out_features: int, kind: str, name: str = "a layer"):
        super().__init__()
        self.kind, self.in_features, self.packed = kind, in_features, False
        self.group = next((group for group in GROUPS if kind == "int4" and in_features % group == 0), 0)
        if kind == "int8":
            weight, scale = torch.empty(out_features, in_features, dtype=torch.int8), torch.empty(out_features)
        else:
            require(self.group, f"int4 cannot divide the rows of {name} ({in_features}) into groups of 16: use int8")
            weight = torch.empty(out_features, in_features // 2, dtype=torch.uint8)
            scale = torch.empty(in_features // self.group, out_features, 2)
        self.weight, self.scale = nn.Parameter(weight, False), nn.Parameter(scale.bfloat16(), False)      # no gradients

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(out, in) -> the integers and their scales. These are rounded to bf16 before they are used."""
        weight = weight.float()
        if self.kind == "int8":
            scale = (weight.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
            return (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale
        groups = weight.unflatten(1, (-1, self.group))                                      # (out, groups, group)
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).clamp(min=1e-12).bfloat16()
        offset = (low + 8 * scale.float()).bfloat16()
        number = ((groups - offset.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
        number = number.to(torch.uint8).flatten(1)
        return number[:, 0::2] | number[:, 1::2] << 4, torch.stack((scale, offset), -1).transpose(0, 1).contiguous()

    def unpack(self, weight: Tensor) -> Tensor:                                             # -> (..., out, in)
        return torch.stack((weight & 15, weight >> 4), dim=-1).flatten(-2) if self.kind == "int4" else weight

    def dequantized(self, weight: Tensor, scale: Tensor) -> Tensor:                         # -> (..., out, in)
        """Of this layer, or of a stack of such layers."""
        number = self.unpack(weight).bfloat16()
        if self.kind == "int8":
            return number * scale[..., None]
        scale, offset = scale.transpose(-3, -2)[..., None].unbind(-2)                       # (..., out, groups, 1) each
        return ((number.unflatten(-1, (-1, self.group)) - 8) * scale + offset).flatten(-2)

    def pack(self) -> None:
        """Puts int4 weights into the layout of torch's CPU kernel, which has no groups of 16. Not for a layer that is
        to be compiled or saved."""
        if self.group >= 32 and not self.packed:
            weight = torch._convert_weight_to_int4pack_for_cpu(self.unpack(self.weight).int(), 1)
            self.weight, self.packed = nn.Parameter(weight, False), True

    def forward(self, x: Tensor) -> Tensor:                                                 # (T, in) -> (T, out)
        y = x.bfloat16().contiguous()
        if len(x) == 1 and torch.compiler.is_compiling():
            y = matvec(self.dequantized(self.weight, self.scale), y)
        elif self.packed:
            y = torch._weight_int4pack_mm_for_cpu(y, self.weight, self.group, self.scale)
        elif self.kind == "int8" and x.device.type == "cpu":
            y = torch._weight_int8pack_mm(y, self.weight, self.scale)
        else:
            y = nn.functional.linear(y, self.dequantized(self.weight, self.scale))
        return y.type_as(x)


def matvec(weight: Tensor, x: Tensor) -> Tensor:                                           # -> (..., out)
    """(..., out, in) times (..., in). A compiler makes one loop of this, which reads each weight once."""
    return (weight * x[..., None, :].float()).sum(-1).type_as(x)


def quantize_layers(model: ErnieVL, kind: str) -> dict[str, QuantizedLinear]:
    """Puts an empty QuantizedLinear in place of each linear layer of the decoder, and returns them by their weights'
    names. Routers, embedding, head and vision part stay. Raises InputError where int4 cannot divide a row."""
    layers = {}
    for name, linear in list(model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            with linear.weight.device:
                small = QuantizedLinear(linear.in_features, linear.out_features, kind, f"layers.{name}")
            model.layers.set_submodule(name, small)
            layers[f"layers.{name}.weight"] = small
    return layers


def stage(kind: str) -> Callable:
    """A stage of load_weights.load that quantises each tensor to "int8" or "int4" as it passes by: memory never holds
    more than the small model and one tensor. It comes after sharding. Raises InputError for a quantised model."""
    def quantize(model: ErnieVL, tensors: Iterator) -> tuple[ErnieVL, Iterator]:
        require(all(parameter.is_floating_point() for parameter in model.parameters()),
                "the checkpoint is quantised already: load it without --quantize")
        return model, quantize_tensors(tensors, quantize_layers(model, kind))
    return quantize


def quantize_tensors(tensors: Iterator, layers: dict[str, QuantizedLinear]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if name in layers:
            tensor, scale = layers[name].quantize(tensor)
            yield name.removesuffix("weight") + "scale", scale
        yield name, tensor


def open_quantized(folder: Path) -> Checkpoint:
    """Opens a quantised folder, for load_weights.load. Raises InputError, also for another method of quantising."""
    return open_checkpoint(Path(folder), build_quantized)


def build_quantized(config: dict) -> ErnieVL:
    """On the meta device, for a config.json with a quantization_config."""
    method = config["quantization_config"]
    method = method.get("quant_method") if isinstance(method, dict) else method
    require(method in KINDS, f"weights quantised by {method!r} cannot be read: take the original, and --quantize int4")
    model = build_model({key: value for key, value in config.items() if key != "quantization_config"})
    quantize_layers(model, method)
    return model


def save_quantized(folder: Path, kind: str, out: Path, progress: Callable = lambda done, total: None) -> None:
    """Writes a quantised copy of a checkpoint folder, which appears when it is complete; an interrupt leaves nothing.
    progress(done, total) counts tensors, file by file. Raises InputError."""
    folder, out, config = Path(folder), Path(out).resolve(), read_json(Path(folder) / "config.json")
    require(not config.get("quantization_config"), f"{folder} is quantised already: name what it was made of")
    require(out.parent.is_dir() and not out.exists(), f"{out} cannot be made: name a new folder in one that exists")
    checkpoint = open_checkpoint(folder)
    tensors = quantize_tensors(read_tensors(checkpoint), quantize_layers(checkpoint.model, kind))
    sizes, free = [part.nbytes for part in checkpoint.model.parameters()], shutil.disk_usage(out.parent).free
    require(free > 1.05 * sum(sizes), f"{out} would take {sum(sizes):,} bytes, and {free:,} are free there")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".unfinished-") as unfinished:
        copy = Path(unfinished)
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in WEIGHTS and file.name != INDEX:
                shutil.copy(file, copy)
        weight_map = save_files(tensors, copy, lambda done: progress(done, len(sizes)))
        (copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
        config["quantization_config"] = {"quant_method": kind}
        (copy / "config.json").write_text(json.dumps(config, indent=1))
        shutil.copymode(folder, copy)      # a temporary folder is its owner's alone
        copy.rename(out)


def save_files(tensors: Iterator, folder: Path, progress: Callable) -> dict[str, str]:
    """Writes files of about SHARD bytes, and returns which tensor stands in which."""
    weight_map, written = {}, 0
    def file_of(named: tuple[str, Tensor]) -> str:
        nonlocal written
        written += named[1].nbytes
        return f"model-{1 + written // SHARD:05d}.safetensors"
    for file, group in itertools.groupby(tensors, file_of):
        part = {name: tensor.contiguous() for name, tensor in group}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
        progress(len(weight_map))
    return weight_map


def main() -> int:
    parser = argparse.ArgumentParser("python -m extras.quantize", description="Write a quantised copy of a checkpoint.")
    parser.add_argument("folder", help="a checkpoint folder, or a hub id in the local Hugging Face cache")
    parser.add_argument("kind", choices=KINDS, help="half or a third of the memory")
    parser.add_argument("--save", metavar="OUT", type=Path, required=True, help="the folder to write; it must be new")
    parser.error = lambda message: parser.exit(2, f"error: {message} (python -m extras.quantize --help)\n")
    args = parser.parse_args()
    try:
        save_quantized(find_folder(args.folder), args.kind, args.save,
                       lambda done, total: print(f"{done:,} of {total:,} tensors", file=sys.stderr))
    except KeyboardInterrupt:
        return 130
    except (InputError, OSError, SafetensorError) as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
