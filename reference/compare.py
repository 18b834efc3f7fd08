"""Compares the numbers of another implementation with the true ones, stage by stage, and names the mistake.

    python reference/compare.py THEIRS.safetensors                   computed with the reference's own model and prompt
    python reference/compare.py THEIRS.safetensors --model FOLDER    with a checkpoint, and a prompt that the file holds
    python reference/compare.py --fixture FOLDER                     writes the reference's model and prompt into FOLDER

What the file holds is described in reference/README.md. Exit code 0: right, within 3 times the rounding of transformers
in the same precision; 1: wrong; 2: the file cannot be compared.
"""
import argparse
import contextlib
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from ernie_vl import ErnieVL, InputError, Inputs, require                                         # noqa: E402
from load_weights import find_folder, load                                                       # noqa: E402
from mistakes import MISTAKES, like, with_mistakes                                               # noqa: E402
from small_model import GRIDS, MODELS, prompt_ids, prompt_patches, true_values, write_checkpoint  # noqa: E402
from stage_names import our_stages, stage_names                                                  # noqa: E402

RIGHT = 3.0                                  # times the rounding of transformers
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODEL, PROMPT = "28b", "mixed"               # the reference's own, of which reference.safetensors has all stages
EXACT = "positions", "is_vision"             # stages of whole numbers
PROMPT_TENSORS = "ids", "patches", "grids"
MOST_PAIRS, MOST_SECONDS = 400, 25           # that the search for two mistakes at once tries, and takes
KNOWN = (torch.float32, torch.bfloat16)      # dtypes in which reference.safetensors has transformers' rounding
COARSE = (torch.bfloat16, torch.float16)
BY_EXPERT = ".chosen", ".weights"            # stages that `comparable` brings into another form
SOURCE = (HERE.parent / "ernie_vl.py").read_text(encoding="utf-8")


class Prompt(NamedTuple):
    ids: list[int]
    patches: Tensor | None
    grids: list[tuple]
    known: bool                              # the reference's own: then transformers' rounding is known, too


class Precise(NamedTuple):
    """What a file is compared with: true values by stage, and how far a right implementation may be from them."""
    model: ErnieVL                           # in fp64
    prompt: Prompt
    stages: dict[str, Tensor]
    rounding: dict[str, float]
    dtype: torch.dtype                       # that the other implementation computed in


# ------------------------------------------------------------------------------------------------- what is given
def read_tensors(path: Path) -> tuple[dict[str, Tensor], torch.dtype]:
    """(the tensors of a file, the dtype that they were computed in)"""
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is missing or no safetensors file ({error})") from None
    name = metadata.get("dtype", "float32").removeprefix("torch.")
    require(name in DTYPES, f"the metadata of {path} says dtype {name!r}, and must say one of {', '.join(DTYPES)}")
    for at, tensor in tensors.items():
        require(bool(tensor.double().isfinite().all()), f"{at} holds numbers that are not finite (NaN or infinite)")
    return tensors, DTYPES[name]


def read_prompt(tensors: dict[str, Tensor], has_model: bool) -> Prompt:
    """The prompt that the tensors belong to: their own or, without a model and ids, the reference's."""
    own, media = prompt_ids(PROMPT)
    patches, grids = torch.cat(prompt_patches(PROMPT)), [GRIDS[medium] for medium in media]
    ids = tensors["ids"].flatten().tolist() if "ids" in tensors else None
    given = [tuple(grid) for grid in tensors["grids"].view(-1, 3).tolist()] if "grids" in tensors else None
    if not has_model and ids in (None, own) and given in (None, grids):
        theirs = tensors.get("patches")
        same = theirs is not None and theirs.shape == patches.shape and rms(theirs, patches) < 1e-5
        return Prompt(own, theirs.float() if same else patches, grids, True)
    require(ids is not None, "the file holds no ids: with --model, or with grids of its own, they are needed")
    require("patches" not in tensors or given is not None, "the file holds patches and no grids")
    return Prompt(ids, tensors["patches"].float() if given else None, given or [], False)


