"""What is claimed of the core, as tests: python -m pytest -q test_ernie_vl.py. No network, no GPU, no transformers: what
transformers computes lies in reference/reference.safetensors. Where transformers is installed, it is compared live."""
import copy
import inspect
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "reference")]

import ernie_vl                                                                                                   # noqa: E402
import fixtures                                                                                                   # noqa: E402
import load_weights                                                                                               # noqa: E402
import mistakes                                                                                                   # noqa: E402
import run                                                                                                        # noqa: E402
import shape_comments                                                                                             # noqa: E402
import small_model as ref                                                                                         # noqa: E402
import structure                                                                                                  # noqa: E402
from ernie_vl import (InputError, RMSNorm, Router, attend, generate, inv_freq, patch_coordinates, pieces,         # noqa: E402
                      rotary, rotate_halves, rotate_pairs, sampler, token_grid, token_positions)
from load_weights import load, read_config                                                                        # noqa: E402
from fixtures import ABSENT                                                                                       # noqa: E402
from small_model import answer, between, distance, new_cache, prepared, watch                                     # noqa: E402
from stage_names import our_stages                                                                                # noqa: E402
from tokenizer import (TEMPLATES, Control, ReplyParser, Stream, Tokenizer, chat_template, encode_chat, fit_size,  # noqa: E402
                       load_image, make_media, patchify, pixel_budget, read_image, render)

torch.set_grad_enabled(False)
torch.set_num_threads(1)      # the small model is 30 times slower when two threads wait for each other
TINY, EXAMPLE = HERE / "tiny", str(HERE / "examples" / "shapes.png")
REFERENCE, SMALL, SOURCE = ref.true_values(), ref.MODELS["28b"], (HERE / "ernie_vl.py").read_text(encoding="utf-8")
GOLDEN = "A purple circle on the left and a green triangle on the right."
RULES = [(prompt, "official") for prompt in ref.PROMPTS] + [("clip", "hf_5_23"), ("mixed", "hf_5_23")]      # equal otherwise
LIMITS = {"patches": 1e-6, "other grids": 0, "fp64": 1e-11, "other greedy answers": 0, "fp32": 1.15, "bf16": 1.2}
ROWS, SIX, SECOND = torch.zeros(24, 588), [12, *[10] * 6, 13], "model-00002-of-00003.safetensors"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {name: ref.write_checkpoint(shapes, tmp_path_factory.mktemp(name)) for name, shapes in ref.MODELS.items()}


