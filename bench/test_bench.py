"""The benchmark runs: on a small model, and against transformers where that is installed."""
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "reference"), str(ROOT / "bench")]

import bench                                                                                        # noqa: E402
from load_weights import read_config                                                                # noqa: E402
from small_model import Shapes                                                                      # noqa: E402

SMALL = Shapes(tie=True, layers=("dense", "sparse"), shared=1, experts=4, k=2, hidden=64, heads=2, kv_heads=1, dense=96,
               widths=(64, 32), vocab=256, vit_depth=1, vit_width=32, vit_heads=2, vit_mlp=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    bench.build(SMALL, folder)
    return folder


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_our_side_is_timed(folder, quantize):
    ours = bench.Ours.load(folder, torch.bfloat16, quantize)
    assert any(not parameter.is_floating_point() for parameter in ours.plain.parameters()) is bool(quantize)
    assert all(seconds > 0 for seconds in (ours.vit(), *ours.turn(3), ours.long(64, 2)))


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_random_weights_make_a_model_that_computes(quantize):
    model = bench.random_model(read_config(bench.config_of(SMALL)), "cpu", quantize)
    gate = model.layers[1].mlp.text_moe.gate
    assert model.lm_head.weight is model.embed_tokens.weight and gate.weight.dtype == torch.float32
    ids, patches = bench.prompt((1, 4, 6))
    with torch.inference_mode():
        assert model(model.prepare(ids, patches, [(1, 4, 6)])).isfinite().all()


def test_the_table_compares_with_the_fastest_transformers():
    measured = {"load, s": {"ours": [1.0, 3.0, 2.0], "theirs, eager, static": [8.0], "theirs, eager, dynamic": [4.0]}}
    assert bench.table(measured).splitlines()[-1] == "| load, s | 4, eager, dynamic | 2 (1 to 3) | 2.00 x |  |  |  |  |"


def test_both_sides_are_measured(folder, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed: the benchmark compares with it")
    monkeypatch.setattr(bench, "CONTEXT", 64)
    measured = bench.measure(folder, blocks=1, steps=2)
    assert len(measured) == 10      # twice for loading, four times in each of bf16 and fp32
    for what, sides in measured.items():
        assert "ours" in sides and any(side.startswith("theirs") for side in sides)
        assert all(math.isfinite(seconds) for values in sides.values() for seconds in values), what
        assert ("int4" in sides) is what.startswith("bf16")
