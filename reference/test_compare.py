"""The comparison with other implementations: every known mistake is noticed and named, and what is right is called right."""
import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import compare                                                                                                     # noqa: E402
import mistakes                                                                                                    # noqa: E402
import run                                                                                                         # noqa: E402
import small_model as ref                                                                                          # noqa: E402
from load_weights import load                                                                                      # noqa: E402
from mistakes import MISTAKES, like, with_mistakes                                                                 # noqa: E402
from stage_names import our_stages                                                                                 # noqa: E402

torch.set_grad_enabled(False)
torch.set_num_threads(1)
TINY, EXAMPLE, SOURCE = HERE.parent / "tiny", str(HERE.parent / "examples" / "shapes.png"), compare.SOURCE
UNTIED = "the head is the embedding matrix though the model is not tied"      # the 28B's kind is tied
NAMED = list(MISTAKES)[::3]      # for the time it takes: that all of them are noticed, by stages, is tested in test_ernie_vl.py
EPSILONS = [name for name in MISTAKES if "Norms" in name and "epsilon" in name or "after_norm has" in name]
SAME = [  # by logits alone; of the first of them by all stages, too
    {"the router's bias is ignored", "the router's bias is added to the logits"},
    {"h and w are swapped in the decoder's rotary embedding", "positions are listed as time, column, row"},
    {"the router's bias is added to the logits before the softmax",
     "the router's bias is added to the logits and also weighs"},
    {"every token goes to the text experts", "no token is known to be of an image or a video"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ref.write_checkpoint(ref.MODELS["28b"], tmp_path_factory.mktemp("28b"))


@pytest.fixture(scope="module")
def bench(folder, tmp_path_factory):
    """What a search needs: in fp32, in fp64, and for the other kind of model; single mistakes are run once for
    all tests, and in the other model those of NAMED alone."""
    prompt, singles = compare.read_prompt({}, False), {}
    other = ref.write_checkpoint(ref.MODELS["424b"], tmp_path_factory.mktemp("424b"))
    cases = {"fp32": (folder, prompt, torch.float32, singles), "fp64": (folder, prompt, torch.float64, singles),
             "424b": (other, prompt._replace(known=False), torch.float32, dict.fromkeys(set(MISTAKES) - set(NAMED)))}
    return {case: (compare.precise_values(at, prompt, dtype)[0], load(at, dtype=dtype), known)
            for case, (at, prompt, dtype, known) in cases.items()}


def computed(case: tuple, *names: str) -> dict[str, torch.Tensor]:
    """The stages of an implementation with these mistakes."""
    precise, model, _ = case
    edited = like(model, with_mistakes(SOURCE, *names))
    return our_stages(edited, edited.prepare(*precise.prompt[:3]))


def named(case: tuple, given: dict[str, torch.Tensor]) -> list[set[str]] | None:
    """The mistakes, or pairs of them, that compare.py finds in these stages; None where it says that they are right."""
    precise, _, singles = case
    given = {stage: tensor for stage, tensor in given.items() if stage in precise.stages}
    theirs = compare.comparable(given, precise.model.cfg.text.moe_num_experts)
    limits = {stage: compare.tolerance(stage, precise.stages[stage], precise.rounding[stage], given[stage].dtype)
              for stage in theirs}
    if "WRONG" not in compare.verdicts(theirs, precise, limits).values():
        return None
    found, _ = compare.find_mistake(compare.Search(theirs, precise, limits, singles))
    return [{*planted.names} for planted in found]


# ------------------------------------------------------------------------------------------------- known mistakes
@pytest.mark.parametrize("mistake", NAMED)
def test_known_mistakes_are_noticed_and_named(bench, mistake):
    """From all stages, and from logits alone. Epsilons are below the rounding of fp32, so they are looked for in fp64."""
    case = bench["fp64" if mistake in EPSILONS else "424b" if mistake == UNTIED else "fp32"]
    stages = computed(case, mistake)
    for given in (stages, {"logits": stages["logits"]}):
        found = named(case, given)
        assert found is not None and {mistake} in found
        assert set().union(*found) <= next((same for same in SAME if mistake in same), {mistake})


@pytest.mark.parametrize("pair", [
    ("the bias of the ViT's qkv is missing", "start and end markers go to the text experts"),
    ("the ViT has SiLU instead of QuickGELU", "the router's bias also weighs"),
    ("the RMSNorms have the epsilon 1e-6", "one expert more is chosen"),
    ("odd and even frames are swapped", "keys are not rotated")])
def test_two_mistakes_at_once_are_named(bench, pair):
    assert named(bench["fp32"], computed(bench["fp32"], *pair)) == [{*pair}]


@pytest.mark.parametrize("share, words", [(0.9, "the closest, at"), (0.0, "begin at the first stage that is wrong")])
def test_the_closest_mistake_is_named_only_where_it_is_nearer(bench, monkeypatch, share, words):
    """A head without its last rows is no known mistake. With most of a known one beside it, that one is the closest."""
    precise, _, singles = bench["fp32"]
    monkeypatch.setattr(compare, "MOST_SECONDS", 0)
    known = computed(bench["fp32"], "attention scores are not divided by √d")["logits"].double()
    theirs = {"logits": precise.stages["logits"] + share * (known - precise.stages["logits"])}
    theirs["logits"][:, -9:] = 0
    limits = {"logits": 3 * precise.rounding["logits"]}
    line, = compare.sentences(compare.Search(theirs, precise, limits, singles))
    assert line.startswith("none of the known mistakes gives your numbers") and words in line
    assert ("an implementation in which" in line) == (share > 0)


def test_a_mistake_is_an_edit_of_one_place():
    with pytest.raises(ValueError, match="0 places"):
        mistakes.plant(SOURCE, "no such words", "")
    with pytest.raises(ValueError, match="places"):
        with_mistakes(SOURCE, "the router's bias is ignored", "the router's bias is ignored")
    assert len(MISTAKES) >= 45 and all(one.place.split(".")[-1] in SOURCE or one.place == "patchify" for one in MISTAKES.values())


# --------------------------------------------------------------------------------------------------- whole files
def write(path: Path, tensors: dict, dtype: str = "float32") -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"dtype": dtype})
    return path


