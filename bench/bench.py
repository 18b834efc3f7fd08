"""Times this implementation and transformers side by side on this machine, and prints one table.

    pip install transformers==5.23.0 && python bench/bench.py > bench/RESULTS.md
    python bench/bench.py --full       # on a GPU, the real shape of the 28B, random weights made there

A model with the proportions of the 28B (756 M parameters, random weights) is written as a checkpoint folder and opened
by both. Blocks alternate in one process, because machines are shared and their speed wanders: read the ratios. Of
transformers the fastest of its experts (grouped_mm, eager) and caches (dynamic, static) counts, each row by itself.
With --full one side follows the other, because both do not fit into 80 GB.
"""
import argparse
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "reference")]

import small_model                                                                    # noqa: E402
from ernie_vl import Config, ErnieVL, InputError, KVCache, generate                   # noqa: E402
from extras.check import memory                                                       # noqa: E402
from extras.compiled import compile_model                                             # noqa: E402
from extras.cpu import tune_for_cpu                                                   # noqa: E402
from extras.quantize import KINDS, quantize_layers, stage                             # noqa: E402
from load_weights import load, open_checkpoint, read_config                           # noqa: E402
from make_reference import their_inputs                                               # noqa: E402
from run import log                                                                   # noqa: E402
from small_model import Shapes                                                        # noqa: E402

BENCH = Shapes(tie=True, layers=("dense",) + ("sparse",) * 7, shared=2, experts=32, k=6, hidden=1024, heads=8,
               kv_heads=2, dense=4928, widths=(640, 208), vocab=32_000, vit_depth=8, vit_width=640, vit_heads=8,
               vit_mlp=2560)
FULL = Shapes(tie=True, layers=("dense",) + ("sparse",) * 27, shared=2, experts=64, k=6, hidden=2560, heads=20,
              kv_heads=4, dense=12_288, widths=(1536, 512), vocab=103_424, vit_depth=32, vit_width=1280, vit_heads=16,
              vit_mlp=5120)
IMAGE, LARGE = (1, 36, 36), (1, 74, 74)            # patches of an image of 500 x 500 pixels, and of 1024 x 1024
TEXT = 64                                          # tokens behind it
CONTEXT = 8192                                     # tokens before a token that is timed at 8k


# ----------------------------------------------------------------------------------------------- the checkpoint
def config_of(shapes: Shapes) -> dict:
    config = small_model.config(shapes)
    config["text_config"]["max_position_embeddings"] = 2 * CONTEXT
    return config


