"""What a checkpoint folder holds, whether it is complete, and whether it fits into memory.

    python -m extras.check FOLDER        config.json and the index are enough for the names, before 59 GB are downloaded
                                         exit code 2: a tensor is missing, unexpected, or of another shape or dtype, or
                                         files are damaged or of different models; other differences are only shown
"""
import argparse
import contextlib
import difflib
import itertools
import os
import re
import sys
from pathlib import Path
from typing import Callable, Iterator

import torch
from safetensors import SafetensorError

from ernie_vl import ErnieVL, InputError, read_json
from load_weights import (DTYPES, FAMILIES, Checkpoint, SkipInit, TensorInfo, build_model, by_canonical_name,
                          find_folder, match_tensors, read_header, read_index, wanted_dtype)

RELEASED = "BF16"      # what a tensor counts as whose file is not here


# ------------------------------------------------------------------------------------------------------ memory
def memory(checkpoint: Checkpoint, device: str, dtype: torch.dtype | None, log: Callable,
           compiled: bool = False) -> Callable:
    """A stage of load_weights.load, the last one, that says with log(message) how much memory the model of the other
    stages will take, before anything is read, and with log(message, redraw=True) which share has been read. Raises
    InputError, with a suggestion, where so much memory is not free."""
    def look(model: ErnieVL, tensors: Iterator) -> tuple[ErnieVL, Iterator]:
        name, free = checkpoint.folder.name, free_memory(device)
        own, mapped = memory_needed(checkpoint, model, device, dtype, compiled)
        if own > free:
            raise InputError(f"{name} needs {format_bytes(own)} on {device}, and {format_bytes(free)} are free: "
                             f"{suggestion(checkpoint, model, device, dtype, free)}")
        parts = [f"{format_bytes(own)} of memory"] * (own > 0)
        parts += [f"{format_bytes(mapped)} mapped from disk"] * (mapped > 0)
        log(f"{name} takes {' and '.join(parts)} ({format_bytes(free)} are free on {device}), and "
            f"{format_bytes(bytes_of_a_token(checkpoint, model, dtype))} a token of context")
        return model, with_progress(tensors, name, len(list(model.parameters())), log)
    return look


def with_progress(tensors: Iterator, name: str, total: int, log: Callable) -> Iterator:
    for done, named in enumerate(tensors, 1):
        yield named
        if done % 100 == 0:
            log(f"loading {name}: {100 * done // total} %", redraw=True)


def memory_needed(checkpoint: Checkpoint, model: ErnieVL, device: str, dtype: torch.dtype | None,
                  compiled: bool = False) -> tuple[int, int]:
    """Bytes of the weights: (of memory, mapped from disk). What a CPU can use as it stands in the file is mapped; but
    experts are stacked to be compiled, and int4 is packed anew if it is not."""
    bytes_of = {False: 0, True: 0}
    for name, parameter in model.named_parameters():
        source = checkpoint.sources.get(name)      # none for a scale that is made while loading
        stored = DTYPES[source.info.dtype or RELEASED] if source else None
        wanted = wanted_dtype(name, parameter, stored, dtype)
        copied = "_moe.experts." in name if compiled else wanted == torch.uint8
        bytes_of[device == "cpu" and wanted == stored and not copied] += parameter.numel() * wanted.itemsize
    return bytes_of[False], bytes_of[True]


def bytes_of_a_token(checkpoint: Checkpoint, model: ErnieVL, dtype: torch.dtype | None) -> int:
    """Its keys and values in all layers, which have the dtype of the norms."""
    text, stored = model.cfg.text, DTYPES[checkpoint.sources["norm.weight"].info.dtype or RELEASED]
    dtype = wanted_dtype("norm.weight", model.norm.weight, stored, dtype)
    return 2 * len(model.layers) * text.num_key_value_heads * text.head_dim * dtype.itemsize


def suggestion(checkpoint: Checkpoint, model: ErnieVL, device: str, dtype: torch.dtype | None, free: int) -> str:
    """What would fit; torch computes the sizes on meta tensors."""
    for kind, smaller in quantized_models(checkpoint, model):
        if memory_needed(checkpoint, smaller, device, dtype)[0] <= free:
            return f"--quantize {kind} would fit"
    return "it needs a machine with more memory" if device == "cpu" else "--device cpu maps it from disk, but is slow"


def quantized_models(checkpoint: Checkpoint, model: ErnieVL) -> Iterator[tuple[str, ErnieVL]]:
    from extras.quantize import KINDS, quantize_layers
    for kind in () if checkpoint.config.get("quantization_config") else KINDS:
        with contextlib.suppress(InputError):      # where int4 divides no rows
            with torch.device("meta"), SkipInit():
                smaller = ErnieVL(model.cfg)      # of several processes, this one's shard
            quantize_layers(smaller, kind)
            yield kind, smaller