@pytest.fixture(scope="session")
def models(folders):
    return {name: load(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def models_in(folders):
    return {dtype: {name: load(folder, dtype=dtype) for name, folder in folders.items()}
            for dtype in (torch.float64, torch.float32, torch.bfloat16)}


@pytest.fixture
def model(models):
    return models["28b"]


# ------------------------------------------------------------------------------- 1. the same numbers as transformers
@pytest.mark.parametrize("prompt, rule", RULES)
@pytest.mark.parametrize("name", ref.MODELS)
def test_positions_and_logits_are_the_true_ones(models_in, name, prompt, rule):
    """In fp64 to the last stored digit; in fp32 and bf16 within three times transformers' distance, on any processor."""
    end, (wide, *others) = "" if rule == "official" else f".{rule}", (models[name] for models in models_in.values())
    inputs = prepared(wide, prompt, rule)
    truth, theirs = (REFERENCE[f"{name}.{prompt}.logits{end}{what}"] for what in ("", ".rms"))
    assert inputs.positions.tolist() == REFERENCE[f"{name}.{prompt}.positions{end}"].tolist()
    assert ref.is_true(wide(inputs), truth)
    assert all(ref.rms(model(inputs), truth) < 3 * limit for model, limit in zip(others, theirs))


@pytest.mark.parametrize("prompt", ref.PROMPTS)
@pytest.mark.parametrize("name", ref.MODELS)
def test_32_greedy_tokens_equal_transformers(models, name, prompt):
    ids = list(generate(models[name], prepared(models[name], prompt, "hf_5_23"), stop=(), max_new_tokens=32))
    assert ids == REFERENCE[f"{name}.{prompt}.greedy"].tolist()


@pytest.mark.parametrize("name", ref.MODELS)
def test_every_stage_is_the_true_one(models_in, name):
    """Also which experts are chosen, exactly. A whole-model test alone would not say where a difference comes from."""
    wide, usual, _ = (our_stages(models[name], prepared(models[name], "mixed")) for models in models_in.values())
    truth, theirs = ref.true_stages(name, "mixed"), ref.true_stages(name, "mixed", ".rms")
    assert list(wide) == list(usual) == list(truth)
    for stage, tensor in truth.items():
        assert ref.is_true(wide[stage], tensor), stage
        assert ref.rms(usual[stage], tensor) <= 3 * theirs.get(stage, [0])[0], stage      # whole numbers have no distance


# --------------------------------------------------------------------------- 2. live, where transformers is installed
@pytest.mark.parametrize("what", ["patches", "tiny", "models"])
def test_transformers_computes_the_same(tmp_path, what):
    """Patches of 12 sizes; of tiny/, and of five random models, every stage in fp64, and in fp32 and bf16 no larger an error."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers==5.23.0 to compare live")
    import make_reference as theirs
    found = theirs.compare_models(tmp_path) if what == "models" else {what: getattr(theirs, f"compare_{what}")()}
    assert all(value <= LIMITS[name] for one in found.values() for name, value in one.items()), found
    assert what != "models" or all(np.median([one[name] for one in found.values()]) <= 1.05 for name in ("fp32", "bf16")), found


@pytest.mark.parametrize("mistake", mistakes.MISTAKES)
def test_known_mistakes_would_be_noticed(models_in, mistake):
    """With an edit of ernie_vl.py some stage of the reference prompt, on one of the models, must not be the true one."""
    def noticed(name, model):
        edited = mistakes.like(model, mistakes.with_mistakes(SOURCE, mistake))
        found, truth = our_stages(edited, prepared(edited, "mixed")), ref.true_stages(name, "mixed")
        return found.keys() != truth.keys() or not all(ref.is_true(found[stage], truth[stage]) for stage in truth)
    assert any(noticed(name, model) for name, model in models_in[torch.float64].items())


# --------------------------------------------------------------------------------------------- 3. worked examples
@pytest.mark.parametrize("ids, grids, rule, expected", [
    ([1, 2, 3, 12, *[10] * 6, 13, 4, 5], [(1, 4, 6)], "official",
     ("0 1 2 3 4 4 4 4 4 4 7 8 9", "0 1 2 3 4 4 4 5 5 5 7 8 9", "0 1 2 3 4 5 6 4 5 6 7 8 9")),
    ([1, 14, *[11] * 16, 15, 2, 3], [(8, 4, 4)], "official",
     ("0 1 2 2 2 2 3 3 3 3 4 4 4 4 5 5 5 5 6 7 8", "0 1" + " 2 2 3 3" * 4 + " 6 7 8", "0 1" + " 2 3 2 3" * 4 + " 6 7 8")),
    ([1, 14, *[11] * 16, 15, 2, 3], [(8, 4, 4)], "hf_5_23",
     ("0 1 2 2 2 2 3 3 3 3 4 4 4 4 5 5 5 5 4 5 6", "0 1" + " 2 2 3 3" * 4 + " 4 5 6", "0 1" + " 2 3 2 3" * 4 + " 4 5 6")),
    ([1, 2, 12, *[10] * 4, 13, 3, 12, *[10] * 4, 13, 4], [(1, 4, 4), (1, 2, 8)], "official",
     ("0 1 2 3 3 3 3 5 6 7 8 8 8 8 12 13", "0 1 2 3 3 4 4 5 6 7 8 8 8 8 12 13", "0 1 2 3 4 3 4 5 6 7 8 9 10 11 12 13"))])
def test_positions_of_worked_examples(model, ids, grids, rule, expected):
    inputs = model.prepare(ids, torch.zeros(sum(map(math.prod, grids)), 588), grids)
    assert torch.equal(inputs.positions, token_positions(inputs.ids, grids, model.cfg))
    axes = (ref.hf_positions(inputs, model.cfg) if rule == "hf_5_23" else inputs).positions.tolist()
    assert [" ".join(map(str, axis)) for axis in axes] == list(expected)


def test_rotary_frequencies_are_the_fp32_ones_of_training_and_follow_their_axes(model):
    """The fast pairs alternate h, w, and the slow ones follow time."""
    found, precise = inv_freq(64, 500_000.0, ROWS), 1 / 500_000 ** (torch.arange(64, dtype=torch.float64) / 64)
    assert found[[0, 1, 20, 43, 63]].tolist() == pytest.approx([1, 0.81461722, 0.01656044, 1.48253355e-4, 2.4551407e-6], rel=1e-6)
    assert torch.equal(found, 1 / 500_000.0 ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128))
    assert (100_000 * (found.double() - precise)).abs().max() > 1e-3                   # why float64 would be wrong here
    assert inv_freq(20, 10_000.0, ROWS)[[0, 1, 19]].tolist() == pytest.approx([1, 0.630957305, 1.584893325e-4], rel=1e-6)
    cos, sin = rotary(torch.tensor([[7, 1, 0, 0, 100_000], [11, 0, 1, 0, 100_000], [13, 0, 0, 1, 100_000]]), model.cfg.text, ROWS)
    anchors = {0: 11.0, 1: 10.59002399, 2: 7.29961395, 43: 0.00192729, 44: 0.00084539, 63: 1.7186e-5}
    assert sin[0, 0, list(anchors)].tolist() == pytest.approx([math.sin(angle) for angle in anchors.values()], rel=1e-4)
    moved = [row.nonzero().flatten().tolist() for row in sin[1:4, 0]]                  # by t alone, h alone, w alone
    assert moved == [list(range(44, 64)), list(range(0, 44, 2)), list(range(1, 44, 2))] and cos.shape == (5, 1, 64)
    far = 100_000 * precise                                                            # of text, late in a long context
    assert distance(sin[4, 0], far.sin()) < 1e-2 and distance(cos[4, 0], far.cos()) < 1e-2


def test_small_parts_by_hand():
    e0, angle = torch.eye(8)[:1, None], torch.tensor([[[0.3, 0, 0, 0]]])               # (T, H, d) with channel 0 alone
    for rotate, pair in ((rotate_pairs, [0, 1]), (rotate_halves, [0, 4])):             # decoder: neighbours; ViT: halves
        out = rotate(e0, angle.cos(), angle.sin()).flatten()
        assert distance(out[pair], torch.tensor([math.cos(0.3), math.sin(0.3)])) < 1e-6 and out.count_nonzero() == 2
    v = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 5, 4)                        # key head 0 says 0, key head 1 says 1
    for tokens in (1, 3, 5):                                                           # one token, a chunk, a whole prompt
        assert attend(torch.randn(4, tokens, 4), torch.randn(2, 5, 4), v)[:, 0, 0].tolist() == pytest.approx([0, 0, 1, 1])
    assert patch_coordinates(4, 6)[:9].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3], [0, 4]]
    assert sorted(patch_coordinates(4, 6).tolist()) == [[r, c] for r in range(4) for c in range(6)]
    for scores, bias, chosen, weights in (([1.0, 2, 3, 4], [0.5, 0, 0, 0], [3, 0], [0.95257413, 0.04742587]),
                                          ([0.0, -200, -200, 0], [0.0, 9, 9, 0], [1, 2], [0, 0])):      # a share of 0, not 0 / 0
        router = Router(SimpleNamespace(moe_k=2, moe_num_experts=4, hidden_size=1))      # the bias chooses and does not weigh
        router.load_state_dict({"weight": torch.tensor(scores)[:, None], "e_score_correction_bias": torch.tensor(bias)})
        found = router(torch.ones(1, 1))
        assert found[1].tolist() == [chosen] and found[0][0].tolist() == pytest.approx(weights, abs=1e-6)
    mlp = ernie_vl.VisionMLP(SimpleNamespace(hidden_size=1, intermediate_size=1))      # QuickGELU
    mlp.load_state_dict({name: torch.full_like(x, "weight" in name) for name, x in mlp.state_dict().items()})
    assert mlp(torch.tensor([[1.0], [-1.0], [3.0]])).flatten().tolist() == pytest.approx([0.84579575, -0.15420423, 2.98192883])


def test_each_modality_has_its_own_experts_and_correction_bias(model):
    other, text, mixed = copy.deepcopy(model), prepared(model, "text"), prepared(model, "mixed")
    for parameter in [x for layer in other.layers[1:] for x in layer.mlp.vision_moe.parameters()]:
        parameter.mul_(-2)
    assert torch.equal(other(text), model(text)) and distance(other(mixed), model(mixed)) > 0.1
    moe, x = copy.deepcopy(model.layers[1].mlp), torch.randn(64, 96, generator=torch.manual_seed(3))
    vision, shared = torch.arange(64) % 2 == 1, moe.shared_experts(x)
    both, moe.shared_experts = moe(x, vision), None
    assert distance(both - moe(x, vision), shared) < 1e-5 and shared.abs().amax(-1).min() > 0.1      # everyone's
    assert distance(torch.cat([moe(*one) for one in zip(x.split(1), vision.split(1))]), moe(x, vision)) < 1e-5
    moe.vision_moe.gate.e_score_correction_bias[5] = 100
    seen = watch(moe, {"text": "text_moe.gate", "vision": "vision_moe.gate"})
    moe(x, vision)
    (_, of_text), (_, of_vision) = seen["text"][0], seen["vision"][0]
    assert (of_vision == 5).any(-1).all() and len(of_vision) == 32 and not (of_text == 5).any(-1).all()


def test_every_norm_has_its_own_epsilon(model):
    """Wrong epsilons are invisible in the whole model (anchors: 4e-6), so small inputs go through each norm alone."""
    kinds = {nn.LayerNorm: 0, RMSNorm: 0}
    for name, norm in [(name, module) for name, module in model.named_modules() if type(module) in kinds]:
        kinds[type(norm)] += 1
        x = torch.randn(4, len(norm.weight), generator=torch.manual_seed(1)).double() * 1e-3
        y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
        if isinstance(norm, nn.LayerNorm):
            y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias
        assert distance(norm(x.float()), y) < 1e-5, name
    assert list(kinds.values()) == [2 * 2 + 1 + 2, 2 * 3 + 1 + 1]


def test_fp32_islands_in_a_bf16_model(folders, monkeypatch):
    """What is rounded once, at its end, is nearly always the bf16 number nearest to the exact one."""
    x = torch.randn(256, 1, 128, generator=torch.manual_seed(0)).bfloat16()
    angle = torch.arange(256)[:, None, None] / torch.arange(1, 65)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert (RMSNorm(128, 1e-5).bfloat16()(x) != exact.bfloat16()).float().mean() < 1e-3
    given, small = set(), load(folders["28b"], dtype=torch.bfloat16)
    for name, rotate in (("rotate_pairs", rotate_pairs), ("rotate_halves", rotate_halves)):
        assert torch.equal(rotate(x, angle.cos(), angle.sin()), rotate(x.float(), angle.cos(), angle.sin()).bfloat16())
        monkeypatch.setattr(ernie_vl, name, lambda *x, name=name, rotate=rotate: given.add((name, x[1].dtype)) or rotate(*x))
    answer(small, prepared(small, "mixed"), lambda logits: given.add(("choose", logits.dtype)) or 3, max_new_tokens=1)
    assert given == {(name, torch.float32) for name in ("rotate_pairs", "rotate_halves", "choose")}
    gate, y = small.layers[1].mlp.text_moe.gate, x[:, 0, :96]
    (weights, chosen), p = gate(y), (y.double() @ gate.weight.double().T).softmax(-1)
    assert torch.equal(chosen, (p + gate.e_score_correction_bias).topk(3).indices)
    assert (weights != (p.gather(1, chosen) / p.gather(1, chosen).sum(-1, keepdim=True)).bfloat16()).float().mean() < 0.01


def test_frames_do_not_see_each_other_and_are_paired_in_order(model):
    vit, resampler, (a, b, c) = model.vision_model, model.resampler_model, REFERENCE["patches.clip"][:72].split(24)
    video, changed = vit(torch.cat((a, b)), [(2, 4, 6)]), vit(torch.cat((a, c)), [(2, 4, 6)])
    assert torch.equal(video[:24], changed[:24]) and distance(video[24:], changed[24:]) > 0.1
    assert distance(vit(torch.cat((c, b)), [(1, 4, 6), (1, 6, 4)])[:24], vit(c, [(1, 4, 6)])) < 1e-6
    x = torch.randn(4 * 24, 48, generator=torch.manual_seed(2))
    assert distance(resampler(x[:24], [(1, 4, 6)]), resampler(x[:24].repeat(2, 1), [(2, 4, 6)])) < 1e-6      # an image, twice
    assert distance(resampler(x, [(4, 4, 6)]), torch.cat([resampler(half, [(2, 4, 6)]) for half in x.chunk(2)])) < 1e-6
    two = prepared(model, "mixed")      # released prompts use the image's placeholder in videos too
    one = model.prepare([ref.IMAGE if i == ref.VIDEO else i for i in two.ids.tolist()], two.patches, two.grids)
    assert torch.equal(model(one), model(two))


# --------------------------------------------------------------------------------------- 4. cache, and generation
@torch.inference_mode()
@pytest.mark.parametrize("limit", [1, 7, 20, 30, 1000])
@pytest.mark.parametrize("name", ref.MODELS)
def test_a_prompt_in_pieces_with_a_cache_is_the_same_prompt(models, name, limit):
    """Token by token, and in longer parts, each with whole images (up to 8 tokens) and pairs of frames (4 tokens)."""
    model, inputs, cache = models[name], prepared(models[name], "mixed"), new_cache(models[name])
    parts = list(pieces(inputs, model.cfg, limit))
    assert max(len(one.ids) for one in parts) <= max(limit, 8) and len(parts) == {1: 20, 1000: 1}.get(limit, len(parts))
    for one in parts:
        tokens = sum(math.prod(token_grid(grid)) for grid in one.grids)
        assert tokens == ernie_vl.is_placeholder(one.ids, model.cfg).sum() and len(one.patches) == sum(map(math.prod, one.grids))
    assert distance(torch.cat([model(one, cache) for one in parts]), model(inputs)) < 1e-5
    assert {kv.length for kv in cache} == {len(inputs.ids)} and distance(model(inputs, only_last=True), model(inputs)[-1:]) < 1e-5
    assert torch.equal(model(inputs), model(inputs))      # the model keeps no state


@torch.inference_mode()
def test_long_prompts_are_read_in_chunks_and_change_nothing(model):
    """More than PREFILL_CHUNK tokens, an image across its end; the buffer of the cache grows on the way."""
    ids = [*torch.randint(16, 72, (2045,), generator=torch.manual_seed(0)).tolist(), 12, *[10] * 6, 13, *range(20, 60)]
    inputs, watched = model.prepare(ids, REFERENCE["patches.wide"], [ref.GRIDS["wide"]]), copy.deepcopy(model)
    seen, cache = watch(watched, {"layer": "layers.0", "vit": "vision_model"}), new_cache(model)
    model(between(inputs, 0, 3), cache)
    found, _ = answer(watched, between(inputs, 3, None, slice(None), inputs.grids), max_new_tokens=3, cache=cache)
    assert [len(out) for out in seen["layer"]] == [2043, 47, 1, 1] and [len(out) for out in seen["vit"]] == [24]
    whole = model(model.prepare([*ids, *found[:2]], inputs.patches, inputs.grids))
    assert found == whole[-3:].argmax(-1).tolist() and {kv.length for kv in cache} == {len(ids) + 2}


def test_an_interrupt_leaves_a_cache_that_is_true(model):
    inputs, cache = prepared(model, "mixed"), new_cache(model)
    model(between(inputs, 0, 3), cache)
    rest, last = between(inputs, 3, None, slice(None), inputs.grids), cache[-1]
    whole, last.buffer = last.buffer, last.buffer[..., :1]
    with pytest.raises(RuntimeError):      # it cannot be written to
        model(rest, cache)
    last.buffer, done = whole, min(kv.length for kv in cache)
    for kv in cache:
        kv.length = done
    assert done == 3 and distance(model(rest, cache), model(inputs)[3:]) < 1e-5


def test_same_seed_same_ids_and_the_smallest_likeliest_set(model):
    said = lambda **options: answer(model, prepared(model, "picture"), sampler(**options))[0]
    for seed in (0, 5):
        assert said(temperature=1.0, seed=seed) == said(temperature=1.0, seed=seed) != said(temperature=1.0, seed=seed + 1)
    assert said(temperature=1.0) != said(temperature=1.0) and said() == answer(model, prepared(model, "picture"))[0]
    assert said() == said(temperature=1.5, top_k=1) == said(temperature=1.5, top_p=1e-9) != said(temperature=1.5, seed=5)

    def drawn(probs=(0.2, 0.5, 0.3), **options):
        choose = sampler(**{"temperature": 1.0, "seed": 0} | options)
        return {choose(torch.tensor(probs).log()) for _ in range(200)}
    assert drawn() == {0, 1, 2} and drawn(top_k=2) == {1, 2} and drawn(top_p=0.49) == {1} and drawn(top_p=0.51) == {1, 2}
    assert drawn(top_k=2, top_p=0.6) == {1}      # k first: 0.5 is then 0.625 of what is left
    assert len(drawn((0.5, 0.5), top_p=0.5)) == 1 and len(drawn((0.25,) * 4, top_p=0.75)) == 3      # ties, exact in binary
    assert drawn(temperature=1e-42) == {1} and len(drawn((0.9, 0.1), temperature=9.0)) == 2


def test_penalties_and_suppressed_ids(model):
    usual = REFERENCE["28b.picture.greedy"].tolist()
    for options in ({}, {"temperature": 2.0, "seed": 1}, {"repetition_penalty": 1.2}):
        ids, _ = answer(model, prepared(model, "picture"), sampler(suppressed=tuple(set(usual)), **options), max_new_tokens=32)
        assert len(ids) == 32 and not set(ids) & set(usual)
    choose, logits = sampler(repetition_penalty=2.0, seen=[1, 1]), torch.tensor([1.0, 1.9, 0.96, -1.5])
    assert [choose(logits) for _ in range(3)] == [0, 2, 1]      # 1 stands in the prompt, twice; an answer's own count too
    assert sampler(repetition_penalty=2.0, seen=[0])(torch.tensor([-1.0, -1.5])) == 1


def test_an_answer_continues_behind_the_largest_position(model, monkeypatch):
    positions = []
    spy = lambda given, *rest: positions.append(given[:, -1].tolist()) or rotary(given, *rest)
    monkeypatch.setattr(ernie_vl, "rotary", spy)
    answer(model, model.prepare([1, 2, *SIX[:-1]], ROWS, [(1, 4, 6)]), max_new_tokens=3)      # it ends in an image
    assert positions == [[3, 4, 5], [6] * 3, [7] * 3]


def test_generation_says_why_it_ended_and_what_it_says_is_text(model):
    inputs, short, cache = prepared(model, "mixed"), copy.copy(model), new_cache(model)
    text = model.cfg.text._replace(max_position_embeddings=len(inputs.ids) + 4)
    short.cfg = model.cfg._replace(text=text)
    free, why = answer(model, inputs, max_new_tokens=8)
    assert len(free) == 8 and why == "length" and answer(model, inputs, max_new_tokens=0) == ([], "length")
    assert answer(model, inputs, stop=(free[5],)) == (free[: free.index(free[5])], "stop")
    assert answer(short, inputs) == (free[:4], "context") and answer(short, inputs, max_new_tokens=4) == (free[:4], "length")
    short(between(inputs, 0, 3), cache)
    assert answer(short, between(inputs, 3, None, slice(None), inputs.grids), cache=cache) == (free[:4], "context")
    seen = watch(other := copy.deepcopy(model), {kind: f"layers.1.mlp.{kind}_moe.gate" for kind in ("text", "vision")})
    image = model.prepare(SIX, REFERENCE["patches.wide"], [ref.GRIDS["wide"]])
    for token in (ref.IMAGE, ref.VIDEO_START):      # whatever it says, and though the prompt is all vision
        assert answer(other, image, lambda logits: token, max_new_tokens=4) == ([token] * 4, "length")
    assert [len(seen[kind]) for kind in ("text", "vision")] == [6, 2]


@pytest.mark.parametrize("ids, patches, grids, words", [
    (SIX[2:], ROWS, [(1, 4, 6)], "5 placeholders"), ([3] * 8, ROWS, [(1, 4, 6)], "0 placeholders"),
    ([10], None, [], "1 placeholders"), (SIX, ROWS, [(1, 3, 8)], r"\(1, 3, 8\)"), (SIX, ROWS, [(1, 0, 6)], r"\(1, 0, 6\)"),
    (SIX, ROWS, [(3, 2, 4)], r"\(3, 2, 4\)"), (SIX, ROWS[:23], [(1, 4, 6)], r"\(23, 588\)"),
    (SIX, ROWS[:, :587], [(1, 4, 6)], r"\(24, 587\)"), ([], None, [], "empty|0 tokens"), ([3, 72], None, [], r"0\.\.71"),
    ([-1, 3], None, [], r"0\.\.71"), ([3] * 4097, None, [], "4,097"),
    ([10, 10, 10, 5, 10, 10, 10], ROWS, [(1, 4, 6)], "side by side")])
def test_prompts_that_do_not_fit_are_refused(model, ids, patches, grids, words):
    with pytest.raises(InputError, match=words):
        model.prepare(ids, patches, grids)
    assert len(model.prepare([0, 71] * 2048).ids) == 4096      # a prompt may fill the context


# --------------------------------------------------------------------------------------------------- 5. the loader
@pytest.mark.parametrize("spelling, shards", [(spelling, shards) for spelling in fixtures.SPELLINGS for shards in (1, 3)][1:])
@pytest.mark.parametrize("name", ref.MODELS)
def test_all_spellings_of_a_checkpoint_are_the_same_model(models, tmp_path, name, spelling, shards):
    shapes, mine = ref.MODELS[name], models[name].state_dict()
    tensors = fixtures.SPELLINGS[spelling](ref.hub_tensors(shapes), shapes.experts)
    other = load(fixtures.write_folder(tmp_path, tensors, ref.config(shapes), shards)).state_dict()
    assert other.keys() == mine.keys() and [key for key in mine if not torch.equal(other[key], mine[key])] == []


@pytest.mark.parametrize("name, changes", [
    ("28b", {}), ("28b", {"moe_layer_start_index": 1}), ("28b", {"moe_layer_end_index": None, "moe_num_experts": 12}),
    ("28b", {"moe_layer_end_index": -1}), ("28b", {"moe_layer_end_index": [-1, 1]}), ("28b", {"moe_layer_interval": None}),
    ("28b", {"moe_layer_end_index": ABSENT, "moe_layer_interval": ABSENT}), ("424b", {"moe_num_shared_experts": ABSENT}),
    ("28b", {"freq_allocation": ABSENT, "rope_theta": ABSENT}), ("28b", {"rope_scaling": {"mrope_section": [22, 22, 20]}}),
    ("424b", {}), ("424b", {"moe_num_shared_experts": None}),
    ("424b", {"moe_layer_start_index": 2, "tie_word_embeddings": ABSENT})])
def test_flat_and_nested_configs_mean_the_same_and_no_field_is_overlooked(name, changes):
    flat = {key: value for key, value in fixtures.flat_config(ref.MODELS[name], **changes).items() if value is not ABSENT}
    assert read_config(flat) == read_config(ref.config(ref.MODELS[name]))._replace(video_token_id=ref.IMAGE)
    nested, text = ref.config(SMALL), ref.text_config(SMALL)
    for other in ({"moe_layer_interval": 2}, {"moe_layer_end_index": 1}):
        assert read_config(fixtures.flat_config(SMALL, **other)).text.mlp_layer_types == ("dense", "sparse", "dense")
    for untied in ({"tie_word_embeddings": False}, {"text_config": text | {"tie_word_embeddings": False}}):
        assert not read_config(nested | untied).text.tie_word_embeddings      # converters set one of the two fields
    other = dict(head_dim=None, rms_norm_eps=1e-6, moe_k=2, rope_parameters={"rope_theta": 10_000, "mrope_section": [4, 4, 4]})
    cfg = read_config(nested | {"text_config": text | other}).text
    assert (cfg.head_dim, cfg.rms_norm_eps, cfg.moe_k, cfg.rope_theta, cfg.mrope_section) == (24, 1e-6, 2, 10_000, (4, 4, 4))


@pytest.mark.parametrize("stored, asked, others", [
    (torch.half, None, torch.float), (torch.bfloat16, None, torch.bfloat16), (torch.float, torch.bfloat16, torch.bfloat16)])
def test_routers_and_their_biases_are_fp32_whatever_is_stored(tmp_path, stored, asked, others):
    tensors = {key: x.to(stored) for key, x in ref.hub_tensors(SMALL).items()}
    small = load(fixtures.write_folder(tmp_path, tensors, ref.config(SMALL)), dtype=asked)
    for name, parameter in small.named_parameters():
        assert parameter.dtype == (torch.float32 if ".gate.weight" in name or "correction_bias" in name else others), name
    assert small(prepared(small, "mixed")).dtype == others and small(prepared(small, "mixed")).isfinite().all()


def test_text_only_checkpoints_answer_like_the_text_half_of_a_vl_model(model, tmp_path):
    """Layer 0 of the small model is dense, so a dense model of this one layer must continue like it."""
    tensors, inputs, first = fixtures.text_alone(ref.hub_tensors(SMALL), 12), prepared(model, "text"), copy.deepcopy(model)
    text_only = dict(model_type="ernie4_5_moe", vision_config=ABSENT, moe_num_experts=12, moe_intermediate_size=24)
    config = fixtures.flat_config(SMALL, **text_only)
    text = load(fixtures.write_folder(tmp_path / "moe", tensors, config))
    assert distance(text(text.prepare(inputs.ids.tolist())), model(inputs)) < 1e-5
    with pytest.raises(InputError, match="text-only"):
        text.prepare(SIX, ROWS, [(1, 4, 6)])
    config = {key: x for key, x in config.items() if "moe_" not in key} | {"model_type": "ernie4_5", "num_hidden_layers": 1}
    one = {key: x for key, x in tensors.items() if not re.search(r"layers\.[12]\.", key)}
    dense, first.layers = load(fixtures.write_folder(tmp_path / "dense", one, config)), first.layers[:1]
    assert dense.cfg.text.head_dim == 128 != SMALL.hidden // SMALL.heads
    assert distance(dense(dense.prepare(inputs.ids.tolist())), first(inputs)) < 1e-5


@pytest.mark.parametrize("name", fixtures.RELEASED)
def test_released_models_have_their_sizes_and_ids(name):
    model, vl = load_weights.build_model(fixtures.RELEASED[name]), "VL" in name
    text, types = model.cfg.text, model.cfg.text.mlp_layer_types
    sizes = text.moe_num_experts, text.moe_k, text.moe_num_shared_experts, text.moe_intermediate_size, text.tie_word_embeddings
    assert (sum(x.numel() for x in model.parameters()), types.count("dense"), (len(types), *sizes)) == fixtures.SIZES[name]
    assert (text.rope_theta, text.rms_norm_eps, text.head_dim, model.norm.weight.is_meta) == (500_000, 1e-5, 128, True)
    assert text.mrope_section == ((22, 22, 20) if vl else (32, 32, 0))
    assert not vl or model.cfg.vision == (32, 1280, 5120, 16)
    assert list(model.cfg[2:]) == ([100295, 100295, 101304, 101305, 101306, 101307] if vl else [-1] * 6)


def test_28b_loads_in_seconds_and_stays_on_disk(tmp_path):
    """59 GB of weights; what the process owns, pages of files excluded, grows by less than 1 GB until there is a token."""
    if not Path("/proc/self/status").exists() or not fixtures.has_sparse_files(tmp_path):
        pytest.skip("needs /proc and a file system with sparse files")
    own = lambda: int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    shapes, before = ref.hub_shapes(fixtures.REAL_28B), own()
    fixtures.write_zeros(shapes, fixtures.RELEASED["VL-28B-A3B"], tmp_path, 12)
    start, model = time.perf_counter(), load(tmp_path)
    seconds = time.perf_counter() - start
    del model.layers[2:]      # which would all be read: the time of this test
    next(generate(model, model.prepare([1])))
    assert len(shapes) == 11_105 and seconds < 10 and own() - before < 1e9, (seconds, own() - before)


def test_a_loaded_model_is_a_plain_module_on_mapped_files(models, folders, tmp_path):
    for name, model in models.items():
        tied, frozen = ref.MODELS[name].tie, [name for name, x in model.named_parameters() if not x.requires_grad]
        assert str(model).startswith("ErnieVL(") and type(model) is ernie_vl.ErnieVL and not model.training
        assert frozen and all(name.endswith("e_score_correction_bias") for name in frozen)
        assert (model.lm_head.weight is model.embed_tokens.weight) is tied and "lm_head.weight" in model.state_dict()
        other = load(load_weights.open_checkpoint(folders[name]))
        other.lm_head = nn.Sequential(other.lm_head, nn.Tanh())      # the head is called
        assert torch.equal(other(prepared(model, "text")), model(prepared(model, "text")).tanh())
        torch.set_default_dtype(torch.bfloat16)
        dtypes = {parameter.dtype for parameter in load(folders[name]).parameters()}
        torch.set_default_dtype(torch.float32)
        assert dtypes == {torch.float32}
    file, data = tmp_path / "model.safetensors", (folders["28b"] / "model.safetensors").read_bytes()
    shutil.copy(folders["28b"] / "config.json", tmp_path)
    start = 8 + int.from_bytes(data[:8], "little")
    for spaces in range(4):      # some writers end the header where its JSON ends, and not at a multiple of 8
        moved = (start - 8 + spaces).to_bytes(8, "little") + data[8:start] + b" " * spaces + data[start:]
        file.write_bytes(moved)
        other = load(tmp_path)
        assert all(torch.equal(x, models["28b"].state_dict()[name]) for name, x in other.state_dict().items())
        other.norm.weight.add_(1)
        assert file.read_bytes() == moved      # training in place writes to no file


def test_stages_stand_between_the_files_and_the_model(model, folders, monkeypatch):
    """A stage sees the model on meta before anything is read, and may exchange modules and tensors, and add some."""
    events, read = [], load_weights.read_tensors
    monkeypatch.setattr(load_weights, "read_tensors", lambda opened: (events.append(one[0]) or one for one in read(opened)))

    def whole_numbers(model, tensors):
        events.append({x.device.type for x in model.parameters()})
        model.norm = nn.Module()
        for name, dtype in (("weight", torch.int8), ("scale", torch.bfloat16)):
            setattr(model.norm, name, nn.Parameter(torch.empty(96, dtype=dtype, device="meta"), requires_grad=False))
        more = itertools.chain(tensors, [("norm.scale", torch.ones(96))])
        return model, ((name, x.round().to(torch.int8) if name == "norm.weight" else x) for name, x in more)
    other = load(folders["28b"], dtype=torch.float64, stages=[lambda model, tensors: (model, tensors), whole_numbers])
    assert events[0] == {"meta"} and len(events) == 1 + len(list(model.parameters()))
    assert [x.dtype for x in (*other.norm.parameters(), other.embed_tokens.weight)] == [torch.int8, torch.bfloat16, torch.float64]
    with pytest.raises(InputError, match="norm.weight"):      # strict
        load(folders["28b"], stages=[lambda model, tensors: (model, ((name, x) for name, x in tensors if name != "norm.weight"))])


@pytest.mark.parametrize("dropped, added, words", [
    ("model.layers.1.mlp.experts.13.up_proj.weight", {}, r"vision_moe.experts.1.up_proj.weight \(14, 96\)"),
    ("model.layers.1.mlp.moe_statics.e_score_correction_bias", {}, "e_score_correction_bias .* 1 more"),
    ("model.norm.weight", {"model.nrom.weight": torch.ones(96)}, "norm.weight .* 1 more"),
    ("", {"model.extra": torch.ones(2)}, "model.extra"), ("", {"model.norm.weight": torch.ones(95)}, r"\(95,\)"),
    ("", {"model.norm.weight": torch.ones(96).char()}, "I8"),
    ("", {"model.layers.1.mlp.gate.weight": torch.ones(12, 96)}, r"text_moe.gate.weight .*\(12, 96\)")])
def test_tensors_that_do_not_fit_are_refused(tmp_path, dropped, added, words):
    tensors = {name: x for name, x in ref.hub_tensors(SMALL).items() if name != dropped} | added
    with pytest.raises(InputError, match=words):
        load(fixtures.write_folder(tmp_path, tensors, ref.config(SMALL)))


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "qwen2_vl"}, "qwen2_vl"), ({"rope_scaling": {"type": "yarn"}}, "yarn"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"), ({"rope_scaling": {"mrope_section": [16, 24, 24]}}, r"\(16, 24, 24\)"),
    ({"moe_num_experts": [12, 8]}, r"\[12, 8\]"), ({"hidden_size": None}, "hidden_size"),
    ({"vision_config": None}, "vision_config"), ({"vision_config": 5}, "type"), ({"rope_theta": "banana"}, "type"),
    ({"rope_theta": math.nan}, "rope_theta"), ({"moe_layer_interval": 0}, "type"), ({"moe_k": 13}, "experts"),
    ({"vocab_size": -1}, "vocab_size"), ({"num_attention_heads": 3}, "heads"), ({"use_bias": True}, "use_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"), ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
    ({"spatial_conv_size": 3}, "conv_size"), ({"rope_scaling": None, "freq_allocation": 90}, "h must equal w")])
def test_configs_of_no_released_model_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        read_config(fixtures.flat_config(SMALL, **changes))


@pytest.mark.parametrize("name, content, words", [      # None: the file is missing
    (SECOND, None, SECOND), (SECOND, b"\x10" + b"\0" * 99, SECOND), (SECOND, b"\x08" + bytes(7) + b"{}      ", "extras.check"),
    ("config.json", json.dumps(ref.config(SMALL) | {"quantization_config": {"bits": 4}}).encode(), "extras/quantize.py"),
    ("config.json", None, "config.json"), ("config.json", b"{", "JSON"), ("model.safetensors.index.json", b"[]", "index"),
    ("config.json", b'\xef\xbb\xbf{"model_type": "bert", "quantization_config": null}', "bert"),      # behind a byte order mark
    ("model.safetensors.index.json", b'{"weight_map": {"a": "../b"}}', "weight_map"),
    ("model.safetensors.index.json", b'{"weight_map": {"ernie.embed_tokens.weight": "paddle"}}', "-Paddle")])
def test_folders_with_damaged_files_are_refused(tmp_path, name, content, words):
    folder = fixtures.write_folder(tmp_path, ref.hub_tensors(SMALL), ref.config(SMALL), 3)
    save_file({"ernie.embed_tokens.weight": torch.ones(2)}, folder / "paddle")
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        load(folder)


def test_hub_ids_are_found_in_the_local_cache_only(monkeypatch, tmp_path):
    """The snapshot that main names, or else the newest."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="baidu/X"):
        load_weights.find_folder("baidu/X")
    snapshots, main = tmp_path / "models--baidu--X" / "snapshots", tmp_path / "models--baidu--X" / "refs" / "main"
    for age, commit in enumerate(("bbb", "ccc", "aaa")):
        (snapshots / commit).mkdir(parents=True)
        os.utime(snapshots / commit, (1e9 - age, 1e9 - age))
    assert load_weights.find_folder("baidu/X") == snapshots / "bbb" and load_weights.find_folder(str(tmp_path)) == tmp_path
    main.parent.mkdir(), main.write_text("ccc\n")
    assert load_weights.find_folder("baidu/X") == snapshots / "ccc"


# ------------------------------------------------------------------------------------------- 6. text and images
IMG, BEGIN, END = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", "<|begin_of_sentence|>", "<|end_of_sentence|>"
VID, EMPTY, FRAMES = "<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>", "<think>\n\n</think>\n\n", ref.MEDIA["clip"][:4]
ERNIE = "You are a multimodal AI assistant called ERNIE developed by Baidu based on the PaddlePaddle framework."
MEDIA = {IMG: make_media("image", "x", FRAMES[:1], HERE), VID: make_media("video", "x", FRAMES, HERE, 3136)}
user = lambda *items: {"role": "user", "content": [MEDIA.get(item, item) for item in items]}
says = lambda role, text, **more: {"role": role, "content": text, **more}
TALK = [says("system", "S"), user("q1", IMG, IMG), says("assistant", "ANS", reasoning_content="TH"), user(IMG, "a", VID, "b")]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return Tokenizer(fixtures.write_vocabulary(tmp_path_factory.mktemp("vocabulary")))


@pytest.mark.parametrize("text, ids", [
    ("", []), ("1234", [4, 5, 6, 7]), ("\n\n", [23, 23]), ("\t\t", [22, 22]), ("\r", [26]), ("😈", [253, 172, 165, 149]),
    (" Hello", None), ("  two  spaces ", None), ("<|IMAGE_START|><think>", None),
    ("Hey. \t\t \n\nyou  é中  @#😈  🤗!       , 1234 15 5,61", None)])
def test_ids_are_those_of_the_real_vocabulary_and_control_strings_only_when_they_are_meant(tokenizer, text, ids):
    assert tokenizer.decode(tokenizer.encode(text)) == text and ids in (None, tokenizer.encode(text))
    in_pieces = lambda text: [tokenizer.pieces.id_to_piece(i) for i in tokenizer.encode(text)]
    assert in_pieces("This is a test")[0] == "This" and in_pieces(" Hello") == ["▁Hello"] and in_pieces("Hello") == ["Hello"]
    hello, how = tokenizer.encode(" Hello"), tokenizer.encode("how")
    assert tokenizer.encode("<s> Hello<s>how<s>>", control=True) == [1, *hello, 1, *how, 1, *tokenizer.encode(">")]
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"      # half of a character that no file can hold


def test_a_user_cannot_type_a_control_token(tmp_path):
    """Not even one that SentencePiece itself would recognise, or one put together from two parts of a message."""
    tokenizer = Tokenizer(fixtures.write_vocabulary(tmp_path, ("<|im_start|>",)))
    hostile = "".join(tokenizer.special) + "<|image@placeholder|></think>"
    assert tokenizer.pieces.encode("<|im_start|>") == [tokenizer.special["<|im_start|>"]]
    assert not set(tokenizer.encode(hostile)) & set(tokenizer.special.values())
    talk = lambda *text: [says("system", text), user(*text), says("assistant", "".join(text), reasoning_content="".join(text))]
    prompts = [encode_chat(tokenizer, talk(*text)).ids for text in (["Hi"], [hostile], ["<|IM", "AGE_START|>"])]
    assert len({tuple(id for id in ids if id in tokenizer.names) for ids in prompts}) == 1
    for message in (says("tool", "x"), says("user", None), says("user", [{"type": "text", "text": "x"}]), user(Path("x"))):
        with pytest.raises(InputError, match="load_image"):
            encode_chat(tokenizer, [message])


def test_streaming_never_emits_half_a_character(tokenizer):
    stream, how = Stream(tokenizer, ("</think>",)), tokenizer.encode("how")[0]
    assert [stream.push(13 + byte) for byte in "😈中".encode()] == ["", "", "", "😈", "", "", "中"]
    assert [stream.push(13 + 0xF0), stream.push(13 + 0x9F), stream.push(how)[:2]] == ["", "", "��"]
    assert [stream.push(13 + 0xF0), stream.push(1009), stream.push(how)[:1]] == ["", "�</think>", "h"]
    assert tokenizer.decode([13 + byte for byte in b"\xf0\x9f\xf0\x9f\x98\x88\xe4\xb8\xad\xe4"]) == "��😈中�"


@pytest.mark.parametrize("eos, stop", [(None, {2, 1000}), (5, {2, 5, 1000}), ([5, 6], {2, 5, 6, 1000})])
def test_what_is_silent_what_is_suppressed_and_what_ends_an_answer(tmp_path, eos, stop):
    tokenizer = Tokenizer(fixtures.write_vocabulary(tmp_path, eos_token_id=eos))
    hello, suppressed = tokenizer.encode("Hello"), set(tokenizer.suppressed_ids(2000))
    assert tokenizer.decode([0, 1, *hello, 2, 1000, 1008, 5000]) == "Hello"
    assert tokenizer.decode([1009, *hello], keep=("</think>",)) == "</think>Hello" and tokenizer.stop == stop
    assert len(tokenizer.encode("True")) == 1 and "True" not in tokenizer.special      # what add_bos_token says is no name
    assert {1001, 1002, 1004, 1005, 1010, 1999} <= suppressed and not {1003, 1008, 1009, 2000, *stop} & suppressed
    thinks = lambda text: tokenizer.begins_thinking(tokenizer.encode(text, control=True))
    assert [thinks(text) for text in (f"{BEGIN}<think>", EMPTY, "", f"{EMPTY}<think>")] == [True, False, False, True]


@pytest.mark.parametrize("template, think, messages, expected", [
    ("instruct", None, [user("Q")], f"User: Q\nAssistant: {EMPTY}"),
    ("instruct", True, [user("Q")], "User: Q\nAssistant: <think>"),
    ("instruct", None, TALK, f"S\nUser: q1Picture 1:{IMG}Picture 2:{IMG}\nAssistant: <think>\nTH\n</think>\nANS{END}"
                             f"User: Picture 3:{IMG}aVideo 1:{VID}b\nAssistant: {EMPTY}"),
    ("thinking", None, TALK[1:], f"{ERNIE}\nUser: q1 Picture 1:{IMG} Picture 2:{IMG}\nAssistant: \n<think>\nTH\n</think>\n\n"
                                 f"ANS{END}User:  Picture 3:{IMG}a Video 1:{VID}b\nAssistant: \n<think>\n"),
    ("thinking", False, [TALK[0], says("user", "Q")], f"S\nUser: Q\nAssistant: \n{EMPTY}"),
    ("text", None, [TALK[0], user("Q"), TALK[2], user("R")], f"S\nUser: Q\nAssistant: ANS{END}User: R\nAssistant: ")])
def test_the_prompt_is_the_string_the_model_was_trained_on(template, think, messages, expected):
    parts, before = (render(messages, TEMPLATES[template], think, asked) for asked in (True, False))
    assert "".join(parts) == BEGIN + expected and "".join(parts).startswith("".join(before) + "\nAssistant: ")
    assert [part for part in parts if isinstance(part, Control)] == [BEGIN, *re.findall(r"</?think>|<\|\w+\|>", expected)]
    with pytest.raises(InputError, match="think"):
        render(messages, TEMPLATES["text"], think=True)


def test_a_prompt_as_ids(tokenizer):
    """Text is encoded in one go, and every token of an image or video has its placeholder, as the inference stacks do it."""
    start, end = tokenizer.encode("User: What is this?Picture 1:"), tokenizer.encode("Video 1:")
    prompt = encode_chat(tokenizer, [user("What is ", "this?", IMG, VID, Control("<|LOC_7|>"))])
    assert prompt.ids[: len(start) + 1] == [1001, *start] and prompt.grids == [(1, 4, 4), (4, 4, 4)]
    assert prompt.ids[len(start) + 1 :][: len(end) + 17] == [1004, *[1002] * 4, 1005, *end, 1006, *[1002] * 8, 1007, 1003]
    assert torch.equal(prompt.patches, torch.cat([MEDIA[IMG].patches, MEDIA[VID].patches])) and prompt.patches.shape == (80, 588)
    assert encode_chat(tokenizer, [says("user", "Hi")], True).ids == encode_chat(tokenizer, [user("H", "i")], think=True).ids


def test_the_folder_tells_the_template(tokenizer, tmp_path):
    def found(folder, template=None) -> str:
        if template:
            (folder / "chat_template.jinja").write_text(template)
        return next(name for name, one in TEMPLATES.items() if one is chat_template(Tokenizer(folder)))
    folder = shutil.copytree(tokenizer.folder, tmp_path / "x")
    cached = shutil.copytree(folder, tmp_path / "models--baidu--ERNIE-4.5-VL-28B-A3B-Thinking" / "snapshots" / "abc")
    assert found(folder) == "instruct" and found(cached) == "thinking"
    assert found(folder, "{% if options.thinking_mode == 'open' %}") == "thinking"
    assert found(cached, "{% if enable_thinking %}") == "instruct"      # what the folder holds counts more than its name
    (cached / "added_tokens.json").write_text("{}")
    assert found(cached) == "text"
    with pytest.raises(InputError, match="ChatML"):
        found(folder, "<|im_start|>")


@pytest.mark.parametrize("step", [1, 3, 10_000])
@pytest.mark.parametrize("text, thinking, reasoning, content", [
    ("abc</think>xyz", True, "abc", "xyz"), ("\nabc\n\ndef\n</think>\n\nx\n\ny", True, "abc\n\ndef", "x\n\ny"),
    ("abc\n", True, "abc", ""), ("abc", False, "", "abc"), ("", True, "", ""), ("<think>abc</think>def", True, "abc", "def"),
    ("\n<think>abc</think>d", False, "abc", "d"), ("a</think>b</think>c", True, "a", "b</think>c"),
    ("x</think>y", False, "", "x</think>y"), ("a < b </thin", True, "a < b </thin", ""), ("</think>abc", True, "", "abc"),
    ("a <thin", False, "", "a <thin"), ("\n\na\n", False, "", "a\n"), ("a <think>b", False, "", "a <think>b"),
    ("a\n</think>\n\n<response>\nb\n</response>\n", True, "a", "<response>\nb\n</response>\n")])
def test_a_reply_is_taken_apart_however_it_comes(text, thinking, reasoning, content, step):
    reply, events = ReplyParser(thinking), []
    for i in range(0, len(text), step):
        events += reply.push(text[i : i + step])
    events += reply.push("", final=True)
    assert reply.text == {"reasoning": reasoning, "content": content}
    assert ["".join(said for kind, said in events if kind == wanted) for wanted in reply.text] == [reasoning, content]
    reply, come = ReplyParser(True), {"a <": "a ", "b </th": "<b ", "ink": "", ">": "", "Yes": "Yes", "\n": "", "?": "\n?"}
    assert {text: "".join(said for _, said in reply.push(text)) for text in come} == come      # as soon as it is certain


@pytest.mark.parametrize("size, grid, total, first", [      # width x height, as transformers' PIL processor resizes them
    ((100, 75), (1, 6, 8), 5347.104, (-1.7923, -1.7047, -0.522)), ((640, 480), (1, 34, 46), 173001.6, (-1.7923, -1.6901, -0.376)),
    ((30, 20), (1, 4, 6), 2058.9578, (-1.7923, -1.7923, -1.3105))])
def test_patches_have_the_values_that_transformers_gives_them(size, grid, total, first):
    patches, found = patchify([ref.image(*size)])
    assert found == grid and patches.shape == (grid[1] * grid[2], 588) and patches.dtype == torch.float32
    assert abs(float(patches.double().sum()) - total) < 0.01
    assert patches[[0, 0, 1], [0, 1, 0]].tolist() == pytest.approx(first, abs=1e-3)
    for name, frames in ref.MEDIA.items():      # which need no resizing
        patches, found = patchify(frames)
        assert found == ref.GRIDS[name] and distance(patches, REFERENCE[f"patches.{name}"]) < 1e-6


@pytest.mark.parametrize("height, width, budget, fitted", [
    (1, 1, (), (56, 56)), (20, 30, (), (56, 84)), (28, 112, (), (28, 112)), (480, 640, (), (476, 644)), (14, 300, (), (28, 280)),
    (2160, 3840, (), (1624, 2912)), (8000, 6000, (), (2520, 1904)), (561, 278, (), (560, 280)), (10, 2000, (), (28, 812)),
    (70, 70, (), (56, 56)), (98, 98, (), (112, 112)), (126, 126, (), (112, 112)), (2, 200, (), (28, 560)),      # halves: to even
    (2000, 100, (784, 1568), (168, 28)), (100, 2000, (784, 1568), (28, 168)),                    # no side becomes nothing
    (64, 64, (299 * 784, 1196 * 784), (504, 504)), (1080, 1920, (299 * 784, 1196 * 784), (700, 1288))])      # frames
def test_sides_are_multiples_of_28_inside_the_budget(height, width, budget, fitted):
    assert fit_size(height, width, *budget) == fitted


def test_the_budget_is_that_of_the_folder_and_max_pixels_lowers_it(tmp_path):
    assert pixel_budget(tmp_path, "image") == (3136, 6177 * 784) and pixel_budget(tmp_path, "video") == (299 * 784, 1196 * 784)
    image, small = ref.image(640, 480), ref.image(30, 30)
    grids = lambda *most: [load_image(x, tmp_path, *most).grid for x in (image, small)]
    assert grids() == [(1, 34, 46), (1, 4, 4)] and grids(12544) == [(1, 6, 8), (1, 4, 4)] and grids(784)[1] == (1, 2, 2)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 3136, "longest_edge": 12544}}')
    assert grids(10**6) == grids() == [(1, 6, 8), (1, 4, 4)]
    assert load_image(image, tmp_path).summary == "640 x 480 -> 112 x 84 -> 12 tokens"
    video = make_media("video", "x", [image] * 4, tmp_path, 12544, "4 frames ")
    assert video.grid == (4, 6, 8) and len(video.patches) == 192 and video.summary.startswith("4 frames 640 x 480")