def test_right_numbers_are_called_right(bench, folder, tmp_path, capsys):
    for dtype in ("float32", "bfloat16", "float64"):
        model = load(folder, dtype=getattr(torch, dtype))
        stages = our_stages(model, ref.prepared(model, "mixed"))
        assert compare.main([str(write(tmp_path / "x", stages, dtype))]) == 0
        assert compare.main([str(write(tmp_path / "x", {"logits": stages["logits"].float()}, dtype))]) == 0
    assert "right" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--dtype", "bfloat16"]])
def test_saved_stages_of_any_checkpoint_and_prompt_are_right(flags, tmp_path, capsys):
    path = tmp_path / "saved"
    assert run.main(["--image", EXAMPLE, "Hi", "--save-logits", str(path), "--stages", *flags]) == 0
    assert {"ids", "patches", "grids", "vit", "positions", "layer.1.router.chosen", "norm", "logits"} <= load_file(path).keys()
    assert compare.main([str(path), "--model", str(TINY)]) == 0
    assert run.main(["Hi", "--save-logits", str(path), "--stages", *flags]) == 0      # and of text alone
    assert compare.main([str(path), "--model", str(TINY)]) == 0 and "vit" not in load_file(path)


def test_the_first_wrong_stage_and_the_mistake_are_printed(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "Search", functools.partial(compare.Search, singles=bench["fp32"][2]))
    stages = computed(bench["fp32"], "the router's bias also weighs")
    assert compare.main([str(write(tmp_path / "x", stages))]) == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if " WRONG " in line]
    assert len(wrong) == 1 and wrong[0].startswith("layer.1.router.weights") and " at [" in wrong[0]
    assert "the router's bias also weighs; see `Router` in ernie_vl.py" in lines[-1]


def test_the_fixture_is_a_checkpoint_and_a_prompt(tmp_path, capsys):
    assert compare.main(["--fixture", str(tmp_path)]) == 0
    prompt, model = load_file(tmp_path / "prompt.safetensors"), load(tmp_path / "model")
    logits = model(model.prepare(prompt["ids"].tolist(), prompt["patches"], prompt["grids"].tolist()))
    assert compare.main([str(write(tmp_path / "x", prompt | {"logits": logits}))]) == 0
    assert compare.main([str(write(tmp_path / "x", {"logits": logits}))]) == 0


@pytest.mark.parametrize("change, words", [
    (lambda x: x.update(logits=x["logits"][:-1]), "another prompt"), (lambda x: x.pop("logits"), "no stage"),
    (lambda x: x["logits"].fill_(torch.nan), "NaN"), (lambda x: x.update(logit=x["logits"].clone()), "logit is no stage"),
    (lambda x: x.update(ids=torch.tensor([3, 4])), "grids|shape"), (lambda x: x.update(grids=torch.tensor([[1, 2, 2]])), "ids"),
    (lambda x: x.update({"layer.1.router.chosen": torch.full((48, 3), 12)}), "shape|0..11")])
def test_what_cannot_be_compared_is_refused_in_one_sentence(bench, change, words, tmp_path, capsys):
    tensors = {"logits": computed(bench["fp32"])["logits"].clone()}
    change(tensors)
    code = compare.main([str(write(tmp_path / "x", tensors))])
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and re.search(words, err)


def test_files_that_are_none_are_refused(tmp_path, capsys):
    (tmp_path / "x").write_text("no tensors")
    write(tmp_path / "y", {"logits": torch.ones(2, 2)}, "int3")
    for args, words in (([str(tmp_path / "x")], "safetensors"), ([str(tmp_path / "none")], "missing"), ([], "THEIRS"),
                        ([str(tmp_path / "y")], "int3"), ([str(tmp_path / "y"), "--model", "no/such"], "no/such")):
        assert compare.main(args) == 2
        assert words in capsys.readouterr().err