def build(shapes: Shapes, folder: Path) -> None:
    """Random bf16 weights in four files under the hub's names."""
    (folder / "config.json").write_text(json.dumps(config_of(shapes) | {"dtype": "bfloat16"}))
    random, sizes, files = torch.Generator().manual_seed(0), small_model.hub_shapes(shapes), {}
    for shard in range(4):
        file, tensors = f"model-{shard + 1:05d}-of-00004.safetensors", {}
        for name in list(sizes)[shard::4]:
            tensor = torch.randn(sizes[name], generator=random) * 0.02 + name.endswith("norm.weight")
            tensors[name] = tensor.bfloat16()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def prompt(grid: tuple) -> tuple[list[int], torch.Tensor]:
    ids = [3, *small_model.media_ids(grid), *range(100, 100 + TEXT)]
    return ids, torch.randn(math.prod(grid), 588, generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------------------- two sides
class Ours:
    def __init__(self, model: ErnieVL, grid: tuple = IMAGE):
        self.plain = self.model = model
        self.grid, self.device = grid, model.norm.weight.device

    @staticmethod
    def load(folder: Path, dtype: torch.dtype, quantize: str | None = None) -> "Ours":
        """On the CPU, as run.py does it."""
        checkpoint = open_checkpoint(folder)
        stages = [stage(quantize)] if quantize else []
        stages.append(memory(checkpoint, "cpu", dtype, log))
        return Ours(tune_for_cpu(load(checkpoint, dtype=dtype, stages=stages)))

    def compile(self) -> "Ours":
        self.model = compile_model(self.plain, log)
        return self

    @torch.inference_mode()
    def vit(self) -> float:
        """Seconds that an image takes until it is tokens."""
        patches = prompt(self.grid)[1].to(self.device)
        start = time.perf_counter()
        tokens = self.plain.resampler_model(self.plain.vision_model(patches, [self.grid]), [self.grid])
        tokens[0, 0].item()      # which waits for a GPU
        return time.perf_counter() - start

    def turn(self, steps: int) -> tuple[float, float]:
        """Seconds to the first token of an answer about an image, and for each token after it."""
        ids, patches = prompt(self.grid)
        inputs, start = self.model.prepare(ids, patches, [self.grid]), time.perf_counter()
        answer = generate(self.model, inputs, stop=(), max_new_tokens=steps + 1)
        next(answer)
        first = time.perf_counter() - start
        assert len(list(answer)) == steps
        return first, (time.perf_counter() - start - first) / steps

    @torch.inference_mode()
    def long(self, context: int, steps: int) -> float:
        """Seconds a token behind a context whose keys and values are random numbers."""
        text, dtype = self.model.cfg.text, self.plain.embed_tokens.weight.dtype
        cache, seconds = [KVCache() for _ in self.model.layers], []
        for kv in cache:
            kv.append(torch.randn(2, text.num_key_value_heads, context, text.head_dim).to(self.device, dtype))
        for i in range(steps + 1):
            where = torch.full((3, 1), context + i, device=self.device)
            inputs = self.model.prepare([100])._replace(positions=where)
            start = time.perf_counter()
            int(self.model(inputs, cache, only_last=True)[0].argmax())
            seconds.append(time.perf_counter() - start)
        return statistics.mean(seconds[1:])


class Theirs:
    """transformers, without the overhead of its generate()."""

    # experts, and whether the cache is static
    CHOICES = (("grouped_mm", False), ("grouped_mm", True), ("eager", False), ("eager", True))

    def __init__(self, model, static: bool = False, grid: tuple = IMAGE):
        self.model, self.static, self.grid, self.device = model, static, grid, model.device

    @staticmethod
    def load(folder: Path, dtype: torch.dtype, experts: str):
        from transformers import Ernie4_5_VLMoeForConditionalGeneration
        return Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", experts_implementation=experts).eval()

    @staticmethod
    def random(config: dict, device: str, experts: str):
        """bf16 weights made on the device."""
        from transformers import AutoConfig, Ernie4_5_VLMoeForConditionalGeneration
        config = AutoConfig.for_model(**config)
        with torch.device(device):
            return Ernie4_5_VLMoeForConditionalGeneration._from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation=experts).eval()

    def cache(self, length: int):
        from transformers import DynamicCache, StaticCache
        config = self.model.config.text_config
        return StaticCache(config=config, max_cache_len=length) if self.static else DynamicCache(config=config)

    def step(self, cache, token: int, where: int) -> int:
        ids, where = torch.tensor([[token]], device=self.device), torch.full((3, 1, 1), where, device=self.device)
        types = {"mm_token_type_ids": torch.zeros_like(ids), "moe_mm_token_type_ids": torch.zeros_like(ids)}
        out = self.model(input_ids=ids, past_key_values=cache, position_ids=where, use_cache=True, **types)
        return int(out.logits[0, -1].argmax())

    @torch.inference_mode()
    def vit(self) -> float:
        patches = prompt(self.grid)[1].to(self.device, self.model.dtype)
        start = time.perf_counter()
        out = self.model.model.get_image_features(patches, torch.tensor([self.grid], device=self.device))
        out.pooler_output[0][0, 0].item()
        return time.perf_counter() - start

    @torch.inference_mode()
    def turn(self, steps: int) -> tuple[float, float]:
        ids, patches = prompt(self.grid)
        given, cache = their_inputs(ids, [patches], [self.grid]), self.cache(len(ids) + steps + 2)
        given = {name: tensor.to(self.device) for name, tensor in given.items()}
        self.model.model.rope_deltas = None
        start = time.perf_counter()
        token = int(self.model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        first = time.perf_counter() - start
        for i in range(steps):
            token = self.step(cache, token, len(ids) + i)
        return first, (time.perf_counter() - start - first) / steps

    @torch.inference_mode()
    def long(self, context: int, steps: int) -> float:
        cache, seconds, text = self.cache(context + steps + 2), [], self.model.config.text_config
        for layer in range(text.num_hidden_layers):
            k, v = torch.randn(2, 1, text.num_key_value_heads, context, text.head_dim).to(self.device, self.model.dtype)
            cache.update(k, v, layer)
        for i in range(steps + 1):
            start = time.perf_counter()
            self.step(cache, 100, context + i)
            seconds.append(time.perf_counter() - start)
        return statistics.mean(seconds[1:])


# ------------------------------------------------------------------------------------------------ the measurements
LOADING = """if True:
    import sys, time, threading
    sys.path.insert(0, sys.argv[1])
    import torch, safetensors
    own = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1e6
    if sys.argv[3] == "ours":
        from extras.cpu import tune_for_cpu
        from load_weights import load
        open_model = lambda folder: tune_for_cpu(load(folder))
    else:
        from transformers import Ernie4_5_VLMoeForConditionalGeneration as Model
        open_model = lambda folder: Model.from_pretrained(folder, dtype=torch.bfloat16)
    before, peak, done = own(), [0.0], []
    def watch():
        while not done:
            peak[0] = max(peak[0], own())
            time.sleep(0.002)
    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    model = open_model(sys.argv[2])
    seconds = time.perf_counter() - start
    done.append(1)
    print(seconds, peak[0] - before)"""


def loading(folder: Path, side: str) -> tuple[float, float]:
    """Seconds, and GB of the process's own memory at the most beyond what it had before."""
    command = [sys.executable, "-c", LOADING, str(HERE.parent), str(folder), side]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return tuple(map(float, out.split()))


def limits() -> dict[str, float]:
    """What this machine can do: GB/s of a sum in fp32, GFLOP/s of a product of 1024 rows."""
    numbers, out = torch.ones(64_000_000), {}
    def seconds(work) -> float:
        work()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)
    out["read"] = numbers.nbytes / seconds(numbers.sum) / 1e9
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        out[str(dtype)] = 2 * 1024**3 / seconds(lambda: F.linear(x, w)) / 1e9
    return out