def check_tensors(theirs: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Raises InputError unless every tensor is a stage of its shape. As many experts may be chosen as they like."""
    require(bool(theirs), "the file holds no stage: it needs at least logits")
    for stage, tensor in theirs.items():
        require(stage in truth, f"{stage} is no stage of this model and prompt: reference/README.md lists them")
        shape, found = tuple(truth[stage].shape), tuple(tensor.shape)
        free = stage.endswith((".chosen", ".weights")) and len(found) == 2 and found[0] == shape[0]
        require(free or found == shape, f"{stage} has the shape {found} and must have {shape}: "
                                        "is it another prompt or another model?")


# ---------------------------------------------------------------------------------------------------- distances
def rms(a: Tensor, b: Tensor | float = 0.0) -> float:
    return float((a.double() - b).square().mean().sqrt()) if a.numel() else 0.0


def comparable(stages: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """The same stages in fp64, with what was chosen, and with which weights, as one column for each expert: then the
    order in which a router lists the chosen ones does not matter."""
    out = {stage: tensor.double() for stage, tensor in stages.items()}
    for stage in [stage for stage in stages if stage.endswith(".chosen")]:
        chosen = stages[stage].long()
        require(0 <= chosen.min() and chosen.max() < experts, f"{stage} must lie in 0..{experts - 1}: the experts of a "
                                                              "modality are counted from 0")
        empty, at = torch.zeros(len(chosen), experts, dtype=torch.float64), stage.replace("chosen", "weights")
        out[stage] = empty.scatter(1, chosen, 1.0)
        if at in stages and stages[at].shape == chosen.shape:
            out[at] = empty.scatter(1, chosen, stages[at].double())
    return out


def measure_rounding(truth: dict, ours: dict, known: bool, dtype: torch.dtype) -> dict[str, float]:
    """By stage, the rms distance of transformers from the truth in this precision, or where that is not known, ours."""
    values, column = true_values(), KNOWN.index(dtype) if dtype in KNOWN else None
    out = {}
    for stage, tensor in truth.items():
        stored = values.get(f"{MODEL}.{PROMPT}.{stage}.rms")
        use_theirs = known and column is not None and stored is not None and not stage.endswith(BY_EXPERT)
        out[stage] = float(stored[column]) if use_theirs else rms(ours[stage], tensor)
    return out


def tolerance(stage: str, truth: Tensor, rounding: float, stored: torch.dtype) -> float:
    """The rms distance from the truth that is right. Storing the numbers rounds them once more."""
    if stage in EXACT:
        return 0.0
    last_digit = torch.finfo(stored).eps if stored.is_floating_point else 0.0
    return RIGHT * max(rounding, rms(truth) * max(last_digit / 3, 2.0**-44), 1e-6 * (stage == "patches"))


# --------------------------------------------------------------------------------------------------- the mistakes
class Planted(NamedTuple):
    """What an implementation with these mistakes computes, and how far it is from the other one by stage."""
    names: tuple[str, ...]
    stages: dict[str, Tensor]
    distances: dict[str, float]


def share_limits(limits: dict[str, float]) -> dict[str, float]:
    """In bf16 it is luck in which layer a close choice of experts falls otherwise: all layers get the largest limit."""
    most = {kind: max((limit for stage, limit in limits.items() if stage.endswith(kind)), default=0.0)
            for kind in BY_EXPERT}
    return {stage: most.get(f".{stage.rpartition('.')[2]}", limit) for stage, limit in limits.items()}


class Search:
    """Plants mistakes in ernie_vl.py, first each alone and then two at a time, and runs the prompt through them."""

    def __init__(self, theirs: dict, precise: Precise, limits: dict[str, float], singles: dict | None = None):
        """singles: the stages by mistake, where another search in the same model and prompt has them already."""
        self.precise, self.known = precise, {} if singles is None else singles
        self.limits = limits if precise.dtype not in COARSE else share_limits(limits)
        self.theirs = {stage: tensor for stage, tensor in theirs.items() if stage != "patches"}
        self.truth = self.measure((), precise.stages)
        self.wrong = self.first_wrong(self.truth)

    def measure(self, names: tuple[str, ...], stages: dict[str, Tensor]) -> Planted:
        distances = {stage: rms(stages[stage], tensor) for stage, tensor in self.theirs.items()
                     if stage in stages and stages[stage].shape == tensor.shape}
        return Planted(names, stages, distances)

    def run(self, *names: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor] | None:
        """None where the mistakes cannot be made together, or not in this model."""
        model, (ids, patches, grids, _) = self.precise.model, self.precise.prompt
        with contextlib.suppress(RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError):
            edited = like(model, with_mistakes(SOURCE, *names)).to(dtype)
            stages = our_stages(edited, edited.prepare(ids, patches, grids))
            return comparable(stages, max(1, model.cfg.text.moe_num_experts))
        return None

    def plant(self, *names: str) -> Planted | None:
        stages = self.run(*names)
        return stages and self.measure(names, stages)

    def first_wrong(self, planted: Planted) -> int:
        """Position of the first of their stages that these mistakes do not reproduce, or how many there are."""
        for number, stage in enumerate(self.theirs):
            if stage not in planted.distances or planted.distances[stage] > self.limit(stage, planted):
                return number
        return len(self.theirs)

    def limit(self, stage: str, planted: Planted) -> float:
        """Numbers that a mistake has made larger are rounded more coarsely."""
        return self.limits[stage] * max(1.0, rms(planted.stages[stage]) / max(rms(self.precise.stages[stage]), 1e-30))

    def reproduces(self, planted: Planted) -> bool:
        """Within the rounding of an implementation with these mistakes, which can be larger than a right one's."""
        if self.first_wrong(planted) == len(self.theirs):
            return True
        near = all(distance <= 0.05 * self.truth.distances[stage] + self.limits[stage]
                   for stage, distance in planted.distances.items())
        near = near and planted.distances.keys() == self.theirs.keys()
        rough = self.run(*planted.names, dtype=self.precise.dtype) if near else None
        return rough is not None and all(
            distance <= max(self.limit(stage, planted), RIGHT * rms(rough[stage], planted.stages[stage]))
            for stage, distance in planted.distances.items() if stage in rough)

    def order(self, planted: Planted) -> tuple:
        """The later the first stage that is not reproduced, and the nearer that is, the better."""
        number = self.first_wrong(planted)
        stage = list(self.theirs)[min(number, len(self.theirs) - 1)]
        return -number, planted.distances.get(stage, math.inf)

    def singles(self) -> list[Planted]:
        """All mistakes that change something here, the nearest first."""
        for name in MISTAKES:
            if name not in self.known:
                self.known[name] = self.run(name)
        planted = [self.measure((name,), stages) for name, stages in self.known.items() if stages]
        return sorted((one for one in planted if self.effect(one) < len(self.theirs)), key=self.order)

    def alone(self) -> bool:
        """Whether one stage is wrong and none behind it."""
        wrong = [stage for stage, distance in self.truth.distances.items() if distance > self.limits[stage]]
        return len(wrong) == 1 and wrong != list(self.theirs)[-1:]

    def effect(self, planted: Planted) -> int:
        """Position of the first of their stages that a mistake changes."""
        for number, stage in enumerate(self.theirs):
            found, true = planted.stages.get(stage), self.precise.stages[stage]
            if found is None or found.shape != true.shape or rms(found, true) > self.limits[stage] / 30:
                return number
        return len(self.theirs)

    def pairs(self, singles: list[Planted]) -> list[tuple[str, str]]:
        """Two mistakes that may explain the difference together, the likeliest first: one that explains the first wrong
        stage and another that begins where it ends; two of the first wrong stage whose changes add up to theirs; the
        nearest ones with each other one."""
        begins = {one.names: self.effect(one) for one in singles}
        ahead = [one for one in singles if self.first_wrong(one) > self.wrong]
        out = [one.names + other.names for one in ahead[:8] for other in singles
               if begins[other.names] == self.first_wrong(one)]
        here = [one for one in singles if begins[one.names] == self.wrong]
        near = [one.names + other.names for one in here[:2] for other in singles if begins[other.names] >= self.wrong]
        out = [*out[:MOST_PAIRS // 2], *self.sums(here)[:MOST_PAIRS // 4], *near]
        return list({frozenset(pair): pair for pair in reversed(out) if len({*pair}) == 2}.values())[::-1][:MOST_PAIRS]

    def sums(self, here: list[Planted]) -> list[tuple[str, str]]:
        """Pairs by how near the sum of their changes is to the difference that is to be explained."""
        stage = list(self.theirs)[self.wrong]
        true, here = self.precise.stages[stage], [one for one in here if stage in one.distances]
        changes = torch.stack([(one.stages[stage] - true).flatten() for one in here] or [true.flatten()])
        rest = (self.theirs[stage] - true).flatten()
        gram, along = changes @ changes.T, changes @ rest
        cost = (gram.diag() - 2 * along)[:, None] + (gram.diag() - 2 * along) + 2 * gram
        ranked = sorted((float(cost[i, j]), i, j) for i in range(len(here)) for j in range(i))
        return [here[i].names + here[j].names for _, i, j in ranked]


def find_mistake(search: Search) -> tuple[list[Planted], Planted | None]:
    """(all mistakes, or pairs of them, that give their numbers; the nearest, which may not)"""
    singles = search.singles()
    found = [one for one in singles[:12] if search.reproduces(one)]
    if found or not singles:
        return found, next(iter(singles), None)
    nearest, start = singles[0], time.monotonic()
    for names in search.pairs(singles):
        if time.monotonic() - start > MOST_SECONDS:
            break
        planted = search.plant(*names)
        if planted and search.reproduces(planted):
            return [planted], planted
        nearest = min(filter(None, (nearest, planted)), key=search.order)
    return [], nearest


# ------------------------------------------------------------------------------------------------------ the report
def describe(names: tuple[str, ...]) -> str:
    places = dict.fromkeys(MISTAKES[name].place for name in names)
    look = [f"`{place}` in {'tokenizer' if place == 'patchify' else 'ernie_vl'}.py" for place in places]
    return f"{', and '.join(names)}; see {' and '.join(look)}"


def stage_line(stage: str, theirs: Tensor, true: Tensor, rounding: float, verdict: str) -> str:
    line = f"{stage:28s} {verdict:6s} {rms(theirs, true):.1e}  {rounding:.1e}"
    if verdict == "WRONG":
        apart = (theirs - true).abs()
        index = [int(i) for i in torch.unravel_index(apart.argmax(), apart.shape)]
        line += f"  by {apart.max():.1e} at {index}: {theirs[*index]:.6g} instead of {true[*index]:.6g}"
    return line


def verdicts(theirs: dict[str, Tensor], precise: Precise, limits: dict[str, float]) -> dict[str, str]:
    """`ok`, `WRONG` for the first stage that is not, and `after` for those behind it."""
    out = {}
    for stage, tensor in theirs.items():
        true = precise.stages[stage]
        right = tensor.shape == true.shape and rms(tensor, true) <= limits[stage]
        out[stage] = "ok" if right else "after" if "WRONG" in out.values() else "WRONG"
    return out


def sentences(search: Search) -> list[str]:
    """What an implementation does that has these numbers."""
    found, nearest = find_mistake(search)
    last = list(search.theirs)[-1]
    if found:
        names = [describe(planted.names) for planted in found]
        distance = min(planted.distances.get(last, math.inf) for planted in found)
        return [f"your numbers equal, to {distance:.0e}, those of an implementation in which {names[0]}",
                *(f"or in which {name}: here both give the same" for name in names[1:])]
    if search.alone():
        return ["the stages behind it are right: this one is stored in another way than reference/README.md says"]
    if nearest is None:
        return ["none of the known mistakes changes these stages"]
    apart, right = nearest.distances.get(last, math.inf), search.truth.distances.get(last, math.inf)
    unknown = "none of the known mistakes gives your numbers, and no two of them that were tried"
    if apart > right / 2:
        return [f"{unknown}: begin at the first stage that is wrong"]
    return [f"{unknown}; the closest, at {apart:.1e} in {last}, where ours is at {right:.1e}, "
            f"is an implementation in which {describe(nearest.names)}"]


# ------------------------------------------------------------------------------------------------------------ main
def precise_values(folder: Path, prompt: Prompt, dtype: torch.dtype) -> tuple[Precise, dict[str, Tensor]]:
    """(true values, the same as the model gives them, with their dtypes)"""
    model, rough = load(folder, dtype=torch.float64), load(folder, dtype=dtype)
    experts = max(1, model.cfg.text.moe_num_experts)
    raw = our_stages(model, model.prepare(prompt.ids, prompt.patches, prompt.grids))
    ours = our_stages(rough, rough.prepare(prompt.ids, prompt.patches, prompt.grids))
    truth = comparable(raw, experts)
    rounding = measure_rounding(truth, comparable(ours, experts), prompt.known, dtype)
    return Precise(model, prompt, truth, rounding, dtype), raw


def compare(path: Path, folder: Path | None, log: Callable[[str], None] = print) -> int:
    tensors, dtype = read_tensors(path)
    prompt = read_prompt(tensors, folder is not None)
    with tempfile.TemporaryDirectory() as made:
        folder = folder or write_checkpoint(MODELS[MODEL], Path(made))
        precise, raw = precise_values(folder, prompt, dtype)
    given = {stage: tensors[stage] for stage in raw if stage in tensors and (stage != "patches" or prompt.known)}
    check_tensors({name: tensor for name, tensor in tensors.items() if name not in PROMPT_TENSORS} | given, raw)
    theirs = comparable(given, max(1, precise.model.cfg.text.moe_num_experts))
    limits = {stage: tolerance(stage, precise.stages[stage], precise.rounding[stage], given[stage].dtype)
              for stage in theirs}
    whose = "transformers" if prompt.known and dtype in KNOWN else "ernie_vl.py"
    log(f"distances from the truth (rms): yours, and that of {whose} in {str(dtype).removeprefix('torch.')}")
    words = verdicts(theirs, precise, limits)
    for stage, word in words.items():
        log(stage_line(stage, theirs[stage], precise.stages[stage], precise.rounding[stage], word))
    if "WRONG" not in words.values():
        log("right: no stage is further from the truth than rounding explains")
        return 0
    for sentence in sentences(Search(theirs, precise, limits)):
        log(sentence)
    return 1


def write_fixture(folder: Path) -> None:
    """The reference's model as a checkpoint in FOLDER/model, and its prompt as FOLDER/prompt.safetensors."""
    ids, media = prompt_ids(PROMPT)
    write_checkpoint(MODELS[MODEL], folder / "model")
    grids = torch.tensor([GRIDS[medium] for medium in media])
    save_file({"ids": torch.tensor(ids), "patches": torch.cat(prompt_patches(PROMPT)), "grids": grids},
              folder / "prompt.safetensors")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("theirs", nargs="?", type=Path, metavar="THEIRS.safetensors")
    parser.add_argument("--model", metavar="FOLDER", help="a checkpoint (default: the reference's own model)")
    parser.add_argument("--fixture", metavar="FOLDER", type=Path, help="write the reference's model and prompt here")
    args = parser.parse_args(argv)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)                 # these models are too small for more
    try:
        if args.fixture:
            write_fixture(args.fixture)
        require(args.theirs or args.fixture, "nothing to compare: give THEIRS.safetensors")
        return compare(args.theirs, args.model and find_folder(args.model)) if args.theirs else 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