def test_images_are_loaded_as_a_person_sees_them(tmp_path):
    def colour(name, image, **how) -> tuple:
        image.save(tmp_path / name, **how)
        return read_image(tmp_path / name).getpixel((4, 4))
    exif, frames, white = Image.Exif(), [Image.new("RGB", (9, 9), name) for name in ("red", "blue")], (255,) * 3
    exif[0x0112] = 6
    colour("turned.jpg", ref.image(112, 56), exif=exif)
    sources = str(tmp_path / "turned.jpg"), io.BytesIO((tmp_path / "turned.jpg").read_bytes())
    assert [read_image(source).size for source in sources] == [(56, 112)] * 2
    assert colour("a.png", Image.new("RGBA", (9, 9), (255, 0, 0, 0))) == colour("b.png", Image.new("LA", (9, 9), (0, 0))) == white
    assert colour("palette.gif", Image.new("RGB", (9, 9), (200, 0, 0)).quantize(4))[0] > 190
    assert colour("deep.png", Image.fromarray(np.full((9, 9), 30000, np.uint16))) == (117,) * 3
    assert read_image(Image.fromarray(np.full((9, 9), 200, np.int32))).getpixel((4, 4)) == (200,) * 3      # 8 bits in a wide mode
    assert colour("print.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)))[0] > 200
    assert colour("moves.gif", frames[0], save_all=True, append_images=frames[1:])[0] > 200


@pytest.mark.parametrize("case, word", fixtures.NO_IMAGES.items())
def test_what_is_no_image_is_refused_in_one_sentence(tmp_path, case, word):
    fixtures.write_no_image(case, tmp_path / "x.png")
    with pytest.raises(InputError, match=rf"^[^\n]*x\.png[^\n]*{word}[^\n]*$"):
        load_image(tmp_path / "x.png", tmp_path)


# ------------------------------------------------------------------------------------------------------ 7. run.py
def ask(capsys, *args: str) -> tuple[int, str, str]:
    try:
        code = run.main(list(args))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("args, words", [
    (["--temperature", "-1"], "0 or more"), (["--temperature", "nan"], "0 or more"), (["--top-p", "0"], "above 0"),
    (["--top-p", "2"], "to 1"), (["--top-k", "-2"], "0 or more"), (["--max-new-tokens", "0"], "1 or more"),
    (["--max-pixels", "10"], "784"), (["--seed", "x"], "x is not"), (["Hi", "--model", "no/such"], "hf download"),
    (["Hi", "--nonsense"], "--nonsense"), (["no.mp4", "Hi"], "no.mp4"), (["no/such"], "no/such"), ([], "--image"),
    (["Hi", "you"], "you"), (["-", "Hi"], "Hi"), (["Hi", "--device", "tpu"], "cuda"), (["Hi " * 5000], "4,096"),
    (["Hi", "--save-logits", "no/such/x"], "written"), (["--image", "nothing.png"], "exist"),
    (["--image", EXAMPLE] * 300, "smaller images"), (["--image", EXAMPLE, EXAMPLE], "order"), (["my phto.png", "Hi"], "phto"),
    (["Hi", "--device", "mps" if torch.cuda.is_available() else "cuda"], "device")])
def test_bad_options_get_one_sentence_and_exit_2(args, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    code, out, err = ask(capsys, *args)
    assert code == 2 and out == "" and err.splitlines()[-1].startswith("error: ") and words in err.splitlines()[-1]


@pytest.mark.parametrize("args, media, prompt", [
    (["a.jpg", "What is this?"], ["image a.jpg"], "What is this?"), (["What is it?", "a.jpg"], ["image a.jpg"], "What is it?"),
    ([], [], "piped"), (["a.jpg"], ["image a.jpg"], None), (["frames", "b.MP4"], ["video frames", "video b.MP4"], None),
    (["and/or, why?"], [], "and/or, why?"), (["a.jpg", "a.jpg"], ["image a.jpg"] * 2, None), (["Why?"], [], "Why?"),
    (["-"], [], "piped"), (["--prompt", "-"], [], "piped"), (["-", "a.jpg"], ["image a.jpg"], "piped")])
def test_bare_arguments_are_files_or_the_question(monkeypatch, tmp_path, args, media, prompt):
    """stdin is read for - and where there is nothing else to answer, and never otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("piped\n") if prompt == "piped" else None)
    Path("a.jpg").touch(), Path("b.MP4").touch(), Path("frames").mkdir()
    found = run.parse(args)
    assert ([" ".join(one) for one in found.media], found.prompt) == (media, prompt)


def test_every_option_arrives(capsys, monkeypatch):
    given, tokenizer = {}, Tokenizer(TINY)
    for real in (sampler, generate):
        arguments = lambda *args, of=inspect.signature(real), **more: given.update(of.bind(*args, **more).arguments) or iter(())
        monkeypatch.setattr(run, real.__name__, arguments)
    options = "--think --max-pixels 3136 --dtype bfloat16 --max-new-tokens 4 --temperature 0.5 --top-k 7 --top-p 0.9 --seed 3"
    ask(capsys, EXAMPLE, "Hello!", "--system", "S", "--repetition-penalty", "1.1", *options.split())
    model, inputs, _, stop = map(given.pop, ("model", "inputs", "choose", "stop"))
    text = tokenizer.decode(inputs.ids.tolist(), keep=tuple(tokenizer.special))
    assert text.startswith(f"{BEGIN}S\nUser: Hello!Picture 1:") and text.endswith("<think>") and inputs.grids == [(1, 2, 4)]
    assert model.norm.weight.dtype == torch.bfloat16 and set(stop) == tokenizer.stop and given == {
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 3, "seen": inputs.ids.tolist(),
        "suppressed": tokenizer.suppressed_ids(780), "max_new_tokens": 4}


def test_the_answer_alone_goes_to_stdout_and_the_same_seed_gives_the_same(capsys, monkeypatch):
    code, out, err = ask(capsys, "--image", EXAMPLE)
    assert (code, out) == (0, f"{GOLDEN}\n") and "-> " in err and "tokens/s" in err and not re.search("\r|Warning", err)
    drawn = [ask(capsys, EXAMPLE, "--temperature", "3", "--seed", seed)[1] for seed in ("0", "0", "2")]
    assert drawn[0] == drawn[1] != drawn[2] and ask(capsys, EXAMPLE, "--temperature", "3", "--top-k", "1")[1] == out
    for options, terminal, shown in ([], 0, "B\n"), (["--show-thinking"], 0, "A\n\nB\n"), ([], 1, "\033[2mA\033[0m\n\nB\n"):
        ids = iter([*Tokenizer(TINY).encode("A\n</think>\n\nB", control=True), 2])
        monkeypatch.setattr(run, "make_sampler", lambda *_: lambda logits: next(ids))
        monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
        assert ask(capsys, "Q", "--think", *options)[:2] == (0, shown)


def test_saved_logits_are_those_of_the_prompt_and_replace_only_a_file_and_when_complete(capsys, tmp_path, monkeypatch):
    assert ask(capsys, "--image", EXAMPLE, "--save-logits", str(tmp_path / "old"))[:2] == (0, "")
    saved, model, bytes_before = load_file(tmp_path / "old"), load(TINY), (tmp_path / "old").read_bytes()
    again = model(model.prepare(saved["ids"].tolist(), saved["patches"], saved["grids"].tolist()))
    assert distance(again, saved["logits"]) < 1e-5 * again.abs().max() and saved["logits"].dtype == torch.float32
    assert {"ids", "positions", "is_vision", "patches", "grids", "logits"} == saved.keys() and saved["grids"].shape == (1, 3)
    os.mkfifo(tmp_path / "pipe")            # stands for a device
    (tmp_path / "link").symlink_to(tmp_path / "old")
    def half(tensors, path): Path(path).write_text("half"); raise OSError("disk full")
    monkeypatch.setattr(run, "save_file", half)
    for name, words in (("pipe", "cannot be written"), ("link", "disk full")):
        code, out, err = ask(capsys, EXAMPLE, "--save-logits", str(tmp_path / name))
        assert code == 2 and words in err.splitlines()[-1] and (tmp_path / "old").read_bytes() == bytes_before
    run.write_atomically(tmp_path / "link", lambda path: path.write_text("new"))
    assert (tmp_path / "old").read_text() == "new" and {path.name for path in tmp_path.iterdir()} == {"old", "pipe", "link"}


@pytest.mark.parametrize("name, text", [
    ("added_tokens.json", '{"<think>": "x"}'), ("added_tokens.json", "[]"), ("added_tokens.json", '{"<think>": 1e30}'),
    ("tokenizer.model", ""), ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'), ("tokenizer_config.json", "{"),
    ("tokenizer.model", None), ("added_tokens.json", None), ("config.json", None), ("model.safetensors", None),
    ("generation_config.json", '{"eos_token_id": {"a": 1}}'), ("preprocessor_config.json", '{"size": [1]}'),
    ("preprocessor_config.json", '{"size": {"longest_edge": 0}}')])
def test_damaged_files_of_a_folder_are_named_in_one_sentence(tmp_path, name, text):
    folder = shutil.copytree(TINY, tmp_path / "copy", ignore=shutil.ignore_patterns("training.pt", "*.py", "__pycache__", name))
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(InputError, match=rf"^[^\n]*{re.escape(str(folder))}[^\n]*$"):
        encode_chat(Tokenizer(folder), [says("user", [load_image(EXAMPLE, folder)])]), load(folder)


def test_devices_are_taken_in_their_order(monkeypatch):
    for there, chosen in (({"cuda", "mps"}, "cuda"), ({"mps"}, "mps"), (set(), "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
        assert run.pick_device("auto") == chosen and run.pick_device("cpu") == "cpu"


def test_ctrl_c_keeps_the_text_so_far_and_a_missing_package_is_named(tmp_path):
    def start(path: str, *more: str) -> subprocess.Popen:
        command, env, pipe = [sys.executable, "run.py", EXAMPLE, *more], os.environ | {"PYTHONPATH": path}, subprocess.PIPE
        return subprocess.Popen(command, cwd=HERE, env=env, text=True, stdout=pipe, stderr=pipe)
    (tmp_path / "torch.py").write_text("import time\nprint('loads', flush=True)\ntime.sleep(60)")
    for process in (start("", "--temperature", "9", "--seed", "1"), start(str(tmp_path))):
        first = process.stdout.readline() if process.args[-1] == EXAMPLE else process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)      # of 1,428 characters
        assert process.returncode == 130 and first and len(out) < 1400 and (first + out)[-1] == "\n" and "Traceback" not in err
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(name='torch')")
    out, err = (process := start(str(tmp_path))).communicate()
    assert process.returncode == 2 and out == "" and re.fullmatch("error: the package torch .*\n", err)


# --------------------------------------------------------------------------- 8. the files say what they do, and are short
def test_the_readme_shows_what_happens_without_extras(capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    examples = structure.readme_examples(HERE, {flag for flag, *_ in run.EXTRAS})
    assert [ask(capsys, *args)[:2] for args, _ in examples] == [(0, out) for _, out in examples] != []
    for code in structure.readme_code(HERE):
        exec(compile(code, "README.md", "exec"), {})
        assert capsys.readouterr().out.strip() != ""


def test_shape_comments_are_true(model):
    inputs = prepared(model, "mixed")
    check = lambda source: shape_comments.check_shape_comments(model, source, inputs.ids.tolist(), inputs.patches, inputs.grids)
    comments = check(SOURCE)
    assert comments.lies == [] and comments.checked == comments.commented() and len(comments.checked) >= 40
    assert all(check(mistakes.plant(SOURCE, truth, lie)).lies for truth, lie in shape_comments.LIES.items())


def test_the_core_runs_without_extras_and_their_flags_name_the_missing_file(tmp_path):
    flags = [["Hi", flag, *["int8"] * ("action" not in how)] for flag, _, how, *_ in run.EXTRAS]
    done = structure.run_core_alone(HERE, tmp_path, [["--model", str(TINY), "--image", EXAMPLE], *flags])
    assert done.stdout.splitlines() == [GOLDEN, "0", *["2"] * len(flags)] and "Traceback" not in done.stderr
    refusals = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for (flag, name, *_), line in zip(run.EXTRAS, refusals, strict=True):
        assert flag in line and f"extras/{name}.py" in line


def test_the_files_are_short_and_read_downwards(folders, capsys):
    report, wrong = structure.check_files(HERE)
    with capsys.disabled():
        print("", *report, sep="\n")
    finished = structure.finish_order(load_weights.__file__, lambda: load(folders["28b"]))
    with pytest.raises(SystemExit):
        runpy.run_path(load_weights.__file__, run_name="__main__")
    assert "python -m extras.check" in capsys.readouterr().err      # where its checks have gone
    assert wrong == [] and finished == sorted(finished) and finished[-1][1] == "load" and len(finished) > 20