def measure(folder: Path, blocks: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """measurement -> side -> one number a block"""
    out: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for block in range(blocks):
        for side in ("ours", "theirs"):
            seconds, own = loading(folder, side)
            out["load, s"][side].append(seconds)
            out["load, GB of its own"][side].append(own)
        log(f"block {block + 1}: loading")
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        sides = {"ours": Ours.load(folder, dtype)}
        sides |= {kind: Ours.load(folder, dtype, kind) for kind in KINDS if dtype == torch.bfloat16}
        theirs = {experts: Theirs.load(folder, dtype, experts) for experts in ("grouped_mm", "eager")}
        sides |= {called(experts, static): Theirs(theirs[experts], static) for experts, static in Theirs.CHOICES}
        alternate(out, name, sides, blocks, steps)
        del sides, theirs
        gc.collect()
    return out


def called(experts: str, static: bool) -> str:
    return f"theirs, {experts}, {'static' if static else 'dynamic'}"


def alternate(out: dict, name: str, sides: dict, blocks: int, steps: int) -> None:
    """Every side once a block; the first block warms up."""
    for block in range(blocks + 1):
        for side, model in sides.items():
            first, token = model.turn(steps)
            numbers = {"ViT, s": model.vit(), "first token, s": first, "token at 0.5k, ms": 1000 * token,
                       "token at 8k, ms": 1000 * model.long(CONTEXT, max(2, steps // 8))}
            for what, value in numbers.items() if block else ():
                out[f"{name}: {what}"][side].append(value)
            log(f"{name}, block {block} of {blocks}: {side}")


def table(measured: dict, columns: tuple = ("ours", "int8", "int4")) -> str:
    """Medians with their spread over the blocks, and how many times faster than the fastest transformers of the row."""
    rows = ["| | transformers | " + " | | ".join(columns) + " | |", "|---|---|" + "---|--:|" * len(columns)]
    for what, sides in measured.items():
        theirs = {side: statistics.median(values) for side, values in sides.items() if side.startswith("theirs")}
        best = min(theirs, key=theirs.get)
        cells = [f"{theirs[best]:.3g}{best.removeprefix('theirs')}"]
        for side in columns:
            values = sorted(sides.get(side, []))
            cells += [f"{statistics.median(values):.3g} ({values[0]:.3g} to {values[-1]:.3g})",
                      f"{theirs[best] / statistics.median(values):.2f} x"] if values else ["", ""]
        rows.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(rows)


def fractions(measured: dict, speed: dict[str, float]) -> str:
    """What a token reads, against what the machine can read."""
    # weights: of the layers, with 6 of 32 experts, and of the head, which is never rounded; then bytes of each of them
    layers, head, rows = 146.4e6, 32.8e6, []
    kinds = ("bf16", "ours", 2, 2), ("fp32", "ours", 4, 4), ("bf16", "int8", 1, 2), ("bf16", "int4", 0.53, 2)
    for name, side, size, of_head in kinds:
        rate = (layers * size + head * of_head) / statistics.median(measured[f"{name}: token at 0.5k, ms"][side]) / 1e6
        rows.append(f"{name if side == 'ours' else side} {rate:.1f} GB/s ({100 * rate / speed['read']:.0f} %)")
    return ", ".join(rows)


# ------------------------------------------------------------------------------- the real shape, on a CUDA device
def random_model(cfg: Config, device: str, quantize: str | None = None) -> ErnieVL:
    """bf16 weights made on the device, or integers and their scales; routers in fp32, as the loader has them."""
    with torch.device("meta"):
        model = ErnieVL(cfg).bfloat16()
        for name, module in model.named_modules():
            if name.endswith(".gate"):
                module.float()
        if quantize:
            quantize_layers(model, quantize)
    model.to_empty(device=device)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            spread, centre = 3e-4 if name.endswith(".scale") else 0.02, name.endswith("weight") and "norm" in name
            parameter.data.normal_(0, spread).add_(float(centre))
        else:
            parameter.data.random_()      # all its integers alike
    return model.eval().requires_grad_(False)


def full(shapes: Shapes, grid: tuple, device: str, blocks: int, steps: int) -> str:
    """Ours as it is and compiled, then quantised and compiled, then transformers."""
    config, out = config_of(shapes), defaultdict(lambda: defaultdict(list))
    ours = Ours(random_model(read_config(config), device), grid)
    alternate(out, "bf16", {"ours": ours}, blocks, steps)
    alternate(out, "bf16", {"--compile": ours.compile()}, blocks, steps)
    del ours
    for kind in KINDS:
        gc.collect()
        small = Ours(random_model(read_config(config), device, kind), grid).compile()
        alternate(out, "bf16", {f"{kind} --compile": small}, blocks, steps)
        del small
    for experts, static in Theirs.CHOICES:
        gc.collect()      # the one before it goes, or there is no room
        theirs = Theirs(Theirs.random(config, device, experts), static, grid)
        alternate(out, "bf16", {called(experts, static): theirs}, blocks, steps)
        del theirs
    return table(out, ("ours", "--compile", "int8 --compile", "int4 --compile"))


def cpu_name() -> str:
    try:
        return next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def import_transformers():
    try:
        import transformers
    except ModuleNotFoundError:
        sys.exit("error: the benchmark compares with transformers: pip install transformers==5.23.0")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def report_full(args: argparse.Namespace, versions: str) -> str:
    return f"""{torch.cuda.get_device_name()}, {versions}: {in_words(LARGE)}

{full(FULL, LARGE, "cuda", args.blocks, args.steps)}"""


def in_words(grid: tuple) -> str:
    return f"an image of {math.prod(grid) // 4:,} tokens and {TEXT} tokens of text"


def report(args: argparse.Namespace, versions: str) -> str:
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        build(BENCH, Path(folder))
        speed, measured = limits(), measure(Path(folder), args.blocks, args.steps)
    options = f"--blocks {args.blocks} --steps {args.steps} --threads {args.threads}"
    threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
    return f"""# What the benchmark printed

`python bench/bench.py {options}`, {versions}, on
{cpu_name()} ({torch.backends.cpu.get_cpu_capability()}), {threads}. It reads {speed['read']:.1f} GB/s, and
multiplies {speed['torch.float32']:.0f} GFLOP/s in fp32 and {speed['torch.bfloat16']:.0f} in bf16.

Medians of {args.blocks} blocks, their spread, and how many times faster than the fastest transformers of that row; int8
and int4 are ours, computed in bf16. First token: {in_words(IMAGE)}. No GPU has
been measured.

{table(measured)}

Weights that a token reads, a second: {fractions(measured, speed)} of the read speed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--blocks", type=int, default=3, help="how often everything is measured (default: %(default)s)")
    add("--steps", type=int, default=128, help="tokens decoded in a block (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    add("--full", action="store_true", help="the 28B's own shape, random bf16 weights, on a CUDA device with 80 GB")
    args = parser.parse_args()
    if args.full and not torch.cuda.is_available():
        sys.exit("error: --full needs a CUDA device with 80 GB: without one, leave it out")
    versions = f"torch {torch.__version__}, transformers {import_transformers().__version__}"
    try:
        print((report_full if args.full else report)(args, versions))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
