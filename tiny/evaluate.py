"""How much of its ten skills the tiny checkpoint has, on images that it was never trained on.

    python tiny/evaluate.py     500 samples a skill: clean, after JPEG, turned, noisy; perplexity, use of experts
    python tiny/evaluate.py --count 20 --looks clean --quantize int4 --folder FOLDER
"""
import argparse
import math
import re
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE)]

from ernie_vl import ErnieVL, InputError, Router, generate, read_json, sampler         # noqa: E402
from extras.boxes import find_boxes                                                    # noqa: E402
from extras.cpu import tune_for_cpu                                                    # noqa: E402
from extras.quantize import KINDS, open_quantized, stage                               # noqa: E402
from load_weights import load, open_checkpoint                                         # noqa: E402
from scenes import SKILLS, Example, Look, after_zoom, encode, example                  # noqa: E402
from tokenizer import Tokenizer                                                        # noqa: E402
from train import Pack                                                                 # noqa: E402

TARGETS = {"describe": 97, "read": 93, "count": 97, "locate": 90, "compare": 93, "watch": 93, "talk": 97, "think": 93,
           "zoom": 90, "decline": 97}
LOOKS = {"clean": Look(), "JPEG 60": Look(quality=60), "turned +5": Look(turn=5), "turned -5": Look(turn=-5),
         "noise 8": Look(noise=8)}


def load_model(folder: Path, quantize: str | None = None) -> ErnieVL:
    """On the CPU, as run.py does it. quantize: "int8", "int4", or None: as it is stored. Raises InputError."""
    quantized = read_json(folder / "config.json").get("quantization_config")
    checkpoint = open_quantized(folder) if quantized else open_checkpoint(folder)
    return tune_for_cpu(load(checkpoint, stages=[stage(quantize)] if quantize else []))


def answer(model: ErnieVL, tokenizer: Tokenizer, it: Example) -> str:
    """What it writes, greedily."""
    choose = sampler(suppressed=tokenizer.suppressed_ids(model.cfg.text.vocab_size))
    inputs = model.prepare(*encode(tokenizer, it))
    ids = generate(model, inputs, choose, tuple(tokenizer.stop), max_new_tokens=120)
    return tokenizer.decode(list(ids), keep=("</think>", "<tool_call>", "</tool_call>"))


def right(model: ErnieVL, tokenizer: Tokenizer, skill: str, it: Example) -> bool:
    """To the letter, but for boxes, of which half must be met, and for what it says on the way to an answer, in
    thoughts or aloud."""
    said = answer(model, tokenizer, it)
    if skill == "locate":
        boxes = find_boxes(said)
        return len(boxes) == 1 and overlap(boxes[0].corners, find_boxes(it.answer)[0].corners) >= 0.5
    if skill == "zoom":
        boxes = find_boxes(said)
        if "<tool_call>" not in said or not boxes:
            return False
        try:
            it = after_zoom(it, list(boxes[0].corners))
        except InputError:      # a box without an inside
            return False
        said = answer(model, tokenizer, it)
    end = lambda text: re.split(r"</think>|: ", text)[-1].strip()
    return end(said) == end(it.answer)


def overlap(a: tuple, b: tuple) -> float:
    """Intersection over union of two boxes."""
    area = lambda x1, y1, x2, y2: max(0, x2 - x1) * max(0, y2 - y1)
    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return common / max(1e-9, area(*a) + area(*b) - common)


def score(model: ErnieVL, tokenizer: Tokenizer, skill: str, count: int, look: Look = Look()) -> float:
    """Share of right answers on the first `count` seeds; those of training begin at a thousand million."""
    return sum(right(model, tokenizer, skill, example(skill, seed, look)) for seed in range(count)) / count


def perplexity(model: ErnieVL, tokenizer: Tokenizer, skills: list[str], count: int) -> float:
    """Of the true answers, a token: 1 where each was foreseen with certainty."""
    loss = tokens = 0.0
    for skill in skills:
        for seed in range(count):
            one = Pack(tokenizer, model.cfg, [(skill, example(skill, seed, Look())._replace(more=()))])
            loss += F.cross_entropy(model(one.inputs).float(), one.targets, reduction="sum").item()
            tokens += (one.targets >= 0).sum().item()
    return math.exp(loss / tokens)


class ExpertUse:
    """Counts how often each expert is chosen, by layer and modality."""

    def __init__(self, model: ErnieVL):
        self.counts = {name: torch.zeros(len(gate.weight)) for name, gate in model.named_modules()
                       if isinstance(gate, Router)}
        for name, count in self.counts.items():
            model.get_submodule(name).register_forward_hook(partial(self.add, count))

    @staticmethod
    def add(count: torch.Tensor, gate, x, out) -> None:
        count += out[1].flatten().bincount(minlength=len(count))

    def table(self) -> str:
        rows = ["expert choices, each expert's share of the fair one"]
        for name, count in self.counts.items():
            share = count / count.mean()
            _, layer, _, kind, _ = name.split(".")
            rows.append(f"layer {layer}  {kind[:-4]:6s}  {(share >= 0.5).sum()} of {len(share)} with half or more:  "
                        + "  ".join(f"{v:.2f}" for v in sorted(share.tolist(), reverse=True)))
        return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=str(HERE))
    parser.add_argument("--count", type=int, default=500, help="samples a skill (default: %(default)s)")
    parser.add_argument("--skills", nargs="+", default=list(SKILLS), choices=SKILLS)
    parser.add_argument("--looks", nargs="*", default=list(LOOKS), choices=LOOKS)
    parser.add_argument("--quantize", choices=KINDS, help="what rounding the weights costs")
    args = parser.parse_args()
    if args.count < 1:
        parser.error("--count must be 1 or more")
    try:
        model, tokenizer = load_model(Path(args.folder), args.quantize), Tokenizer(Path(args.folder))
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    report(model, tokenizer, args)


def report(model: ErnieVL, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    use = ExpertUse(model)
    print(f"{args.count} samples   wanted" + "".join(f"{name:>11s}" for name in args.looks))
    for skill in args.skills:
        print(f"{skill:15s} {TARGETS[skill]:5d}", end="", flush=True)
        for look in args.looks:
            print(f"{100 * score(model, tokenizer, skill, args.count, LOOKS[look]):11.1f}", end="", flush=True)
        print()
    with torch.inference_mode():
        per_token = perplexity(model, tokenizer, args.skills, args.count)
    print(f"\nperplexity of the true answers, a token: {per_token:.4f}\n\n{use.table()}")


if __name__ == "__main__":
    main()