def free_memory(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    if device == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:        # Linux knows what it could make free; elsewhere all that is built in counts
        return next(1024 * int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 60


def out_of_memory(error: Exception, args: argparse.Namespace) -> str:
    """A sentence about memory that ran out: how much was asked for, if torch says so, and which options of run.py are
    left to try. Raises again what is a mistake of the program."""
    if isinstance(error, RuntimeError) and "memory" not in str(error):
        raise error
    asked = re.search(r"allocate (?:(\d+) bytes|([\d.]+ \w+))", str(error))
    more = f" ({asked[2] or format_bytes(int(asked[1]))} more are needed)" if asked else ""
    left = {"--max-pixels": args.media or args.prompt is None, "--quantize int4": args.quantize != "int4",
            "--dtype bfloat16": args.dtype == "float32", "a shorter prompt": True}
    ways = " or ".join(way for way in left if left[way])
    return f"error: there is not enough memory for this{more}: try {ways}"


def format_bytes(count: float) -> str:
    power = 1 + (count >= 1e6) + (count >= 1e9)
    return f"{count / 1000**power:,.1f} {' kMG'[power]}B"


# ---------------------------------------------------------------------------------------------------- the folder
def open_incomplete(folder: Path) -> Checkpoint:
    """Opens a folder that may have problems, or lack files, of which the index tells the names."""
    from extras.quantize import build_quantized
    config, index = read_json(folder / "config.json"), read_index(folder)
    model = build_quantized(config) if config.get("quantization_config") else build_model(config)
    files = [file for file in sorted(set(index.values()) or folder.glob("*.safetensors")) if file.is_file()]
    found = [TensorInfo(name, file, None, None) for name, file in index.items() if file not in files]
    found += [info for file in files for info in read_header(file).values()]
    return match_tensors(folder, config, model, by_canonical_name(folder, found))


def problems(checkpoint: Checkpoint, limit: int = 20) -> list[str]:
    """A sentence for each of the first problems, with the closest name on the other side."""
    missing, unexpected, lines = checkpoint.missing_keys, checkpoint.unexpected_keys, []
    others = dict.fromkeys(missing, unexpected) | dict.fromkeys(unexpected, missing)
    for name, sentence in itertools.islice(checkpoint.problems().items(), limit):
        closest = difflib.get_close_matches(name, others.get(name, [])[:1000], 1)
        lines.append(sentence + "".join(f" (closest name: {other})" for other in closest))
    return lines


def summary(checkpoint: Checkpoint) -> str:
    """A table of what config.json and the headers say."""
    text, vision = checkpoint.model.cfg.text, checkpoint.model.cfg.vision
    dense, sparse = (text.mlp_layer_types.count(kind) for kind in ("dense", "sparse"))
    stored = {source.info.name: source.info for source in checkpoint.sources.values()}.values()
    files = {info.file for info in stored}
    here, total = [file for file in files if file.is_file()], parameters(checkpoint.model)
    dtypes = ", ".join(sorted({info.dtype for info in stored if info.dtype}))
    experts = " + ".join(f"{text.moe_num_experts} {kind} of width {width}"
                         for kind, width in zip(("text", "vision"), text.moe_intermediate_size))
    kind, shared = checkpoint.config["model_type"], text.moe_num_shared_experts
    rows = {
        "family": f"{FAMILIES[kind]} ({kind})",
        "decoder": f"{dense + sparse} layers ({dense} dense, {sparse} sparse), width {text.hidden_size}, "
                   f"{text.num_attention_heads} query and {text.num_key_value_heads} key heads of {text.head_dim}",
        "experts": f"{experts} a layer, {text.moe_k} chosen, {shared} shared" if sparse else "none",
        "vision": f"{vision.depth} blocks, width {vision.hidden_size}" if vision else "none",
        "parameters": f"{total:,} ({total / 1e9:.2f} B)" if total > 1e8 else f"{total:,}",
        "files": f"{len(here)} of {len(files)} here, {sum(file.stat().st_size for file in here):,} bytes, "
                 f"{dtypes or 'types and shapes not known yet'}",
        "tensors": f"{len(stored):,} stored and known, {len(checkpoint.missing_keys):,} missing, "
                   f"{len(checkpoint.unexpected_keys):,} unexpected, {len(checkpoint.mismatched):,} mismatched",
    }
    return "\n".join(f"{name:11s} {row}" for name, row in rows.items())


def memory_table(checkpoint: Checkpoint) -> Iterator[str]:
    """A line for each precision: what the weights take on either device, and a token of context."""
    if checkpoint.missing_keys or checkpoint.mismatched:
        yield "memory      not known while tensors are missing or mismatched"
        return
    kinds = [("as stored", checkpoint.model, None), ("bfloat16", checkpoint.model, torch.bfloat16)]
    kinds += [(kind, smaller, None) for kind, smaller in quantized_models(checkpoint, checkpoint.model)]
    for kind, model, dtype in kinds:
        (cuda, _), (own, mapped) = (memory_needed(checkpoint, model, device, dtype) for device in ("cuda", "cpu"))
        cuda, own, mapped, token = map(format_bytes, (cuda, own, mapped, bytes_of_a_token(checkpoint, model, dtype)))
        yield (f"memory      {kind:9s} {cuda} on cuda, {own} and {mapped} mapped from disk on cpu; "
               f"{token} a token of context")


def parameters(model: ErnieVL) -> int:
    """Their number, where those of quantised layers count as what they stand for."""
    from extras.quantize import QuantizedLinear
    total = sum(parameter.numel() for parameter in model.parameters())
    for layer in (module for module in model.modules() if isinstance(module, QuantizedLinear)):
        total += layer.in_features * len(layer.weight) - layer.weight.numel() - layer.scale.numel()
    return total


def main() -> int:
    parser = argparse.ArgumentParser("python -m extras.check", description="Check a checkpoint; print what it holds.")
    parser.add_argument("folder", help="with config.json and weights (or their index), or a hub id in the local cache")
    parser.error = lambda message: parser.exit(2, f"error: {message} (python -m extras.check --help)\n")
    args = parser.parse_args()
    try:
        from extras.selfcheck import self_check      # not at the top: run.py needs none of it
        checkpoint = open_incomplete(find_folder(args.folder))
        found = problems(checkpoint)
        print("\n".join([summary(checkpoint), *found, *memory_table(checkpoint)]), flush=True)
        for line in self_check(checkpoint.folder, checkpoint.model.cfg):
            print(line)
    except KeyboardInterrupt:
        return 130
    except (InputError, OSError, SafetensorError) as error:
        parser.exit(2, f"error: {error}\n")
    return 2 * bool(found)


if __name__ == "__main__":
    sys.exit(main())
