"""That the stored true values are true: python -m pytest -q reference/test_truth.py. The comparison of the model with them is
in test_ernie_vl.py."""
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import make_reference                                                     # noqa: E402
import run                                                                # noqa: E402
import small_model as ref                                                 # noqa: E402
from ernie_vl import generate                                             # noqa: E402
from load_weights import load                                             # noqa: E402
from mistakes import like                                                 # noqa: E402
from small_model import distance, prepared                                # noqa: E402
from stage_names import our_stages, stage_names                           # noqa: E402

torch.set_grad_enabled(False)
torch.set_num_threads(1)
VALUES, SOURCE = ref.true_values(), (HERE.parent / "ernie_vl.py").read_text(encoding="utf-8")
ISLANDS = ["widen(x).chunk", "widen(x).unflatten", "y = widen(x)", "F.linear(widen(x), widen(self.weight))", "(widen(like[:0]))"]


class Fp32Results(TorchDispatchMode):
    """Collects the sizes of what is computed in fp32 while it is active."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.sizes |= {x.numel() for x in tree_leaves(out) if isinstance(x, Tensor) and x.dtype == torch.float32}
        return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ref.write_checkpoint(ref.MODELS["28b"], tmp_path_factory.mktemp("28b"))


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, dtype=torch.float64)


def test_an_fp64_model_computes_its_rotary_frequencies_in_fp32_and_nothing_else(model):
    inputs = prepared(model, "mixed")
    with Fp32Results() as found:
        model(inputs)
    of_vision = ref.MODELS["28b"].vit_width // ref.MODELS["28b"].vit_heads // 4
    assert found.sizes == {64, of_vision} and {x.dtype for x in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("island", ISLANDS)
def test_an_island_that_stays_in_fp32_would_be_noticed(model, island):
    """More than by the greatest difference, which may be smaller than what the stored values have lost."""
    edited = like(model, SOURCE.replace(island, island.replace("widen(", "torch.Tensor.float(")))
    inputs = prepared(edited, "mixed")
    with Fp32Results() as found:
        logits = edited(inputs)
    assert SOURCE.count(island) == 1 and len(found.sizes) > 2 and distance(logits, model(inputs)) > 1e-9


def test_an_fp64_model_answers_and_its_logits_are_chosen_from_in_fp32(model, capsys):
    seen, inputs = [], prepared(model, "picture", "hf_5_23")
    ids = list(generate(model, inputs, lambda logits: seen.append(logits.dtype) or int(logits.argmax()), (), 32))
    assert ids == VALUES["28b.picture.greedy"].tolist() and set(seen) == {torch.float32}
    assert run.main(["--dtype", "float64", str(HERE.parent / "examples" / "shapes.png")]) == 0
    assert capsys.readouterr().out == "A purple circle on the left and a green triangle on the right.\n"


def test_stages_of_a_pass_have_their_names_in_order_and_leave_no_hooks(model):
    for prompt in ref.PROMPTS:
        inputs = prepared(model, prompt)
        stages = our_stages(model, inputs)
        assert list(stages) == stage_names(model, bool(inputs.grids)) and torch.equal(stages["logits"], model(inputs))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for part in ("probabilities", "weights"):      # both sum to 1, so no token is left out
        sums = [rows.sum(-1) for stage, rows in stages.items() if stage.endswith(part)]
        assert sums and all(distance(one, torch.ones_like(one)) < 1e-12 for one in sums)


def test_the_file_is_complete_and_small(model):
    assert (HERE / "reference.safetensors").stat().st_size <= 1_300_000
    for name, prompt in ((name, prompt) for name in ref.MODELS for prompt in ref.PROMPTS):
        stages, distances = ref.true_stages(name, prompt), ref.true_stages(name, prompt, ".rms")
        assert len(VALUES[f"{name}.{prompt}.greedy"]) == 32 and {"positions", "logits"} <= stages.keys()
        numbers = {stage for stage, x in stages.items() if x.is_floating_point() and stage != "patches"}
        assert numbers == distances.keys() and all(0 < fp32 < 1e-4 * bf16 for fp32, bf16 in distances.values())
    assert list(ref.true_stages("28b", "mixed")) == stage_names(model)


# ------------------------------------------------------------------------------ live, where transformers is installed
@pytest.fixture
def theirs():
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers==5.23.0")
    return make_reference


def test_an_fp64_run_of_transformers_computes_nothing_in_fp32(theirs, folder):
    wide, (ids, media) = theirs.their_model(folder, torch.float64), ref.prompt_ids("mixed")
    grids, patches = [ref.GRIDS[one] for one in media], [x.double() for x in ref.prompt_patches("mixed")]
    inputs, positions = theirs.their_inputs(ids, patches, grids), theirs.official_positions(ids, grids)
    with Fp32Results() as found:      # the positions are given, as it finds its own, which are whole numbers, in fp32
        logits = theirs.their_logits(wide, inputs, positions)
    assert found.sizes == set() and logits.dtype == torch.float64


def test_transformers_computes_the_stored_values(theirs, tmp_path):
    """To the last stored digit, in which processors may differ; distances are the making machine's."""
    computed = theirs.compute(tmp_path)
    assert computed.keys() == VALUES.keys()
    for name in (name for name in VALUES if not name.endswith(".rms")):
        furthest = VALUES[name].double().abs().max()
        assert computed[name].dtype == VALUES[name].dtype and distance(computed[name], VALUES[name]) <= 1.2e-7 * furthest, name
