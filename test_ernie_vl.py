"""What is claimed of this project, as tests. No network, no GPU, no transformers: what transformers computes lies in
reference/reference.safetensors, and reference/make_reference.py made it. Where transformers is installed, section 14
compares live; where PyAV is, films are read.

    python -m pytest -q
"""
import ast
import base64
import copy
import dataclasses
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "reference"), str(HERE / "tiny")]

import ernie_vl                                                                                     # noqa: E402
import evaluate                                                                                     # noqa: E402
import load_weights                                                                                 # noqa: E402
import make_reference as ref                                                                        # noqa: E402
import run                                                                                          # noqa: E402
import tokenizer as tokenizer_module                                                                # noqa: E402
import scenes                                                                                       # noqa: E402
import train                                                                                        # noqa: E402
from ernie_vl import (ErnieVL, InputError, RMSNorm, Router, attend, frequencies, generate,      # noqa: E402
                      patch_cells, penalize, positions, rope_angles, rotate_halves, rotate_pairs, sample)
from load_weights import QuantizedLinear, load, read_config                                         # noqa: E402
from tokenizer import (STYLES, ZOOM_TOOL, Box, Clip, Reply, Stream, Tokenizer, chat_style,          # noqa: E402
                       choose_frames, crop, draw_boxes, encode_chat, find_boxes, fit_size, load_media,
                       load_picture, patchify, pixel_budget, read_clip, read_messages, read_tools, render)

torch.set_grad_enabled(False)
torch.set_num_threads(1)      # the small model is 30 times slower when two threads wait for each other
CPU = torch.device("cpu")
REFERENCE = load_file(HERE / "reference" / "reference.safetensors")
EXAMPLE = str(HERE / "examples" / "shapes.png")
SOURCE = (HERE / "ernie_vl.py").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: ref.write_checkpoint(name, root / name) for name in ref.MODELS}


@pytest.fixture(scope="session")
def models(folders):
    return {name: load(folder) for name, folder in folders.items()}


@pytest.fixture
def model(models):
    return models["28b"]


def prepared(model, prompt: str, rule: str = "official"):
    ids, media = ref.prompt_ids(prompt)
    patches = torch.cat([REFERENCE[f"patches.{m}"] for m in media]) if media else None
    return model.prepare(ids, patches, [ref.GRIDS[m] for m in media], rule)


def distance(a, b) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.float() - b.float()).abs().max())


# ------------------------------------------------------------------------------- 1. the same numbers as transformers
@pytest.mark.parametrize("rule", ref.RULES)
@pytest.mark.parametrize("prompt", ref.PROMPTS)
@pytest.mark.parametrize("name", ref.MODELS)
def test_positions_and_logits_equal_transformers(models, name, prompt, rule):
    inputs = prepared(models[name], prompt, rule)
    assert inputs.positions.tolist() == REFERENCE[f"{name}.{prompt}.positions.{rule}"].tolist()
    assert distance(models[name](inputs), REFERENCE[f"{name}.{prompt}.logits.{rule}"]) < 1e-5


@pytest.mark.parametrize("prompt", ref.PROMPTS)
@pytest.mark.parametrize("name", ref.MODELS)
def test_32_greedy_tokens_equal_transformers(models, name, prompt):
    ids = list(generate(models[name], prepared(models[name], prompt, "hf_5_23"), 32, stop=()))
    assert ids == REFERENCE[f"{name}.{prompt}.greedy"].tolist()


@pytest.mark.parametrize("name", ref.MODELS)
def test_every_stage_equals_transformers(models, name):
    """Also which experts are chosen, exactly. A whole-model test alone would not say where a difference comes from."""
    model, types = copy.deepcopy(models[name]), models[name].cfg.text.mlp_layer_types
    routers = [(l, kind) for l in range(3) if types[l] == "sparse" for kind in ("text", "vision")]
    paths = {"vit": "vision_model", "resampler": "resampler_model", "layer.0": "layers.0"}
    paths |= {f"layer.{types.index('sparse')}": f"layers.{types.index('sparse')}"}
    seen = ref.watch(model, paths | {f"router.{l}.{kind}": f"layers.{l}.mlp.{kind}_moe.gate" for l, kind in routers})
    model(prepared(model, "mixed"))
    for stage in paths:
        theirs = REFERENCE[f"{name}.mixed.{stage}"]           # logits reach 4, stages up to 17: the same relative error
        assert distance(seen[stage][0], theirs) < 1e-5 * max(1, theirs.abs().max() / 4), stage
    for stage in (f"router.{l}.{kind}" for l, kind in routers):
        weights, chosen = seen[stage][0]
        assert chosen.tolist() == REFERENCE[f"{name}.mixed.{stage}.chosen"].tolist(), stage
        assert distance(weights, REFERENCE[f"{name}.mixed.{stage}.weights"]) < 1e-5, stage


# --------------------------------------------------------------------------------------------- 2. worked examples
@pytest.mark.parametrize("ids, grids, rule, expected", [
    ([1, 2, 3, 12, *[10] * 6, 13, 4, 5], [(1, 4, 6)], "official",
     ("0 1 2 3 4 4 4 4 4 4 7 8 9", "0 1 2 3 4 4 4 5 5 5 7 8 9", "0 1 2 3 4 5 6 4 5 6 7 8 9")),
    ([1, 14, *[11] * 8, 15, 2, 3], [(4, 4, 4)], "official",
     ("0 1 2 2 2 2 3 3 3 3 4 5 6", "0 1 2 2 3 3 2 2 3 3 4 5 6", "0 1 2 3 2 3 2 3 2 3 4 5 6")),
    ([1, 14, *[11] * 16, 15, 2, 3], [(8, 4, 4)], "official",
     ("0 1 2 2 2 2 3 3 3 3 4 4 4 4 5 5 5 5 6 7 8", "0 1" + " 2 2 3 3" * 4 + " 6 7 8", "0 1" + " 2 3 2 3" * 4 + " 6 7 8")),
    ([1, 14, *[11] * 16, 15, 2, 3], [(8, 4, 4)], "hf_5_23",
     ("0 1 2 2 2 2 3 3 3 3 4 4 4 4 5 5 5 5 4 5 6", "0 1" + " 2 2 3 3" * 4 + " 4 5 6", "0 1" + " 2 3 2 3" * 4 + " 4 5 6")),
    ([1, 2, 12, *[10] * 4, 13, 3, 12, *[10] * 4, 13, 4], [(1, 4, 4), (1, 2, 8)], "official",
     ("0 1 2 3 3 3 3 5 6 7 8 8 8 8 12 13", "0 1 2 3 3 4 4 5 6 7 8 8 8 8 12 13", "0 1 2 3 4 3 4 5 6 7 8 9 10 11 12 13")),
])
def test_positions_of_worked_examples(model, ids, grids, rule, expected):
    axes = positions(torch.tensor(ids), grids, model.cfg, rule).tolist()
    assert [" ".join(map(str, axis)) for axis in axes] == list(expected)


def test_rotary_speeds_are_the_fp32_ones_of_training():
    speeds = frequencies(64, 500_000.0, CPU)
    for slot, anchor in {0: 1.0, 1: 0.8146172166, 20: 1.656044088e-2, 43: 1.482533553e-4, 44: 1.207697424e-4,
                         63: 2.455140702e-6}.items():
        assert math.isclose(speeds[slot], anchor, rel_tol=1e-6), slot
    assert torch.equal(speeds, 1 / 500_000.0 ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128))
    precise = 1 / 500_000 ** (torch.arange(64, dtype=torch.float64) / 64)
    assert (100_000 * (speeds.double() - precise)).abs().max() > 1e-3                  # why float64 would be wrong here
    assert frequencies(20, 10_000.0, CPU)[[0, 1, 19]].tolist() == pytest.approx([1, 0.630957305, 1.584893325e-4], rel=1e-6)


def test_fast_slots_alternate_h_w_and_slow_slots_follow_time(model):
    angles = rope_angles(torch.tensor([[7, 1, 0, 0], [11, 0, 1, 0], [13, 0, 0, 1]]), model.cfg.text)
    anchors = {0: 11.0, 1: 10.59002399, 2: 7.29961395, 43: 0.00192729, 44: 0.00084539, 63: 1.7186e-5}
    assert angles[0][list(anchors)].tolist() == pytest.approx(list(anchors.values()), rel=1e-4)
    moved = [row.nonzero().flatten().tolist() for row in angles[1:]]                   # by t alone, h alone, w alone
    assert moved == [list(range(44, 64)), list(range(0, 44, 2)), list(range(1, 44, 2))]


def test_decoder_rotates_neighbours_and_vit_rotates_halves():
    e0, turn = torch.eye(8)[:1, None], torch.zeros(1, 1, 4)                            # (T, H, d) with channel 0 alone
    turn[..., 0] = 0.3
    expected = torch.tensor([math.cos(0.3), math.sin(0.3)])
    for rotate, pair in ((rotate_pairs, [0, 1]), (rotate_halves, [0, 4])):
        out = rotate(e0, turn.cos(), turn.sin()).flatten()
        assert distance(out[pair], expected) < 1e-6 and out.count_nonzero() == 2


def test_patches_come_in_blocks_of_2x2():
    assert patch_cells(4, 6)[:9].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3], [0, 4]]
    assert sorted(patch_cells(4, 6).tolist()) == [[r, c] for r in range(4) for c in range(6)]


def test_vit_uses_quick_gelu():
    mlp = ernie_vl.VisionMLP(SimpleNamespace(hidden_size=1, intermediate_size=1))
    for name, parameter in mlp.named_parameters():
        parameter.fill_("weight" in name)
    values = mlp(torch.tensor([[1.0], [-1.0], [3.0]])).flatten().tolist()
    assert values == pytest.approx([0.84579575, -0.15420423, 2.98192883])


def test_router_bias_chooses_and_does_not_weigh():
    router = Router(SimpleNamespace(moe_k=2, moe_num_experts=4, hidden_size=1))
    state = {"weight": torch.tensor([[1.0], [2], [3], [4]]), "e_score_correction_bias": torch.tensor([0.5, 0, 0, 0])}
    router.load_state_dict(state)
    weights, chosen = router(torch.ones(1, 1))
    assert chosen.tolist() == [[3, 0]] and weights[0].tolist() == pytest.approx([0.95257413, 0.04742587], abs=1e-6)


def test_each_modality_has_its_own_correction_bias(model):
    moe = copy.deepcopy(model.layers[1].mlp)
    moe.vision_moe.gate.e_score_correction_bias[5] = 100
    seen = ref.watch(moe, {"text": "text_moe.gate", "vision": "vision_moe.gate"})
    moe(torch.randn(64, ref.D, generator=torch.manual_seed(0)), torch.arange(64) % 2 == 1)
    (_, text), (_, vision) = seen["text"][0], seen["vision"][0]
    assert (vision == 5).any(-1).all() and len(vision) == 32 and not (text == 5).any(-1).all()


def test_every_norm_has_its_own_epsilon(model):
    """Wrong epsilons are invisible in the whole model (anchors: 4e-6), so small inputs go through each norm alone."""
    kinds = {nn.LayerNorm: 0, RMSNorm: 0}
    for name, norm in model.named_modules():
        if type(norm) in kinds:
            x = torch.randn(4, len(norm.weight), generator=torch.manual_seed(1)).double() * 1e-3
            if isinstance(norm, RMSNorm):
                y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
            else:
                y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
                y = y * norm.weight + norm.bias
            assert distance(norm(x.float()), y) < 1e-5, name
            kinds[type(norm)] += 1
    assert list(kinds.values()) == [2 * 2 + 1 + 2, 2 * 3 + 1 + 1]


def test_query_head_j_reads_key_head_j_over_group():
    v = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 5, 4)                        # key head 0 says 0, key head 1 says 1
    for tokens in (1, 3, 5):                                                           # one token, a chunk, a whole prompt
        assert attend(torch.randn(4, tokens, 4), torch.randn(2, 5, 4), v)[:, 0, 0].tolist() == pytest.approx([0, 0, 1, 1])


def test_frames_and_pictures_do_not_see_each_other(model):
    vit, (a, b, c) = model.vision_model, REFERENCE["patches.clip"][:72].split(24)
    clip, changed = vit(torch.cat((a, b)), [(2, 4, 6)]), vit(torch.cat((a, c)), [(2, 4, 6)])
    assert torch.equal(clip[:24], changed[:24]) and distance(clip[24:], changed[24:]) > 0.1
    assert distance(vit(torch.cat((c, b)), [(1, 4, 6), (1, 6, 4)])[:24], vit(c, [(1, 4, 6)])) < 1e-6


def test_a_picture_is_a_clip_of_two_equal_frames(model):
    x = torch.randn(24, ref.VIT_WIDTH, generator=torch.manual_seed(2))
    assert distance(model.resampler_model(x, [(1, 4, 6)]), model.resampler_model(torch.cat((x, x)), [(2, 4, 6)])) < 1e-6


def test_consecutive_frames_are_paired(model):
    x = torch.randn(4 * 24, ref.VIT_WIDTH, generator=torch.manual_seed(2))
    halves = [model.resampler_model(half, [(2, 4, 6)]) for half in x.chunk(2)]
    assert distance(model.resampler_model(x, [(4, 4, 6)]), torch.cat(halves)) < 1e-6


@torch.inference_mode()
@pytest.mark.parametrize("name", ref.MODELS)
def test_long_prompts_and_many_pictures_in_pieces_change_nothing(models, name, monkeypatch):
    """Cuts inside pictures too, and a ViT that sees no more than 30 patches at a time."""
    model, calls = models[name], []
    inputs, whole = prepared(model, "mixed"), models[name](prepared(model, "mixed"))
    monkeypatch.setattr(ernie_vl, "CHUNK", 7)
    monkeypatch.setattr(ernie_vl, "VIT_BATCH", 30)
    hooks = [model.layers[0].register_forward_hook(lambda layer, given, out: calls.append(len(out))),
             model.vision_model.register_forward_hook(lambda vit, given, out: calls.append(-len(out)))]
    pieces, last = model(inputs, model.new_cache()), model(inputs, model.new_cache(), only_last=True)
    for hook in hooks:
        hook.remove()
    assert distance(pieces, whole) < 1e-5 and distance(last, whole[-1:]) < 1e-5
    assert max(calls) == 7 and min(calls) >= -48 and len([c for c in calls if c < 0]) > 4     # a pair of frames has up to 48


def test_one_placeholder_id_for_pictures_and_clips_is_enough(model):
    """Released prompts use the picture's placeholder in clips too."""
    two = prepared(model, "mixed")
    one = model.prepare([ref.IMAGE if i == ref.VIDEO else i for i in two.ids.tolist()], two.patches, two.grids)
    assert torch.equal(model(one), model(two))


def test_text_experts_see_text_and_shared_experts_see_everyone(models, model):
    other, text, mixed = copy.deepcopy(model), prepared(model, "text"), prepared(model, "mixed")
    before = other(text), other(mixed)
    for layer in other.layers[1:]:
        for parameter in layer.mlp.vision_moe.parameters():
            parameter.mul_(-2)
    assert torch.equal(other(text), before[0]) and distance(other(mixed), before[1]) > 0.1
    moe, x = copy.deepcopy(model.layers[1].mlp), torch.randn(6, ref.D, generator=torch.manual_seed(3))
    vision = torch.tensor([0, 1, 1, 0, 1, 0]).bool()
    both, shared = moe(x, vision), moe.shared_experts(x)
    moe.shared_experts = None
    assert distance(both - moe(x, vision), shared) < 1e-5 and shared.abs().amax(-1).min() > 0.1
    assert models["424b"].layers[2].mlp.shared_experts is None


# --------------------------------------------------------------------------------------- 3. cache, and generation
def piece(inputs, begin: int, end: int, patches=slice(0, 0), grids=()):
    """The tokens begin..end, with those pictures that stand among them."""
    return inputs._replace(ids=inputs.ids[begin:end], positions=inputs.positions[:, begin:end],
                           is_vision=inputs.is_vision[begin:end], patches=inputs.patches[patches], grids=list(grids))


@pytest.mark.parametrize("name", ref.MODELS)
def test_cache_changes_nothing(models, name):
    """Token by token; in two chunks, of which the second has a picture of its own; token by token after a picture."""
    model, everything = models[name], slice(None)
    text, two = prepared(models[name], "text"), prepared(models[name], "two pictures")
    wide, T = ref.GRIDS["wide"][1] * ref.GRIDS["wide"][2], len(two.ids)
    cuts = [(text, [piece(text, i, i + 1) for i in range(len(text.ids))]),
            (two, [piece(two, 0, 10, slice(wide), two.grids[:1]), piece(two, 10, T, slice(wide, None), two.grids[1:])]),
            (two, [piece(two, 0, T - 4, everything, two.grids), *(piece(two, i, i + 1) for i in range(T - 4, T))])]
    for whole, pieces in cuts:
        cache = model.new_cache()
        assert distance(torch.cat([model(p, cache) for p in pieces]), model(whole)) < 1e-5
        assert [kv.length for kv in cache.layers] == [len(whole.ids)] * 3


def counting(model) -> list[int]:
    """How many tokens each call of the model computes, from now on."""
    counts = []
    model.layers[0].register_forward_hook(lambda layer, given, out: counts.append(len(out)))
    return counts


@torch.inference_mode()
def test_a_second_turn_computes_only_its_own_tokens(model):
    """A picture in each turn: what is in the cache is left alone, and the logits are those of a full recompute."""
    first, cache, edited = prepared(model, "picture"), model.new_cache(), copy.deepcopy(model)
    counts = counting(edited)
    answer = list(generate(edited, first, 3, stop=(), cache=cache))
    two = ref.prompt_ids("two pictures")[0]
    ids = [*first.ids.tolist(), *answer, 5, *two]
    second = model.prepare(ids, torch.cat((first.patches, prepared(model, "two pictures").patches)),
                           first.grids + prepared(model, "two pictures").grids)
    follow = list(generate(edited, second, 4, stop=(), cache=cache))
    assert counts == [len(first.ids), 1, 1, len(two) + 2, 1, 1, 1]           # + the last answer token, and 5
    assert follow == list(generate(model, second, 4, stop=()))
    done = cache.keep(model.marks(second))
    assert done == len(ids) - 1 and distance(model(model.rest(second, done), cache), model(second)[-1:]) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("change, kept", [("none", 33), ("text behind", 20), ("picture", 6), ("beginning", 0)])
def test_a_cache_is_used_as_far_as_the_prompts_agree(model, change, kept):
    """Placeholders of different pictures have the same ids; the pictures are compared, and none is kept in half."""
    grid, patches = ref.GRIDS["wide"], REFERENCE["patches.wide"]
    size = grid[1] * grid[2] // 4
    prompt = [1, 2, 3, 4, 5, 12, *[10] * size, 13, *range(20, 33 + 1 - 7 - size + 20)]
    before, after = model.prepare(prompt, patches, [grid]), {
        "none": (prompt, patches), "text behind": (prompt[:20] + [60] * 9, patches), "picture": (prompt, patches + 1),
        "beginning": ([9, *prompt[1:]], patches)}[change]
    after, cache = model.prepare(*after, [grid]), model.new_cache()
    list(generate(model, before, 1, stop=(), cache=cache))
    done = cache.keep(model.marks(after))
    assert done == kept and {kv.length for kv in cache.layers} == {kept}
    assert distance(model(model.rest(after, done), cache), model(after)[done:]) < 1e-5


@torch.inference_mode()
def test_a_picture_at_the_end_of_a_prompt_is_not_kept_in_half(model):
    grid, patches, cache = ref.GRIDS["wide"], REFERENCE["patches.wide"], model.new_cache()
    inputs = model.prepare([1, 2, 12, *[10] * (grid[1] * grid[2] // 4)], patches, [grid])
    for turn in range(2):
        (token,) = generate(model, inputs, 1, stop=(), cache=cache)
        assert token == int(model(inputs)[-1].argmax())
    assert cache.keep(model.marks(inputs)) == 3


def test_the_model_keeps_no_state_and_only_last_is_the_last_row(model):
    first, mixed = model(prepared(model, "text")), prepared(model, "mixed")
    list(generate(model, mixed, 3, stop=()))
    assert distance(model(mixed, only_last=True), model(mixed)[-1:]) < 1e-6
    assert torch.equal(model(prepared(model, "text")), first)


def test_same_seed_same_ids_and_narrow_sampling_is_greedy(model):
    run = lambda **options: list(generate(model, prepared(model, "picture"), 12, stop=(), **options))
    assert run(temperature=1.0, seed=5) == run(temperature=1.0, seed=5) != run(temperature=1.0, seed=6)
    assert run() == run(temperature=1.5, top_k=1, seed=5) == run(temperature=1.5, top_p=1e-9, seed=5)


def test_sampling_keeps_the_smallest_likeliest_set():
    logits, generator = torch.tensor([0.2, 0.5, 0.3]).log(), torch.Generator().manual_seed(0)
    drawn = lambda top_k=0, top_p=1.0: {sample(logits, 1.0, top_k, top_p, generator) for _ in range(200)}
    assert drawn() == {0, 1, 2} and drawn(top_k=2) == {1, 2} and drawn(top_p=0.49) == {1} and drawn(top_p=0.51) == {1, 2}
    assert drawn(top_k=2, top_p=0.6) == {1}      # k first: 0.5 is then 0.625 of what is left
    assert sample(logits, 1e-42, 0, 1.0, generator) == 1


def test_forbidden_ids_never_appear(model):
    greedy = REFERENCE["28b.picture.greedy"].tolist()
    for options in ({}, {"temperature": 2.0, "seed": 1}):
        ids = list(generate(model, prepared(model, "picture"), 32, stop=(), forbidden=tuple(set(greedy)), **options))
        assert len(ids) == 32 and not set(ids) & set(greedy)


def test_repetition_penalty_lowers_what_was_said(model):
    assert penalize(torch.tensor([2.0, -2.0, 1.0]), [0, 1, 1], 2.0).tolist() == [1.0, -4.0, 1.0]
    plain, varied = ([*generate(model, prepared(model, "text"), 24, stop=(), repetition_penalty=p)] for p in (1.0, 1.5))
    assert len(set(varied)) > len(set(plain))


def test_generation_stops_at_a_stop_id_at_the_limit_and_at_the_end_of_the_context(model):
    inputs, short = prepared(model, "mixed"), copy.copy(model)
    text = dataclasses.replace(model.cfg.text, max_position_embeddings=len(inputs.ids) + 4)
    short.cfg = dataclasses.replace(model.cfg, text=text)
    free = list(generate(model, inputs, 8, stop=()))
    assert list(generate(model, inputs, 8, stop=(free[5],))) == free[: free.index(free[5])]
    assert len(free) == 8 and list(generate(model, inputs, 0)) == []
    assert list(generate(short, inputs, stop=())) == free[:4]


@pytest.mark.parametrize("token", [ref.IMAGE, ref.VIDEO_START])
def test_generated_ids_go_to_text_experts_whatever_they_say(model, token):
    model = copy.deepcopy(model)
    seen = ref.watch(model, {kind: f"layers.1.mlp.{kind}_moe.gate" for kind in ("text", "vision")})
    others = tuple(i for i in range(ref.VOCAB) if i != token)
    assert list(generate(model, prepared(model, "picture"), 4, stop=(), forbidden=others)) == [token] * 4
    assert [len(seen[kind]) for kind in ("text", "vision")] == [4, 1]                  # the prompt alone has vision tokens


# --------------------------------------------------------------------------- 4. what is refused, and in which words
ROWS = torch.zeros(24, 588)


@pytest.mark.parametrize("ids, patches, grids, message", [
    ([12, *[10] * 5, 13], ROWS, [(1, 4, 6)], "make 6 tokens, and the prompt has 5"),
    ([3, 4], ROWS, [(1, 4, 6)], "make 6 tokens, and the prompt has 0"),
    ([12, 10, 13], None, [], "make 0 tokens, and the prompt has 1"),
    ([12, *[10] * 6, 13], ROWS, [(1, 3, 8)], r"\(1, 3, 8\) cannot be merged"),
    ([14, *[11] * 6, 15], torch.zeros(36, 588), [(3, 2, 6)], r"\(3, 2, 6\) cannot be merged"),
    ([12, *[10] * 6, 13], ROWS[:23], [(1, 4, 6)], r"shape \(24, 588\), and these are \(23, 588\)"),
    ([12, *[10] * 6, 13], ROWS[:, :587], [(1, 4, 6)], r"shape \(24, 588\), and these are \(24, 587\)"),
    ([3, 72], None, [], "0..71, and these reach from 3 to 72"),
    ([-1, 3], None, [], "0..71, and these reach from -1 to 3"),
    ([3] * 4097, None, [], "4,097 tokens and the context holds 4,096"),
    ([], None, [], "the prompt is empty"),
    ([12, 10, 10, 10, 5, 10, 10, 10, 13], ROWS, [(1, 4, 6)], "the 6 placeholders of one picture must stand side by side"),
])
def test_prompts_that_do_not_fit_are_refused(model, ids, patches, grids, message):
    with pytest.raises(InputError, match=message):
        model.prepare(ids, patches, grids)


# --------------------------------------------------------------------------------------------------- 5. the loader
ABSENT = object()


def write(folder: Path, tensors: dict, config: dict, shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ABSENT}))
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: x.contiguous() for name, x in tensors.items() if files[name] == file}, folder / file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def flat_config(name: str, **changes) -> dict:
    """The layout of the released files: everything at the top, lists of one number a modality."""
    nested, experts = ref.config(name), ref.MODELS[name]["experts"]
    text, vision, layers = nested["text_config"], nested["vision_config"], ref.MODELS[name]["layers"]
    copied = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
              "max_position_embeddings rms_norm_eps moe_k moe_intermediate_size moe_num_shared_experts tie_word_embeddings")
    return {key: text[key] for key in copied.split()} | {
        "model_type": "ernie4_5_moe_vl", "rope_theta": 500_000, "freq_allocation": 20, "im_patch_id": ref.IMAGE,
        "image_start_token_id": ref.IMAGE_START, "image_end_token_id": ref.IMAGE_END, "moe_num_experts": [experts] * 2,
        "video_start_token_id": ref.VIDEO_START, "video_end_token_id": ref.VIDEO_END, "moe_layer_interval": 1,
        "moe_layer_start_index": [layers.index("sparse")] * 2, "moe_layer_end_index": [len(layers) + 1, len(layers)],
        "moe_use_aux_free": True, "vision_config": {
            "depth": vision["depth"], "embed_dim": ref.VIT_WIDTH, "hidden_size": ref.VIT_WIDTH, "num_heads": ref.VIT_HEADS,
            "mlp_ratio": ref.VIT_MLP / ref.VIT_WIDTH, "hidden_act": "quick_gelu"}} | changes


def text_alone(tensors: dict, experts: int) -> dict:
    """What a text-only checkpoint has of these tensors. Its routers are not transposed."""
    out = {}
    for name, x in tensors.items():
        number = re.search(r"\.experts\.(\d+)\.", name)
        if not re.search(r"vision_model|resampler|weight_1$", name) and not (number and int(number[1]) >= experts):
            out[name] = x.T if name.endswith("mlp.gate.weight") else x[:1] if "moe_statics" in name else x
    return out


def in_memory(tensors: dict, experts: int) -> dict:
    """The names and shapes of transformers in memory: experts stacked in numeric order, gate rows on top of up rows."""
    out, stacks = {}, {}
    for name, x in tensors.items():
        name = re.sub(r"(?<=linear\.)[023]", lambda child: {"0": "fc1", "2": "fc2", "3": "ln"}[child[0]], name)
        name = re.sub(r"^model\.(?=embed|norm|layers)", "model.language_model.", name)
        name = re.sub("^vision_model", "model.vision_tower", name)
        moe = [name.split(".mlp.")[0] + f".mlp.{kind}_moe." for kind in ("text", "vision")]
        if number := re.search(r"\.experts\.(\d+)\.(\w+)_proj", name):
            kind, e = divmod(int(number[1]), experts)
            stacks.setdefault(moe[kind], {}).setdefault(e, {})[number[2]] = x
        elif "moe_statics" in name:
            out |= {f"{at}gate.moe_statics.e_score_correction_bias": row[None] for at, row in zip(moe, x)}
        elif ".mlp.gate.weight" in name:
            out[f"{moe[name.endswith('_1')]}gate.weight"] = x.T
        else:
            out[name] = x
    for at, stack in stacks.items():
        rows = [stack[e] for e in range(experts)]
        out[f"{at}experts.gate_up_proj"] = torch.stack([torch.cat((row["gate"], row["up"])) for row in rows])
        out[f"{at}experts.down_proj"] = torch.stack([row["down"] for row in rows])
    return out


# A tied model may store a head all the same; mtp: heads that predict several tokens ahead.
LEFTOVERS = {"lm_head.weight": torch.ones(ref.VOCAB, ref.D), "model.mtp_block.0.mlp.weight": torch.ones(3)}
SPELLINGS = {
    "hub": lambda name, tensors: tensors,
    "save_pretrained": lambda name, tensors: {re.sub("^vision", "model.vision", at): x for at, x in tensors.items()},
    "in memory": lambda name, tensors: in_memory(tensors, ref.MODELS[name]["experts"]),
    "with leftovers": lambda name, tensors: LEFTOVERS | tensors,
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ref.MODELS)
def test_all_spellings_of_a_checkpoint_are_the_same_model(models, tmp_path, name, spelling, shards):
    tensors = SPELLINGS[spelling](name, ref.hub_tensors(name))
    other = load(write(tmp_path, tensors, ref.config(name), shards)).state_dict()
    mine = models[name].state_dict()
    assert other.keys() == mine.keys()
    assert [key for key in mine if not torch.equal(other[key], mine[key])] == []


@pytest.mark.parametrize("name, changes", [
    ("28b", {}), ("28b", {"moe_layer_start_index": 1}), ("28b", {"moe_layer_end_index": None, "moe_num_experts": 12}),
    ("28b", {"moe_layer_end_index": -1}), ("28b", {"moe_layer_end_index": [-1, 1]}), ("28b", {"moe_layer_interval": None}), ("28b", {"moe_layer_end_index": ABSENT, "moe_layer_interval": ABSENT}),
    ("28b", {"freq_allocation": ABSENT, "rope_theta": ABSENT}), ("28b", {"rope_scaling": {"mrope_section": [22, 22, 20]}}),
    ("424b", {}), ("424b", {"moe_num_shared_experts": None}), ("424b", {"moe_num_shared_experts": ABSENT}),
    ("424b", {"moe_layer_start_index": 2, "tie_word_embeddings": ABSENT})])
def test_flat_and_nested_configs_mean_the_same(name, changes):
    flat = {key: value for key, value in flat_config(name, **changes).items() if value is not ABSENT}
    assert read_config(flat) == dataclasses.replace(read_config(ref.config(name)), video_token_id=ref.IMAGE)


@pytest.mark.parametrize("stored, others", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_routers_and_their_biases_are_fp32_whatever_is_stored(tmp_path, stored, others):
    tensors = {key: x.to(stored) for key, x in ref.hub_tensors("28b").items()}
    small = load(write(tmp_path, tensors, ref.config("28b")))
    for name, parameter in small.named_parameters():
        router = ".gate.weight" in name or "correction_bias" in name
        assert parameter.dtype == (torch.float32 if router else others), name
    assert small(prepared(small, "mixed")).dtype == others and small(prepared(small, "mixed")).isfinite().all()


def test_text_only_checkpoints_answer_like_the_text_half_of_a_vl_model(model, tmp_path):
    config = flat_config("28b", model_type="ernie4_5_moe", vision_config=ABSENT, moe_num_experts=12, moe_layer_start_index=1,
                         moe_intermediate_size=ref.WIDTHS[0], moe_layer_end_index=-1)
    text = load(write(tmp_path, text_alone(ref.hub_tensors("28b"), 12), config))
    inputs = prepared(model, "text")
    assert distance(text(text.prepare(inputs.ids.tolist())), model(inputs)) < 1e-5
    with pytest.raises(InputError, match="text-only checkpoint"):
        text.prepare([12, *[10] * 6, 13], ROWS, [(1, 4, 6)])


def test_dense_text_checkpoint_with_an_explicit_head_dim(model, tmp_path):
    """Layer 0 of the small model is dense, so a dense model of this one layer must continue like it."""
    tensors = {key: x for key, x in text_alone(ref.hub_tensors("28b"), 12).items() if not re.search(r"layers\.[12]\.", key)}
    no_experts = {key: ABSENT for key in flat_config("28b") if key.startswith(("moe_", "vision_"))}
    dense = load(write(tmp_path, tensors, flat_config("28b", model_type="ernie4_5", num_hidden_layers=1, **no_experts)))
    inputs, first = prepared(model, "text"), copy.deepcopy(model)
    first.layers = first.layers[:1]
    assert dense.cfg.text.head_dim == 128 != ref.D // ref.HEADS
    assert distance(dense(dense.prepare(inputs.ids.tolist())), first(inputs)) < 1e-5


# The released config.json files, as far as the model reads them, and their numbers of parameters.
VISION = dict(depth=32, embed_dim=1280, hidden_size=1280, hidden_act="quick_gelu", mlp_ratio=4, num_heads=16, in_channels=3,
              patch_size=14, spatial_merge_size=2)
COMMON = dict(vocab_size=103424, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500_000, hidden_act="silu",
              use_bias=False)
SMALL = COMMON | dict(hidden_size=2560, intermediate_size=12288, num_hidden_layers=28, num_attention_heads=20, moe_k=6,
                      num_key_value_heads=4, moe_num_shared_experts=2, moe_layer_interval=1, tie_word_embeddings=True)
LARGE = COMMON | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=54, num_attention_heads=64, moe_k=8,
                      num_key_value_heads=8, moe_layer_start_index=3, moe_layer_interval=1, tie_word_embeddings=False)
VL_28B = SMALL | dict(model_type="ernie4_5_moe_vl", moe_num_experts=[64, 64], moe_intermediate_size=[1536, 512],
                      moe_layer_start_index=[1, 1], moe_layer_end_index=[29, 28], im_patch_id=100295, pixel_hidden_size=1280,
                      image_start_token_id=101304, image_end_token_id=101305, video_start_token_id=101306,
                      video_end_token_id=101307, rope_scaling={"type": "default", "mrope_section": [22, 22, 20]},
                      spatial_conv_size=2, temporal_conv_size=2, vision_config=VISION)
RELEASED = {
    "VL-28B-A3B": (VL_28B, 29_399_294_336, 1),
    "VL-424B-A47B": (LARGE | dict(model_type="ernie4_5_moe_vl", moe_num_experts=[64, 64], moe_intermediate_size=[3584, 1536],
                                  freq_allocation=20, vision_config=VISION), 423_526_285_184, 3),
    "21B-A3B": (SMALL | dict(model_type="ernie4_5_moe", moe_num_experts=64, moe_intermediate_size=1536,
                             moe_layer_start_index=1, moe_layer_end_index=27), 21_825_437_888, 1),
    "300B-A47B": (LARGE | dict(model_type="ernie4_5_moe", moe_num_experts=64, moe_intermediate_size=3584,
                               moe_layer_end_index=53), 299_484_163_264, 3),
    "0.3B": (COMMON | dict(model_type="ernie4_5", hidden_size=1024, intermediate_size=3072, num_hidden_layers=18,
                           num_attention_heads=16, num_key_value_heads=2, head_dim=128, tie_word_embeddings=True),
             360_748_032, 18),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_numbers_of_parameters(name):
    raw, parameters, dense = RELEASED[name]
    cfg = read_config(raw)
    with torch.device("meta"):
        assert sum(x.numel() for x in ErnieVL(cfg).state_dict().values()) == parameters
    assert cfg.text.mlp_layer_types.count("dense") == dense and cfg.text.rope_theta == 500_000
    assert cfg.text.mrope_section == ((22, 22, 20) if cfg.vision else (32, 32, 0))


@pytest.fixture
def shapes_28b(monkeypatch):
    """Names and shapes of the tensors of ERNIE-4.5-VL-28B-A3B-PT."""
    real = dict(D=2560, HEADS=20, KV_HEADS=4, HEAD_DIM=128, DENSE=12288, WIDTHS=(1536, 512), VOCAB=103424, VIT_DEPTH=32,
                VIT_WIDTH=1280, VIT_HEADS=16, VIT_MLP=5120,
                MODELS={"real": dict(tie=True, layers=("dense",) + ("sparse",) * 27, shared=2, experts=64, k=6)})
    with monkeypatch.context() as patch:
        for name, value in real.items():
            patch.setattr(ref, name, value)
        shapes = ref.hub_shapes("real")
    assert len(shapes) == 11_105
    return shapes


def test_command_line_needs_config_and_index_only(shapes_28b, tmp_path):
    write(tmp_path, {}, VL_28B)
    index = {name: f"model-{i % 12:05d}.safetensors" for i, name in enumerate(shapes_28b)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    out = subprocess.run([sys.executable, "load_weights.py", tmp_path], cwd=HERE, capture_output=True, text=True)
    assert out.returncode == 0 and out.stderr == ""
    for fact in ("29,399,294,336", "1 dense, 27 sparse", "0 of 12 here", "11,105 stored", "0 missing, 0 left over"):
        assert fact in out.stdout, out.stdout


def sparse_files(folder: Path) -> bool:
    with open(folder / "hole", "wb") as file:
        file.truncate(1 << 30)
    return (folder / "hole").stat().st_blocks * 512 < 1 << 20


def write_zeros(shapes: dict, folder: Path, shards: int) -> None:
    """bf16 zeros that take no room: a header, and a hole of the right length."""
    names, index = list(shapes), {}
    for i in range(shards):
        header, end, file = {}, 0, f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        for name in names[i * len(names) // shards : (i + 1) * len(names) // shards]:
            begin, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
            index[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_28b_loads_in_seconds_and_stays_on_disk(shapes_28b, tmp_path):
    """59 GB of weights; what the process owns, pages of files excluded, stays below 1 GB while it writes a token."""
    if not Path("/proc/self/status").exists() or not sparse_files(tmp_path):
        pytest.skip("needs /proc and a file system with sparse files")
    write(tmp_path, {}, VL_28B)
    write_zeros(shapes_28b, tmp_path, 12)
    script = """if True:
        import json, sys, time, torch
        from ernie_vl import generate
        from load_weights import load
        torch.set_num_threads(1)
        start = time.time()
        model = load(sys.argv[1])
        seconds = time.time() - start
        token = next(generate(model, model.prepare([1])))
        own = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
        print(json.dumps([seconds, token, own, sum(p.nbytes for p in model.state_dict().values())]))"""
    out = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=HERE, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    seconds, token, own, stored = json.loads(out.stdout)
    assert seconds < 10 and own < 1e9 and stored > 58e9 and token == 0, (seconds, own, stored, token)


ONES = {f"model.{name}": torch.ones(shape) for name, shape in
        {"nrom.weight": 96, "layers.1.extra.weight": 2, "norm.weight": 95, "layers.1.mlp.gate.weight": (12, 96)}.items()}


@pytest.mark.parametrize("dropped, added, message", [
    ("model.layers.1.mlp.experts.13.up_proj.weight", "", r"vision_moe.experts.1.up_proj.weight \(14, 96\) is missing"),
    ("model.norm.weight", "model.nrom.weight", r"norm.weight \(96,\) is missing .*closest.*nrom.weight.* and 1 more"),
    ("", "model.layers.1.extra.weight", "model.layers.1.extra.weight is not a tensor of this model"),
    ("", "model.norm.weight", r"\(96,\),? and model.norm.weight .*\(95,\)"),
    ("", "model.layers.1.mlp.gate.weight", r"text_moe.gate.weight should .*\(12, 96\)"),
])
def test_tensors_that_do_not_fit_are_refused(tmp_path, dropped, added, message):
    tensors = ref.hub_tensors("28b") | ({added: ONES[added]} if added else {})
    tensors.pop(dropped, None)
    with pytest.raises(InputError, match=message):
        load(write(tmp_path, tensors, ref.config("28b")))


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl', and these can be loaded"),
    ({"rope_scaling": {"type": "yarn"}}, "type 'yarn', and only 'default'"),
    ({"rope_scaling": {"mrope_section": [16, 24, 24]}}, r"\(16, 24, 24\); h must equal w, the sum be 64"),
    ({"moe_num_experts": [12, 8]}, r"unequal numbers of experts, \[12, 8\]"),
    ({"hidden_size": None}, "no hidden_size"),
    ({"vision_config": None}, "no vision_config"),
    ({"vision_config": 5}, "wrong type"),
    ({"rope_theta": "banana"}, "wrong type"),
    ({"rope_theta": math.nan}, "rope_theta"),
    ({"moe_layer_interval": 0}, "wrong type"),
    ({"moe_k": 13}, "moe_k, experts and widths"),
    ({"vocab_size": -1}, "vocab_size"),
    ({"num_attention_heads": 3}, "numbers of heads"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
    ({"rope_scaling": None, "freq_allocation": 90}, "h must equal w"),
])
def test_configs_of_no_released_model_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        read_config(flat_config("28b", **changes))


@pytest.mark.parametrize("breaks, message", [
    (lambda at: (at / "model-00002-of-00003.safetensors").unlink(), "lacks 1 of its files, model-00002-of-00003"),
    (lambda at: os.truncate(at / "model-00002-of-00003.safetensors", 9_000), "00002-of-00003.safetensors is truncated"),
    (lambda at: save_file({}, at / "model-00002-of-00003.safetensors"), "is missing.* and 75 more, which python load_weights.py"),
    (lambda at: [file.unlink() for file in at.glob("model*")], r"no \*.safetensors files"),
    (lambda at: write(at, {"ernie.embed_tokens.weight": torch.ones(2)}, ref.config("28b"), 2), "-Paddle checkpoint"),
    (lambda at: (at / "config.json").unlink(), "config.json is missing"),
    (lambda at: (at / "config.json").write_text("{"), "config.json is no valid JSON"),
])
def test_folders_with_damaged_files_are_refused(tmp_path, breaks, message):
    breaks(write(tmp_path, ref.hub_tensors("28b"), ref.config("28b"), 3))
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_hub_ids_are_found_in_the_local_cache_only(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="baidu/X is neither a folder nor a model in the local Hugging Face cache"):
        load_weights.find_folder("baidu/X")
    repository = tmp_path / "models--baidu--X"
    for commit in ("aaa", "bbb"):
        (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("aaa")
    assert load_weights.find_folder("baidu/X") == repository / "snapshots" / "aaa"


# ------------------------------------------------------------------------------------ 5b. quantising, and small machines
@pytest.mark.parametrize("kind, columns", [("int8", 96), ("int8", 48), ("int4", 256), ("int4", 64), ("int4", 96), ("int4", 48)])
def test_weights_are_rounded_to_the_nearest_number_they_can_be(kind, columns):
    """Groups of 128, 64, 32 and 16. Half a step, and what bf16 loses of scale and offset."""
    weight = torch.randn(32, columns, generator=torch.manual_seed(0)) * 0.1 + 0.05
    layer = QuantizedLinear(columns, 32, kind)
    numbers, scale = layer.quantize(weight)
    layer.load_state_dict({"weight": numbers, "scale": scale}, assign=True)
    if kind == "int8":
        step, found = weight.abs().amax(1, keepdim=True) / 127, numbers.float() * scale.float()[:, None]
    else:
        group = next(g for g in (128, 64, 32, 16) if columns % g == 0)
        parts = weight.view(32, -1, group)
        step = ((parts.amax(-1) - parts.amin(-1)) / 15).repeat_interleave(group, 1)
        pairs = torch.stack((numbers % 16, numbers // 16), -1).view(32, -1, group).float()
        found = ((pairs - 8) * scale[..., 0].T.float()[..., None] + scale[..., 1].T.float()[..., None]).view(32, columns)
        assert numbers.nbytes + scale.nbytes == 32 * columns // 2 + 4 * 32 * columns // group
    assert ((found - weight).abs() <= 0.55 * step + 0.01 * weight.abs().max()).all()
    assert distance(layer.dequantized(layer.weight, layer.scale), found) < 0.01
    packed = copy.deepcopy(layer)
    packed.weight = nn.Parameter(packed.pack(numbers), requires_grad=False)
    for rows in (1, 5):
        x = torch.randn(rows, columns, generator=torch.manual_seed(1))
        exact = x.bfloat16().float() @ found.T
        assert distance(layer(x), exact) < 0.02 * exact.abs().max() and distance(packed(x), exact) < 0.02 * exact.abs().max()
        assert layer(x.bfloat16()).dtype == torch.bfloat16 and layer(x).dtype == torch.float32


@pytest.mark.parametrize("kind, error, saved", [("int8", 0.01, 0.95), ("int4", 0.1, 1.2)])
def test_a_quantised_copy_is_what_quantising_while_loading_gives(tmp_path, kind, error, saved):
    """And it is close to the checkpoint: the error is the logits' mean one, in parts of their mean size, over the tokens of four
    true answers, which alone are trained; measured 0.007 and 0.075.
    saved: bytes of the two that each weight of the decoder takes in the checkpoint."""
    tokenizer, exact = Tokenizer(HERE / "tiny"), load(HERE / "tiny")
    load_weights.save_quantized(HERE / "tiny", kind, tmp_path / "small")
    now, copied = load(HERE / "tiny", quantize=kind), load(tmp_path / "small")
    question = [{"role": "user", "content": [{"type": "text", "text": "Describe this image."}, {"type": "image", "image": EXAMPLE}]}]
    given = exact.prepare(*encode_chat(tokenizer, question))
    assert torch.equal(now(given), copied(given))
    pack = train.Pack(tokenizer, exact.cfg, [("describe", scenes.example("describe", seed)._replace(more=())) for seed in range(4)])
    with train.apart(pack.lengths):
        logits, rounded = (model(pack.inputs)[pack.targets >= 0] for model in (exact, now))
    assert 0 < (rounded - logits).abs().mean() < error * logits.abs().mean()
    assert encode_chat(Tokenizer(tmp_path / "small"), question).ids == given.ids.tolist()
    weights = sum(linear.weight.numel() for linear in exact.layers.modules() if isinstance(linear, nn.Linear))
    bytes_of = lambda folder: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert bytes_of(tmp_path / "small") < bytes_of(HERE / "tiny") - saved * weights
    with pytest.raises(InputError, match="quantised already"):
        load(tmp_path / "small", quantize="int4")
    with pytest.raises(InputError, match="is there already"):
        load_weights.save_quantized(HERE / "tiny", kind, tmp_path / "small")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_a_quantised_copy_can_be_read_by_whom_the_original_can_and_ctrl_c_leaves_nothing(tmp_path):
    shutil.copytree(HERE / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("*.pt", "*.py", "__pycache__"))
    (tmp_path / "tiny").chmod(0o755)
    load_weights.save_quantized(tmp_path / "tiny", "int8", tmp_path / "small")
    assert (tmp_path / "small").stat().st_mode == (tmp_path / "tiny").stat().st_mode
    stopped = """if True:
        import os, runpy, safetensors.torch, signal, sys
        safetensors.torch.save_file = lambda *args, **options: os.kill(os.getpid(), signal.SIGINT)
        sys.argv[0] = "load_weights.py"
        runpy.run_path(sys.argv[0], run_name="__main__")"""
    out = subprocess.run([sys.executable, "-c", stopped, str(tmp_path / "tiny"), "--quantize", "int4", "--save", str(tmp_path / "other")],
                         cwd=HERE, capture_output=True, text=True)
    assert out.returncode == 130 and "Traceback" not in out.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small", "tiny"]


def test_what_cannot_be_quantised_is_refused(folders, tmp_path):
    with pytest.raises(InputError, match=r"rows of 24 weights, which int4 cannot divide into groups of 16: use int8"):
        load(folders["28b"], quantize="int4")
    alien = write(tmp_path / "alien", ref.hub_tensors("28b"), ref.config("28b") | {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(InputError, match="quantised by 'gptq'"):
        load(alien)
    with pytest.raises(InputError, match="shared among processes is not compiled"):
        load(folders["28b"], ranks=2, compile=True)
    tensors = ref.hub_tensors("28b") | {"model.norm.weight": torch.ones(96, dtype=torch.int8)}
    with pytest.raises(InputError, match="stored as I8"):
        load(write(tmp_path / "whole", tensors, ref.config("28b")))


def test_memory_is_announced_and_compared_before_anything_is_read(shapes_28b, tmp_path, monkeypatch):
    """The 28B needs 58.8 GB on a GPU as it is, and 17.2 GB in int4; on a CPU it is mapped."""
    if not sparse_files(tmp_path):
        pytest.skip("needs a file system with sparse files")
    write(tmp_path, {}, VL_28B)
    write_zeros(shapes_28b, tmp_path, 12)
    monkeypatch.setattr(load_weights, "free_memory", lambda device: 24e9)
    said = {kind: [] for kind in (None, "int4")}
    for kind in said:
        checkpoint = load_weights.open_checkpoint(tmp_path)
        if kind:
            load_weights.quantize_checkpoint(checkpoint, kind)
        for device in ("cpu", "cuda"):
            try:
                said[kind].append(load_weights.check_memory(checkpoint, device, None))
            except InputError as error:
                said[kind].append(str(error))
    name = tmp_path.name
    assert said[None] == [f"{name} takes 35.4 MB of memory and 58.8 GB mapped from disk (24.0 GB are free on cpu), and 57.3 kB a token of context",
                          f"{name} needs 58.8 GB on cuda, and 24.0 GB are free: --quantize int4 would fit"]
    assert said["int4"][1] == f"{name} takes 17.2 GB of memory (24.0 GB are free on cuda), and 57.3 kB a token of context"
    half = load_weights.open_checkpoint(tmp_path)
    load_weights.shard(half, 2)
    with pytest.raises(InputError, match=r"needs 3\d\.\d GB on cuda, and 24.0 GB are free: --quantize int8 would fit"):
        load_weights.check_memory(half, "cuda", None)


def test_too_large_a_model_is_refused_before_anything_is_read(folders, monkeypatch):
    monkeypatch.setattr(load_weights, "mapped", None)
    monkeypatch.setattr(load_weights, "free_memory", lambda device: 1000)
    with pytest.raises(InputError, match=r"28b needs \d\.\d MB on cpu, and 1.0 kB are free: it takes a larger machine"):
        load(folders["28b"], dtype=torch.bfloat16)


def test_bf16_through_fp32_is_the_same_product(monkeypatch, tmp_path):
    x, layer = torch.randn(9, 64, generator=torch.manual_seed(0)).bfloat16(), nn.Linear(64, 32).bfloat16()
    exact, plain = layer.float()(x.float()), layer.bfloat16()(x)
    layer.__class__ = load_weights.ThroughFP32
    assert layer(x).dtype == torch.bfloat16 and distance(layer(x), exact) <= distance(plain, exact) + 1e-3
    assert distance(layer(x[:1]), exact[:1]) < 0.02
    folder = ref.write_checkpoint("28b", tmp_path)
    kinds = lambda **options: {type(module) for module in load(folder, **options).modules() if isinstance(module, nn.Linear)}
    for supported, expected in ((True, nn.Linear), (False, load_weights.ThroughFP32)):
        monkeypatch.setattr(load_weights, "has_bf16_products", lambda: supported)
        assert kinds(dtype=torch.bfloat16) == {expected} and kinds() == {nn.Linear}


def test_with_avx_512_onednn_is_off_while_one_token_goes_through(monkeypatch):
    onednn = torch._C._get_mkldnn_enabled
    seen, logits = {}, {}
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        model = load(HERE / "tiny")
        model.norm.register_forward_hook(lambda module, given, out: seen.setdefault(capability, []).append(onednn()))
        with torch.inference_mode():
            logits[capability] = [model(model.prepare(ids)) for ids in ([5], [5, 6], [5])]
            with pytest.raises(AttributeError):
                model(model.prepare([5])._replace(patches=None, grids=[(1, 2, 2)]))
        assert onednn()
    assert seen == {"AVX2": [True, True, True], "AVX512": [False, True, False]}
    assert all(distance(one, two) < 1e-5 for one, two in zip(*logits.values()))


def test_two_processes_compute_what_one_does(tmp_path, capsys):
    """Half the heads and half the width of every expert each, over gloo; the first speaks."""
    two = lambda *more: subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "run.py", "--image", EXAMPLE, *more],
                                       cwd=HERE, capture_output=True, text=True).stdout
    assert two() == ask(capsys, "--image", EXAMPLE)[1] != ""
    assert two("--save-logits", str(tmp_path / "two")) == "" and ask(capsys, "--image", EXAMPLE, "--save-logits", str(tmp_path / "one"))[0] == 0
    one, two = (load_file(tmp_path / name)["logits"] for name in ("one", "two"))
    assert distance(one, two) < 3e-5 and one.abs().max() > 10


@pytest.mark.parametrize("name, dtype", [("28b", torch.float32), ("424b", torch.float32), ("28b", torch.bfloat16)])
def test_grouped_experts_compute_what_single_ones_do(folders, name, dtype):
    plain = load(folders[name], dtype=dtype).layers[-1].mlp.text_moe
    grouped = copy.deepcopy(plain)
    grouped.__class__ = load_weights.GroupedExperts
    grouped.stack()
    for rows in (1, 2, 40):
        x = torch.randn(rows, plain.gate.weight.shape[1], generator=torch.manual_seed(rows)).to(dtype)
        assert distance(grouped(x), plain(x)) <= (2e-6 if dtype == torch.float32 else 0.02) * plain(x).abs().max()
    assert grouped.experts[3].up_proj.weight.data_ptr() == grouped.stacks["up_proj"][0][3].data_ptr()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")      # of torch's own compiler
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_compiled_step_computes_what_a_plain_one_does(quantize):
    """Behind a picture, across windows of 256 and 512 tokens, and in a second turn, whose prompt is longer than what is left. A
    quantised one computes in bf16, so it is compared with its weights written out, in words that it knows: 0.014 were measured."""
    said, plain = [], load(HERE / "tiny")
    compiled, tokenizer = load(HERE / "tiny", quantize=quantize, compile=True, announce=said.append), Tokenizer(HERE / "tiny")
    if any("nothing can be compiled" in line for line in said):
        pytest.skip("needs a C++ compiler")
    for name, layer in compiled.named_modules():      # the plain one has the same weights, written out
        if isinstance(layer, load_weights.QuantizedLinear):
            plain.get_submodule(name).weight = torch.nn.Parameter(layer.dequantized(layer.weight, layer.scale).float())
    question = [{"role": "user", "content": [{"type": "text", "text": "Describe this image."}, {"type": "image", "image": EXAMPLE}]}]
    caches, prompt = [plain.new_cache(), compiled.new_cache()], plain.prepare(*encode_chat(tokenizer, question))
    words = torch.arange(20, 90).repeat(5)[:308] if quantize is None else torch.tensor(tokenizer.encode("A red star in the middle."))
    lengths = [*[1] * 230, 70, *[1] * 8] if quantize is None else [1] * len(words)
    none, first = prompt._replace(patches=prompt.patches[:0], grids=[]), prompt.positions.max() + 1
    steps = [none._replace(ids=ids, positions=at.expand(3, -1), is_vision=torch.zeros(len(ids), dtype=torch.bool))
             for ids, at in zip(words.split(lengths), torch.arange(first, first + len(words)).split(lengths))]
    with torch.inference_mode():
        for inputs in [prompt, *steps]:
            one, two = (model(inputs, cache, only_last=True) for model, cache in zip((plain, compiled), caches))
            assert distance(one, two) < (0.02 if quantize else 1e-5) * one.abs().max()
    assert caches[1].layers[0].buffer.shape[2] == (256 if quantize else 512) and one.abs().max() > 1


def test_without_a_compiler_it_goes_on_without_after_a_sentence(tmp_path):
    alone = dict(os.environ, CXX=str(tmp_path / "none"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "run.py", "--image", EXAMPLE, "--compile"], cwd=HERE, capture_output=True, text=True, env=alone)
    assert done.returncode == 0 and len(re.findall(r"nothing can be compiled here \(.*\): going on without\n", done.stderr)) == 1
    assert done.stdout == subprocess.run([sys.executable, "run.py", "--image", EXAMPLE], cwd=HERE, capture_output=True, text=True).stdout != ""


def test_a_rank_holds_its_share(folders):
    whole = load(folders["28b"]).state_dict()
    shares = [load(folders["28b"], rank=rank, ranks=2).state_dict() for rank in range(2)]
    for name, tensor in whole.items():
        split = name.startswith("layers.") and "_proj" in name
        dim = int(name.endswith(("o_proj.weight", "down_proj.weight")))
        both = torch.cat([share[name] for share in shares], dim) if split else shares[1][name]
        assert torch.equal(both, tensor), name
    for ranks, words in ((3, r"3 processes cannot share num_attention_heads 4"), (4, "num_key_value_heads 2")):
        with pytest.raises(InputError, match=words):
            load(folders["28b"], ranks=ranks)


# ---------------------------------------------------------------------- 6. tokenizer: a small vocabulary, made here
WORDS = "Hello hello how Hey This is a test User: Assistant: Picture What kind of dog is this? Nice to meet you."


def write_vocabulary(folder: Path, known: list[str] = []) -> Path:
    """A tokenizer folder with the real layout of ids: 3 specials, digits from 3, bytes from 13, pieces, control tokens.
    `known` are control strings that SentencePiece itself finds in a text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, *WORDS.split(), "a Hello"] * 50), model_writer=model, model_type="bpe", vocab_size=420, byte_fallback=True,
        user_defined_symbols=[*"0123456789", *known], normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    names = ["<|end_of_sentence|>", "<|begin_of_sentence|>", "<|IMAGE_PLACEHOLDER|>", "<|LOC_7|>", "<|IMAGE_START|>", "<|IMAGE_END|>",
             "<|VIDEO_START|>", "<|VIDEO_END|>", "<think>", "</think>"]
    (folder / "added_tokens.json").write_text(json.dumps({name: 1000 + i for i, name in enumerate(names)}))
    settings = {"additional_special_tokens": [*known, "1"], "cls_token": {"content": "<|begin_of_sentence|>"}, "padding_side": "Hello"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="session")
def tokenizer(vocabulary):
    return Tokenizer(vocabulary)


@pytest.mark.parametrize("text, ids", [
    ("", []), ("1234", [4, 5, 6, 7]), ("\n\n", [23, 23]), ("\t\t", [22, 22]), ("\r", [26]), ("😈", [253, 172, 165, 149]),
    ("🤗", [253, 172, 177, 164]), ("15\n5", [4, 8, 23, 8])])
def test_digits_and_bytes_have_the_ids_of_the_real_vocabulary(tokenizer, text, ids):
    assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", [" Hello", "  two  spaces ", "a 12 b", "é中😈", "<|IMAGE_START|><think>",
                                  "Hey. \t\t \n\nyou  é  @#😈  🤗!       , 1234 15 5,61"])
def test_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_nothing_is_put_before_a_text(tokenizer):
    piece = lambda text: [tokenizer.pieces.id_to_piece(i) for i in tokenizer.encode(text)]
    assert piece("This is a test")[0] == "This" and piece(" Hello") == ["▁Hello"] and piece("Hello") == ["Hello"]


def test_control_strings_are_split_off_only_when_they_are_meant(tokenizer):
    hello, how = tokenizer.encode(" Hello"), tokenizer.encode("how")
    assert tokenizer.encode("<s> Hello<s>how", control=True) == [1, *hello, 1, *how]
    assert tokenizer.encode("<s>>", control=True) == [1, *tokenizer.encode(">")]


def test_a_user_cannot_type_a_control_token(tmp_path):
    """Not even one that SentencePiece itself would recognise, or one put together from two parts of a message."""
    tokenizer = Tokenizer(write_vocabulary(tmp_path, ["<|im_start|>"]))
    hostile = "".join(tokenizer.special) + "<|image@placeholder|></think>"
    assert tokenizer.pieces.encode("<|im_start|>") == [tokenizer.special["<|im_start|>"]]
    assert not set(tokenizer.encode(hostile)) & set(tokenizer.special.values())
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": content}]).ids for content in
               ("Hi", hostile, [{"type": "text", "text": "<|IM"}, {"type": "text", "text": "AGE_START|>"}])]
    controls = [[id for id in ids if id in tokenizer.names] for ids in prompts]
    assert controls[0] == controls[1] == controls[2]
    talk = lambda text: encode_chat(tokenizer, [says("system", text), says("user", text), says("assistant", text, reasoning_content=text),
        says("assistant", "", tool_calls=[{"function": {"name": text, "arguments": {text: text}}}]), says("tool", text)],
        tools=[{"function": {"name": text}}]).ids
    assert [id for id in talk("Hi") if id in tokenizer.names] == [id for id in talk(hostile) if id in tokenizer.names]


def test_streaming_never_emits_half_a_character(tokenizer):
    stream = Stream(tokenizer)
    assert [stream.push(13 + byte) for byte in "😈中".encode()] == ["", "", "", "😈", "", "", "中"]
    h = tokenizer.encode("how")[0]
    assert [stream.push(13 + 0xF0), stream.push(13 + 0x9F), stream.push(h)[:2]] == ["", "", "��"]
    assert tokenizer.decode([13 + byte for byte in b"\xf0\x9f\x98\x88\xe4"]) == "😈�"
    assert tokenizer.decode([13 + byte for byte in b"\xf0\x9f\xf0\x9f\x98\x88\xe4\xb8\xad"]) == "��😈中"


def test_control_tokens_and_unused_rows_are_silent(tokenizer):
    hello = tokenizer.encode("Hello")
    assert tokenizer.decode([0, 1, *hello, 2, 1000, 1008, 5000]) == "Hello"
    assert tokenizer.decode([1009, *hello], keep=("</think>",)) == "</think>Hello"
    forbidden = tokenizer.forbidden(2000)
    assert {1002, 1004, 1005, 1999} <= set(forbidden) and not {2, 23, 1003, 1008, 1009} & set(forbidden)


# --------------------------------------------------------------------------------------------- 7. the chat template
IMG, BEGIN, END = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", "<|begin_of_sentence|>", "<|end_of_sentence|>"
VID = "<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>"
ERNIE = "You are a multimodal AI assistant called ERNIE developed by Baidu based on the PaddlePaddle framework."
EMPTY = "<think>\n\n</think>\n\n"
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
LISTED = '\n<tool_list>\n[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]\n</tool_list>\n\n'
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}
CALLED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>\n'
MEDIA = {IMG: {"type": "image", "image": "x.png"}, VID: {"type": "video", "video": "x.mp4"}}
user = lambda *items: {"role": "user", "content": [MEDIA.get(item, {"type": "text", "text": item}) for item in items]}
says = lambda role, text, **more: {"role": role, "content": text, **more}


@pytest.mark.parametrize("style, think, messages, expected", [
    ("instruct", None, [says("user", "Hi")], f"{BEGIN}User: Hi\nAssistant: {EMPTY}"),
    ("instruct", False, [says("user", "Hi")], f"{BEGIN}User: Hi\nAssistant: {EMPTY}"),
    ("instruct", True, [says("user", "Hi")], f"{BEGIN}User: Hi\nAssistant: <think>"),
    ("instruct", None, [user("What kind of dog is this?", IMG)], f"{BEGIN}User: What kind of dog is this?Picture 1:{IMG}\nAssistant: {EMPTY}"),
    ("instruct", None, [user(IMG, "Q")], f"{BEGIN}User: Picture 1:{IMG}Q\nAssistant: {EMPTY}"),
    ("instruct", None, [user(IMG, IMG, "Q")], f"{BEGIN}User: Picture 1:{IMG}Picture 2:{IMG}Q\nAssistant: {EMPTY}"),
    ("instruct", None, [says("system", "Be brief."), says("user", "Hi")], f"{BEGIN}Be brief.\nUser: Hi\nAssistant: {EMPTY}"),
    ("instruct", None, [user(IMG, "q1"), says("assistant", "a1"), user(IMG, "q2")],
     f"{BEGIN}User: Picture 1:{IMG}q1\nAssistant: a1{END}User: Picture 2:{IMG}q2\nAssistant: {EMPTY}"),
    ("instruct", None, [says("user", "q1"), says("assistant", "ANS", reasoning_content="\nTH\n"), says("user", "q2")],
     f"{BEGIN}User: q1\nAssistant: <think>\nTH\n</think>\nANS{END}User: q2\nAssistant: {EMPTY}"),
    ("instruct", None, [says("user", "q1"), says("assistant", "<think>\nTH\n</think>\n\nANS"), says("user", "q2")],
     f"{BEGIN}User: q1\nAssistant: <think>\nTH\n</think>\nANS{END}User: q2\nAssistant: {EMPTY}"),
    ("instruct", None, [user(VID, "Q")], f"{BEGIN}User: Video 1:{VID}Q\nAssistant: {EMPTY}"),
    ("instruct", None, [user(IMG, "a", VID, "b", IMG)], f"{BEGIN}User: Picture 1:{IMG}aVideo 1:{VID}bPicture 2:{IMG}\nAssistant: {EMPTY}"),
    ("instruct", None, [user(IMG, VID, "q1"), says("assistant", "a1"), user(IMG, VID)],
     f"{BEGIN}User: Picture 1:{IMG}Video 1:{VID}q1\nAssistant: a1{END}User: Picture 2:{IMG}Video 2:{VID}\nAssistant: {EMPTY}"),
    ("thinking", None, [user(IMG, "Q")], f"{BEGIN}{ERNIE}\nUser:  Picture 1:{IMG}Q\nAssistant: \n<think>\n"),
    ("thinking", None, [user(IMG, IMG, VID)], f"{BEGIN}{ERNIE}\nUser:  Picture 1:{IMG} Picture 2:{IMG} Video 1:{VID}\nAssistant: \n<think>\n"),
    ("thinking", None, [says("user", "q1"), says("assistant", "TH\n</think>\n\nANS"), says("user", "q2")],
     f"{BEGIN}{ERNIE}\nUser: q1\nAssistant: \n<think>\nTH\n</think>\n\nANS{END}User: q2\nAssistant: \n<think>\n"),
    ("thinking", False, [says("system", "S"), says("user", "Q")], f"{BEGIN}S\nUser: Q\nAssistant: \n{EMPTY}"),
    ("text", None, [says("system", "S"), says("user", "Q"), says("assistant", "A", reasoning_content="TH"), says("user", "R")],
     f"{BEGIN}S\nUser: Q\nAssistant: A{END}User: R\nAssistant: "),
])
def test_the_prompt_is_the_string_the_model_was_trained_on(style, think, messages, expected):
    assert "".join(render(read_messages(messages), STYLES[style], think)) == expected


@pytest.mark.parametrize("style, messages, expected", [
    ("thinking", [says("user", "Q")], f"{BEGIN}{ERNIE}{LISTED}User: Q\nAssistant: \n<think>\n"),
    ("instruct", [says("user", "Q")], f"{BEGIN}{LISTED}User: Q\nAssistant: {EMPTY}"),
    ("instruct", [says("system", "S"), says("user", "Q")], f"{BEGIN}S{LISTED}User: Q\nAssistant: {EMPTY}"),
    ("thinking", [says("user", "Q"), says("assistant", "", reasoning_content="TH", tool_calls=[CALL]), says("tool", "23")],
     f"{BEGIN}{ERNIE}{LISTED}User: Q\nAssistant: \n<think>\nTH\n</think>\n\n{CALLED}{END}"
     f"User: <tool_output>\n23\n</tool_output>\n\nAssistant: \n<think>\n"),
    ("instruct", [user(IMG), says("assistant", None, tool_calls=[CALL, CALL]), says("tool", user(IMG, "seen")["content"]), says("tool", [{"t": 1}])],
     f"{BEGIN}{LISTED}User: Picture 1:{IMG}\nAssistant: {CALLED}{CALLED}{END}User: <tool_output>\nPicture 2:{IMG}seen\n</tool_output>\n"
     f'<tool_output>\n[{{"t": 1}}]\n</tool_output>\n\nAssistant: {EMPTY}'),
])
def test_tools_stand_in_the_prompt_as_in_training(style, messages, expected):
    for tool in (WEATHER, WEATHER["function"]):       # a bare function is wrapped
        assert "".join(render(read_messages(messages), STYLES[style], None, read_tools([tool]))) == expected


def test_messages_of_all_spellings_are_the_same():
    text, image, video = ({"type": "text", "text": "Q"}, {"type": "image", "image": "a.png"}, {"type": "video", "video": "b.gif"})
    spelled = [text, {"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "video_url", "video_url": "b.gif"}]
    spelled += [{"type": "image", "url": "a.png"}, {"type": "video", "path": "b.gif"}]
    once = read_messages([{"role": "user", "content": spelled}, says("assistant", "A", tool_calls=[
        {"function": {"name": "f", "arguments": {"x": 1}}}, {"id": "7", "function": {"name": "g", "arguments": ""}}])])
    assert once[0]["content"] == [text, image, video, image, video] and read_messages(once) == once
    assert [call["function"]["arguments"] for call in once[1]["tool_calls"]] == ['{"x": 1}', "{}"]
    assert read_messages([says("developer", "D"), says("tool", None), says("tool", [{"type": "event"}])]) == [
        says("system", [{"type": "text", "text": "D"}]), says("tool", []), says("tool", [{"type": "text", "text": '[{"type": "event"}]'}])]
    assert len({call["id"] for call in once[1]["tool_calls"]}) == 2 and once[1]["tool_calls"][1]["id"] == "7"


@pytest.mark.parametrize("messages, words", [
    ([], "list of messages"), ("Hi", "list of messages"), (["Hi"], "list of messages"), ([says("robot", "Hi")], "role 'robot'"),
    ([says("user", 5)], "this is 5"), ([{"role": "user", "text": "Q"}], "this is None"), ([says("user", {})], "this is {}"), ([says("user", ["text"])], "'text'"), ([says("user", ["image"])], "'image'"), ([says("user", [{"type": "smell"}])], "'smell'"), ([says("user", ["Hi"])], "'Hi'"),
    ([says("user", [{"type": "text"}])], "'text'"), ([says("user", [{"type": "text", "path": "notes.txt"}])], "'text'"), ([says("user", [{"type": "image", "image": 5}])], "'image'"),
    ([says("assistant", [MEDIA[IMG]])], "holds text"), ([says("assistant", "", reasoning_content=5)], "holds text"),
    ([says("assistant", "", tool_calls=5)], "looks like"), ([says("assistant", "", tool_calls=[{"function": {"name": 5}}])], "looks like"),
    ([says("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])], "looks like")])
def test_what_is_no_conversation_is_refused(messages, words):
    with pytest.raises(InputError, match=words):
        read_messages(messages)


@pytest.mark.parametrize("tools", ["x", [5], [{"function": 5}], [{"function": {}}], [{"type": "function"}]])
def test_tools_without_a_name_are_refused(tools):
    with pytest.raises(InputError, match="tools are a list|has no name"):
        read_tools(tools)


def test_thinking_is_refused_where_it_was_not_taught():
    with pytest.raises(InputError, match="not taught to think"):
        render(read_messages([says("user", "Hi")]), STYLES["text"], think=True)


def test_text_between_control_tokens_is_encoded_in_one_go(tokenizer):
    """"User: " and "What" in two pieces would give other ids than the inference stacks'."""
    ids = encode_chat(tokenizer, [user("What is ", "this?")]).ids
    assert tokenizer.encode("User: What is this?\nAssistant: ") == ids[1 : ids.index(tokenizer.special["<think>"])]


def test_a_picture_of_56_pixels_takes_four_placeholders(tokenizer):
    prompt = encode_chat(tokenizer, [{"role": "user", "content": [{"type": "image", "image": ref.picture(56, 56)}]}])
    start = prompt.ids.index(tokenizer.special["<|IMAGE_START|>"])
    assert prompt.ids[start : start + 6] == [1004, 1002, 1002, 1002, 1002, 1005] and prompt.grids == [(1, 4, 4)]
    assert prompt.patches.shape == (16, 588)


def test_the_folder_tells_the_style(vocabulary, tmp_path):
    assert chat_style(Tokenizer(vocabulary)) is STYLES["instruct"]
    shutil.copytree(vocabulary, tmp_path / "x")
    (tmp_path / "x" / "chat_template.jinja").write_text("{% if options.thinking_mode == 'open' %}")
    assert chat_style(Tokenizer(tmp_path / "x")) is STYLES["thinking"]
    (tmp_path / "x" / "chat_template.jinja").write_text("<|im_start|>")
    with pytest.raises(InputError, match="ChatML"):
        chat_style(Tokenizer(tmp_path / "x"))
    (tmp_path / "x" / "chat_template.jinja").unlink()
    cached = shutil.copytree(tmp_path / "x", tmp_path / "models--baidu--ERNIE-4.5-VL-28B-A3B-Thinking" / "snapshots" / "abc")
    assert chat_style(Tokenizer(cached)) is STYLES["thinking"]
    (cached / "chat_template.jinja").write_text("{% if enable_thinking %}")      # what the folder holds counts more than its name
    assert chat_style(Tokenizer(cached)) is STYLES["instruct"]
    (tmp_path / "x" / "added_tokens.json").write_text("{}")
    assert chat_style(Tokenizer(tmp_path / "x")) is STYLES["text"]


# ------------------------------------------------------------------------------------------------------ 8. pictures
@pytest.mark.parametrize("size, grid, total, first, second", [
    # width x height, measured with transformers' PIL processor; the first three need no resizing
    ((56, 56), (1, 4, 4), 1950.4104, (-1.79226, -1.69007, -1.58788, -1.48570), (-0.36162, -0.25943, -0.15724)),
    ((84, 56), (1, 4, 6), 2365.2152, (-1.79226, -1.69007, -1.58788, -1.48570), (-0.36162, -0.25943, -0.15724)),
    ((112, 84), (1, 6, 8), 5374.9697, (-1.79226, -1.69007, -1.58788, -1.48570), (-0.36162, -0.25943, -0.15724)),
    ((100, 75), (1, 6, 8), 5347.1041, (-1.79226, -1.70467, -1.61708, -1.52949), (-0.52220, -0.43461, -0.33242)),
    ((30, 20), (1, 4, 6), 2058.9578, (-1.79226, -1.79226, -1.76307, -1.71927), (-1.31051, -1.28132, -1.23752)),
    ((640, 480), (1, 34, 46), 173001.5997, (-1.79226, -1.69007, -1.58788, -1.48570), (-0.37622, -0.27403, -0.17184)),
])
def test_patches_have_the_measured_values(size, grid, total, first, second):
    patches, found = patchify([ref.picture(*size)])
    assert found == grid and patches.shape == (grid[1] * grid[2], 588) and patches.dtype == torch.float32
    assert abs(float(patches.double().sum()) - total) < 0.01
    assert torch.allclose(patches[0, :4], torch.tensor(first), atol=1e-5) and torch.allclose(patches[1, :3], torch.tensor(second), atol=1e-5)


@pytest.mark.parametrize("height, width, fitted", [
    (1, 1, (56, 56)), (20, 30, (56, 84)), (28, 112, (28, 112)), (480, 640, (476, 644)), (720, 1280, (728, 1288)), (1080, 1920, (1092, 1932)),
    (2160, 3840, (1624, 2912)), (3000, 4000, (1904, 2520)), (8000, 6000, (2520, 1904)), (561, 278, (560, 280)), (14, 300, (28, 280)),
    (10, 2000, (28, 812)), (2, 200, (28, 560)), (70, 70, (56, 56)), (98, 98, (112, 112)), (126, 126, (112, 112)), (154, 154, (168, 168))])
def test_sides_are_rounded_to_multiples_of_28_half_to_even(height, width, fitted):
    assert fit_size(height, width) == fitted


def test_a_row_of_patches_is_colour_by_colour_in_blocks_of_two_by_two():
    index = np.zeros((56, 112, 3), np.uint8)
    index[..., 0] = np.repeat(np.repeat(np.arange(32).reshape(4, 8), 14, 0), 14, 1) * 5
    red = patchify([Image.fromarray(index)])[0].view(-1, 3, 196)
    assert ((red[:, 0, 0] * 0.26862954 + 0.48145466) * 51).round().tolist()[:10] == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5]
    assert torch.allclose(red[:, 1], torch.tensor(-1.75209713)) and torch.allclose(red[:, 2], torch.tensor(-1.48021972))


def stored(path: Path, image: Image.Image, **how) -> Path:
    image.save(path, **how)
    return path


def test_pictures_are_loaded_as_a_person_sees_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_picture(stored(tmp_path / "turned.jpg", ref.picture(112, 56), exif=exif)).size == (56, 112)
    assert load_picture(stored(tmp_path / "clear.png", Image.new("RGBA", (9, 9), (255, 0, 0, 0)))).getpixel((4, 4)) == (255, 255, 255)
    assert load_picture(stored(tmp_path / "grey alpha.png", Image.new("LA", (9, 9), (0, 0)))).getpixel((4, 4)) == (255, 255, 255)
    assert load_picture(stored(tmp_path / "palette.gif", Image.new("RGB", (9, 9), (200, 0, 0)).quantize(4))).getpixel((4, 4))[0] > 190
    deep = Image.fromarray(np.full((9, 9), 30000, np.uint16))
    assert load_picture(stored(tmp_path / "deep.png", deep)).getpixel((4, 4)) == (117, 117, 117)
    assert load_picture(stored(tmp_path / "print.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)))).getpixel((4, 4))[0] > 200
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    assert load_picture(stored(tmp_path / "moves.gif", frames[0], save_all=True, append_images=frames[1:])).getpixel((4, 4))[0] > 200


def bad_pictures(folder: Path) -> dict[str, tuple[Path, str]]:
    whole = stored(folder / "whole.png", ref.picture(300, 200)).read_bytes()
    def write(name, data): (folder / name).write_bytes(data); return folder / name
    bomb = whole[:16] + (20000).to_bytes(4, "big") + (20000).to_bytes(4, "big") + whole[24:29]
    bomb += zlib.crc32(bomb[12:29]).to_bytes(4, "big") + whole[33:]
    return {"missing": (folder / "nothing.png", "does not exist"), "empty": (write("empty.png", b""), "not a picture"),
            "text": (write("text.png", b"hello"), "not a picture"), "truncated": (write("cut.png", whole[:2000]), "cut off"),
            "bomb": (write("bomb.png", bomb), "make it smaller"), "folder": (folder, "cannot be opened"),
            "narrow": (stored(folder / "narrow.png", Image.new("RGB", (2010, 10))), "200 times"),
            "float": (stored(folder / "float.tiff", Image.fromarray(np.ones((9, 9), np.float32))), "8 or 16 bits")}


@pytest.mark.parametrize("case", ["missing", "empty", "text", "truncated", "bomb", "folder", "narrow", "float"])
def test_what_is_not_a_picture_is_refused_in_one_sentence(case, tmp_path, capsys):
    path, words = bad_pictures(tmp_path)[case]
    assert run.main(["--image", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


# -------------------------------------------------------------------------------------------------------- 9. clips
@pytest.mark.parametrize("count, rate, expected", [      # what the released checkpoints' own processor chooses
    (10, 25, list(range(10))), (100, 25, [0, 6, 12, 18, 25, 31, 37, 43, 50, 56, 62, 68, 75, 81, 87, 93]), (300, 30, list(range(0, 300, 15))),
    (301, 30, [0, 15, 30, 45, 60, 75, 90, 105, 120, 135, 150, 165, 180, 195, 210, 225, 240, 255, 270, 285]),
    (299, 29.97, [0, 15, 31, 47, 62, 78, 94, 110, 125, 141, 157, 173, 188, 204, 220, 236, 251, 267, 283]),
    (250, 25, [0, 12, 25, 37, 50, 62, 75, 87, 100, 112, 125, 137, 150, 162, 175, 187, 200, 212, 225, 237]), (6000, 30, None), (1, 25, [0])])
def test_frames_are_chosen_as_the_released_processor_does(count, rate, expected):
    chosen = choose_frames(count, rate)
    if expected is None:                                                                # 180 of 6,000
        assert len(chosen) == 180 and chosen[:4] == [0, 33, 66, 100] and chosen[-1] == 5966
    else:
        assert chosen == expected


def test_fewer_frames_can_be_asked_for():
    assert len(choose_frames(600, 30, fps=1)) == 20 and choose_frames(600, 30, most=4) == [0, 150, 300, 450]
    assert len(choose_frames(10 * 3600 * 30, 30)) == 180


@pytest.mark.parametrize("seconds, text", [(0, "time: 00:00:00.00"), (7.5, "time: 00:00:07.50"), (61.5, "time: 00:01:01.50"),
                                           (3661.25, "time: 01:01:01.25"), (59.996, "time: 00:00:60.00"), (360000, "time: 100:00:00.00")])
def test_times_are_written_as_in_training(seconds, text):
    assert tokenizer_module.timestamp(seconds) == text


def by_hand(frames: list[Image.Image], times: list[float], budget: tuple[int, int]) -> tuple[torch.Tensor, tuple]:
    """Stamped, padded, resized and cut as the facts of the released processor say, patch by patch and number by number."""
    stamped = []
    for frame, s in zip(frames, times):
        frame, size = frame.convert("RGB"), int(min(frame.size) * 0.1)
        if size:
            text = f"time: {int(s) // 3600:02d}:{int(s) // 60 % 60:02d}:{s % 60:05.2f}"
            ImageDraw.Draw(frame).text((0, 0), text, (0, 0, 0), ImageFont.load_default(size), stroke_width=int(size * 0.1), stroke_fill="white")
        stamped.append(frame)
    stamped += [stamped[-1]] * (len(stamped) % 2)
    height, width = fit_size(stamped[0].height, stamped[0].width, *budget)
    rows, mean, std = [], (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for frame in stamped:
        x = (np.asarray(frame.resize((width, height), Image.BICUBIC)) / 255 - mean) / std
        for y in range(0, height, 28):
            for left in range(0, width, 28):
                for dy, dx in ((0, 0), (0, 14), (14, 0), (14, 14)):
                    rows.append(x[y + dy : y + dy + 14, left + dx : left + dx + 14].transpose(2, 0, 1).ravel())
    return torch.from_numpy(np.array(rows)).float(), (len(stamped), height // 14, width // 14)


BUDGET = {"size": {"shortest_edge": 3136, "longest_edge": 12544}}      # clips of the tests are small


@pytest.fixture
def small_clips(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "video_preprocessor_config.json").write_text(json.dumps(BUDGET))
    return tmp_path / "folder"


def moving(count: int, size=(120, 90)) -> list[Image.Image]:
    frames = [Image.new("RGB", size, (200, 220, 240)) for _ in range(count)]
    for i, frame in enumerate(frames):
        ImageDraw.Draw(frame).rectangle((5 * i, 40, 5 * i + 30, 70), fill=(200, 10 * i, 40))
    return frames


def write_film(path: Path, frames: list[Image.Image], rate: int = 10, codec: str = "mpeg4") -> Path:
    import av
    with av.open(str(path), "w") as film:
        stream = film.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *frames[0].size, "yuv420p", 4_000_000
        for frame in frames:
            film.mux(stream.encode(av.VideoFrame.from_image(frame)))
        film.mux(stream.encode())
    return path


def write_clip(kind: str, folder: Path, count: int) -> tuple[Path, list[Image.Image], float]:
    """(path, all frames as a decoder gives them, frames a second)"""
    frames, path = moving(count), folder / f"clip.{kind}"
    if kind in ("gif", "webp", "png"):
        lossless = {"lossless": True} if kind == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=[80, 120] * (count // 2) + [100] * (count % 2), **lossless)
        with Image.open(path) as image:
            frames = [(image.seek(i), image.convert("RGB"))[1] for i in range(count)]
        return path, frames, 10.0
    if kind == "frames":
        path.mkdir()
        for i, frame in enumerate(frames):
            frame.save(path / f"f{i}.png")                       # f2 before f10
        (path / "notes.txt").write_text("not a frame")
        return path, frames, 24.0
    import av
    write_film(path, frames, codec="mpeg4" if kind == "mp4" else "libvpx-vp9")
    with av.open(str(path)) as film:
        return path, [frame.to_image() for frame in film.decode(video=0)], 10.0


def test_a_stream_without_a_container_is_read(tmp_path):
    """It says neither when a frame is shown nor how to get there."""
    pytest.importorskip("av", reason="PyAV is not installed: pip install av to read films")
    frames = moving(12)
    found = read_clip(write_film(tmp_path / "clip.h264", frames, codec="libx264")).frames
    assert len(found) == 12 and all(np.abs(np.asarray(a, float) - np.asarray(b)).mean() < 4 for a, b in zip(found, frames))


def test_films_come_as_data_uris_too(tmp_path):
    pytest.importorskip("av", reason="PyAV is not installed: pip install av to read films")
    film = write_film(tmp_path / "clip.mp4", moving(9))
    uri = "data:video/mp4;base64," + base64.b64encode(film.read_bytes()).decode()
    assert [np.asarray(f).tolist() for f in read_clip(uri).frames] == [np.asarray(f).tolist() for f in read_clip(film).frames]


@pytest.mark.parametrize("kind, count", [("gif", 5), ("gif", 21), ("webp", 3), ("png", 4), ("frames", 12), ("frames", 1), ("mp4", 40), ("webm", 25)])
def test_clips_become_the_tensors_of_an_independent_computation(tokenizer, small_clips, tmp_path, kind, count):
    if kind in ("mp4", "webm"):
        pytest.importorskip("av", reason="PyAV is not installed: pip install av to read films")
    path, frames, rate = write_clip(kind, tmp_path, count)
    chosen = [k * count // min(16, count) for k in range(min(16, count))]      # all of these last less than 8 seconds
    patches, grid = by_hand([frames[i] for i in chosen], [i / rate for i in chosen], (3136, 12544))
    item = load_media([{"role": "user", "content": [{"type": "video", "video": str(path)}]}], small_clips)[0]["content"][0]["video"]
    assert item.grid == grid and item.patches.shape == patches.shape and distance(item.patches, patches) < 1e-5
    assert item.note.startswith(f"{len(chosen)} frame{'s' * (count > 1)} 120 x 90 -> ")


def test_a_clip_in_the_prompt(tokenizer, small_clips):
    """6 frames of 120 x 90 pixels are 3 x (2 x 3) tokens, whose placeholder is the picture's where clips have none of their own."""
    shutil.copy(tokenizer.folder / "tokenizer.model", small_clips)
    shutil.copy(tokenizer.folder / "added_tokens.json", small_clips)
    own = Tokenizer(small_clips)
    prompt = encode_chat(own, [{"role": "user", "content": [{"type": "video", "video": Clip(moving(5), [0.0, 0.5, 1.0, 1.5, 2.0])}]}])
    start = prompt.ids.index(own.special["<|VIDEO_START|>"])
    assert prompt.ids[start : start + 38] == [1006, *[1002] * 36, 1007] and prompt.grids == [(6, 6, 8)]
    assert torch.equal(prompt.patches[-48:], prompt.patches[-96:-48])                   # the fifth frame twice, its stamp too
    assert own.decode(prompt.ids) == "User: Video 1:\nAssistant: \n\n\n\n"


def test_the_bundled_checkpoint_takes_a_clip(capsys):
    code, out, err = ask(capsys, "--video", str(HERE / "examples" / "moving.gif"), "--max-new-tokens", "5")
    assert code == 0 and out.endswith("\n") and "6 frames 168 x 126 -> 196 x 140 -> 105 tokens" in err


def test_small_frames_are_enlarged_and_tiny_ones_not_stamped():
    frame = moving(1, (64, 64))[0]
    (item,) = load_media([{"role": "user", "content": [{"type": "video", "video": Clip([frame], [0.0])}]}], HERE / "reference")[0]["content"]
    assert item["video"].grid == (2, 36, 36)                                            # 504 x 504
    tiny = moving(1, (9, 40))[0]
    assert tokenizer_module.stamp(tiny, 1.0, HERE) is tiny and tokenizer_module.stamp(frame, 1.0, HERE) is not frame


@pytest.mark.parametrize("case", ["empty folder", "text", "missing", "no frame decodes", "broken gif", "broken film", "still", "long"])
def test_clips_that_are_hardly_clips(case, tmp_path, monkeypatch):
    """One sentence, or the frames that can be had."""
    path, frames = tmp_path / "clip.gif", moving(8)
    if case == "empty folder":
        path.mkdir()
    elif case == "text":
        path.write_text("hello")
    elif case == "no frame decodes":
        path.mkdir()
        (path / "1.png").write_bytes(b"broken")
    elif case == "still":
        frames[0].save(path)
    elif case == "broken gif":
        frames[0].save(path, save_all=True, append_images=frames[1:])
        path.write_bytes(path.read_bytes()[:-50])
    elif case in ("broken film", "long"):
        pytest.importorskip("av", reason="PyAV is not installed: pip install av to read films")
        path = write_film(tmp_path / "clip.mp4", moving(60), 30) if case == "broken film" else write_hours(tmp_path / "clip.mkv")
        data = bytearray(path.read_bytes())
        data[len(data) // 3 : len(data) * 2 // 3] = bytes(len(data) * 2 // 3 - len(data) // 3)
        path.write_bytes(data) if case == "broken film" else None
    if case in ("empty folder", "text", "missing", "no frame decodes"):
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(InputError, match="no frame of it|pip install av|does not exist"):
            read_clip(path)
        return
    clip = read_clip(path)
    assert len(clip.frames) == len(clip.times) >= 1 and clip.times == sorted(clip.times)
    if case == "broken gif":
        assert len(clip.frames) == 7 and clip.lost == 1
    if case == "broken film":                                # what lies behind the damage is there too
        assert len(clip.frames) + clip.lost == 16 and clip.times[-1] > 1.8
    if case == "long":
        assert len(clip.frames) == 180 and clip.times[-1] > 9.9 * 3600


def write_hours(path: Path) -> Path:
    """Ten hours at a frame a second."""
    import av
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 32, 32, "yuv420p", 12
        frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32)))
        for i in range(36_000):
            frame.pts = i
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    return path


# ------------------------------------------------------------------------------------------- 10. replies, and boxes
NAMED = lambda name, **arguments: ("call", name, arguments)
REPLIES = [  # generated text; whether the prompt has opened the reasoning; reasoning; content and calls
    ("abc</think>xyz", True, "abc", ["xyz"]),
    ("abc\n</think>\n\nxyz", True, "abc", ["xyz"]),
    ("\nabc\n\ndef\n</think>\n\nx\n\ny", True, "abc\n\ndef", ["x\n\ny"]),
    ('abc\n</think>\n\n\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n', True, "abc", [NAMED("f", x=1)]),
    ('abc</think>hello<tool_call>{"name": "f", "arguments": {}}</tool_call>', True, "abc", ["hello", NAMED("f")]),
    ("abc", True, "abc", []), ("abc", False, "", ["abc"]), ("", True, "", []), ("", False, "", []),
    ('<tool_call>{"name": "f", "arguments": {}}</tool_call>', True, "", [NAMED("f")]),
    ("<think>abc</think>def", True, "abc", ["def"]), ("<think>abc</think>def", False, "abc", ["def"]), ("abc\n", True, "abc", []),
    ("abc\n</think>\n\n<response>\ndef\n</response>\n", True, "abc", ["<response>\ndef\n</response>\n"]),
    ("a</think>b</think>c", True, "a", ["b</think>c"]), ("a < b </thin", True, "a < b </thin", []), ("a <tool_cal", False, "", ["a <tool_cal"]),
    ('<tool_call>{"name": "get_weather", "arguments": {"location": "北京"}}</tool_call>', False, "", [NAMED("get_weather", location="北京")]),
    ('<tool_call>{"name": "get_weather", "arguments": {"location": "北"</tool_call>', False, "",
     ['<tool_call>{"name": "get_weather", "arguments": {"location": "北"</tool_call>']),
    ('<tool_call>"name": "get_weather", "arguments": {</tool_call>', False, "", ['<tool_call>"name": "get_weather", "arguments": {</tool_call>']),
    ('<tool_call>"name": "f", "arguments": {"x": 2}}</tool_call>', False, "", [NAMED("f", x=2)]),                # a brace was forgotten
    ('</think>abc<tool_call>{"name": "f", "arguments": {}}</tool_call>', True, "", ["abc", NAMED("f")]),
    ('<tool_call>\n{"name": "f", "arguments": {"x": {"y": {"z": 1}}}}\n</tool_call>\n<tool_call>\n{"name": "g", "arguments": "{\\"a\\": 1}"}\n</tool_call>\n',
     False, "", [NAMED("f", x={"y": {"z": 1}}), NAMED("g", a=1)]),
    ('two\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g", "arguments": []}</tool_call>', False, "",
     ["two", NAMED("f"), NAMED("g")]),
    ('<tool_call>{"name": "f", "arguments": {"x": 2}</tool_call>', False, "", [NAMED("f", x=2)]),
    ('<tool_call>"name": "f", "arguments": {"x": 2}</tool_call>', False, "", [NAMED("f", x=2)]),
    ("Hello\n\n<tool_call>oops</tool_call>", False, "", ["Hello\n\n<tool_call>oops</tool_call>"]), ("x</think>y", False, "", ["x</think>y"]),
    ('<tool_call>{"name": "f", "arguments": {"x": "a</tool_call>b"}}</tool_call>', False, "", [NAMED("f", x="a</tool_call>b")]),
    ('<tool_call>{"name": "f", "arguments": {"x": "line\nline"}}</tool_call>', False, "", [NAMED("f", x="line\nline")]),
    ('<tool_call>{"name": "f", "arguments": {"x": 1}}', False, "", [NAMED("f", x=1)]),                            # complete but not closed
    ('<tool_call>{"name": "f", "argum', False, "", ['<tool_call>{"name": "f", "argum']),
    ('<tool_call>{"name": "f", "arguments": {"x": 1', False, "", ['<tool_call>{"name": "f", "arguments": {"x": 1']),
    ('<tool_call>bad</tool_call><tool_call>{"name": "f", "arguments": {}}</tool_call>', False, "", ["<tool_call>bad</tool_call>", NAMED("f")]),
    ('<tool_call>{"x": "open</tool_call>then <tool_call>{"name": "f", "arguments": {}}</tool_call>', False, "",
     ['<tool_call>{"x": "open</tool_call>then ', NAMED("f")]),
    ("<tool_call>5</tool_call>", False, "", ["<tool_call>5</tool_call>"]), ("<tool_call></tool_call>", False, "", ["<tool_call></tool_call>"]),
    ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', False, "", ['<tool_call>{"name": 5, "arguments": {}}</tool_call>']),
    ('<tool_call>{"name": "f"}</tool_call>', False, "", ['<tool_call>{"name": "f"}</tool_call>']),
    ("<tool_call>" + "[" * 9000 + "</tool_call>", False, "", ["<tool_call>" + "[" * 9000 + "</tool_call>"]),
]


@pytest.mark.parametrize("pieces", ["whole", "3 letters", "letters"])
@pytest.mark.parametrize("text, thinking, reasoning, rest", REPLIES)
def test_a_reply_is_taken_apart_however_it_comes(text, thinking, reasoning, rest, pieces):
    step = {"whole": len(text) or 1, "3 letters": 3, "letters": 1}[pieces]
    if len(text) > 1000 and step < 1000:
        step = 1000
    reply, events = Reply(thinking), []
    for i in range(0, len(text), step):
        events += reply.push(text[i : i + step])
    events += reply.push("", final=True)
    found = []
    for kind, said in events:
        if kind == "tool_call":
            function = json.loads(said)["function"]
            found.append(("call", function["name"], json.loads(function["arguments"])))
        elif kind == "content":
            found[-1:] = [found[-1] + said] if found and isinstance(found[-1], str) else [*found[-1:], said]
    assert found == rest and reply.said["reasoning"] == reasoning == "".join(said for kind, said in events if kind == "reasoning")
    assert reply.said["content"] == "".join(part for part in rest if isinstance(part, str))
    assert len({call["id"] for call in reply.tool_calls}) == len(reply.tool_calls)


def test_text_comes_out_as_soon_as_it_is_certain():
    reply = Reply(thinking=True)
    said = [[text for _, text in reply.push(piece)] for piece in ("I see", " a <", "b </th", "ink", ">", "\n\n", "Yes", "\n", "!")]
    assert said == [["I see"], [" a "], ["<b "], [], [], [], ["Yes"], [], ["\n!"]]
    reply = Reply(thinking=False)      # the name of a tag in prose holds nothing up
    assert [[text for _, text in reply.push(piece)] for piece in ("Use <tool_call>", " in prose", ".")] == [["Use "], ["<tool_call>", " in prose"], ["."]]


@pytest.mark.parametrize("prompt, thinking", [(f"{BEGIN}<think>", True), (EMPTY, False), ("", False), (f"{EMPTY}<think>", True)])
def test_the_prompt_says_whether_an_answer_begins_with_reasoning(tokenizer, prompt, thinking):
    assert tokenizer.begins_thinking(tokenizer.encode(prompt, control=True)) is thinking


@pytest.mark.parametrize("text, expected", [
    ('{"bbox_2d": [285, 235, 999, 652]}', [("", (285, 235, 999, 652))]),
    ('Here:\n```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"label": "b", "bbox": [5, 6, 7.5, 8]}]\n```', [("a", (1, 2, 3, 4)), ("b", (5, 6, 7.5, 8))]),
    ('{"name": "cat", "box": [[1, 2, 3, 4], [5, 6, 7, 8]]}', [("cat", (1, 2, 3, 4)), ("cat", (5, 6, 7, 8))]),
    ('{"cars": [{"pos": [10, 20, 5, 40]}]}', [("", (5, 20, 10, 40))]), ("It is at [1, 2, 3, 4].", [("", (1, 2, 3, 4))]),
    ("[1, 2, 3] and [1, 2, 3, 4000] and [true, 1, 2, 3] and {", []), ('{"cars": 2, "bikes": 1, "dogs": 0, "people": 4}', []), ("none", []), ("[" * 5000, []),
    ("<ref>a dog</ref><box>(1,2)(30,2)(30,40)(1,40)</box>", [("a dog", (1, 2, 30, 40))]),
    ("<ref>b</ref>text<ref>c</ref><box>(5,6)(7,8)</box>", [("c", (5, 6, 7, 8))]), ('{"bbox_2d": [10, 20, 1001, 40]}', [("", (10, 20, 1001, 40))]),
    ("<ref>dogs</ref><|LOC_BEGIN|><|LOC_1|><|LOC_2|><|LOC_30|><|LOC_2|><|LOC_30|><|LOC_40|><|LOC_1|><|LOC_40|><|LOC_SEP|><|LOC_5|><|LOC_6|>"
     "<|LOC_7|><|LOC_8|><|LOC_END|>", [("dogs", (1, 2, 30, 40)), ("dogs", (5, 6, 7, 8))]),
])
def test_boxes_are_found_in_every_form(text, expected):
    assert [(box.label, box.corners) for box in find_boxes(text)] == expected


def test_boxes_in_pixels():
    assert Box("", (285, 235, 999, 652)).pixels((2000, 1000)) == (570, 235, 1998, 652)
    assert Box("", (0, 0, 1000, 1000)).pixels((56, 30)) == (0, 0, 56, 30) == Box("", (-5, 0, 1001, math.inf)).pixels((56, 30))


@pytest.mark.parametrize("size, colour", [((40, 30), "black"), ((40, 3000), "white"), ((1920, 1080), "#ffd400")])
def test_drawn_labels_can_be_read(size, colour):
    """Black letters on a bright field, whatever lies below, at least 14 pixels high, inside the picture."""
    image = draw_boxes(Image.new("RGB", size, colour), [Box("a\ncat", (0, 0, 1000, 1000)), Box("", (100, 100, 101, 101)), Box("edge", (900, 990, 1000, 1000))])
    pixels = np.asarray(image).reshape(-1, 3)
    assert min(image.size) >= 448 and (pixels == (0, 0, 0)).all(-1).sum() > 200 and (pixels == (0xff, 0xd4, 0)).all(-1).sum() > 500


@pytest.mark.parametrize("box, size", [
    ([0, 0, 500, 500], (500, 250)), ([-100, 0, 500, 2000], (500, 500)), ([500, 500, 501, 501], (28, 28)), ([999, 999, 1000, 1000], (28, 28)),
    ([0.5, 0, 500.7, 1000], (500, 500))])
def test_the_zoom_crops_inside_the_picture(box, size):
    assert crop(ref.picture(1000, 500), box).size == size


@pytest.mark.parametrize("box", [None, 5, [], [1, 2, 3], ["a", 1, 2, 3], [5, 5, 1, 9], [5, 5, 5, 5], [1000, 0, 1001, 5], [-5, 0, 0, 9],
                                 [math.nan] * 4, [0, 0, math.inf, 5], [True, 0, 5, 5]])
def test_the_zoom_refuses_what_is_no_box_in_a_sentence(box):
    with pytest.raises(InputError, match=r"^.*bbox_2d .*\.$"):
        crop(ref.picture(100, 50), box)


# ------------------------------------------------------------------------------------------------------- 11. run.py


def ask(capsys, *args: str) -> tuple[int, str, str]:
    try:
        code = run.main(list(args))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("args, words", [
    (["--temperature", "-1"], "0 or more"), (["--top-p", "0"], "above 0"), (["--top-p", "1.1"], "up to 1"), (["--temperature", "nan"], "0 or more"),
    (["--top-k", "-2"], "0 or more"), (["--max-new-tokens", "0"], "1 or more"), (["--max-pixels", "10"], "784"), (["--seed", "x"], "whole number"),
    ([], "--image FILE, --prompt TEXT"), (["--prompt", "Hi", "--model", "no/such"], "hf download"), (["--image", "x", "--frobnicate"], "--frobnicate"),
    (["--prompt", "Hi", "--save-logits", "no/such/folder/x"], "cannot be written"), (["--prompt", "Hi " * 5000], "the context holds 4,096"),
    (["--prompt", "Hi", "--device", "tpu"], "cuda"), (["--image", EXAMPLE] * 500, "smaller pictures"),
    (["--chat", "--batch", "x"], "different things"), (["--messages", "x", "--prompt", "y"], "whole conversations"), (["--prompt", "x", "--out", "y"], "--out goes with"),
    (["--chat", "--json"], "for one reply"), (["--video", "x", "--fps", "0"], "0.001 or more"), (["--video", "x", "--max-frames", "0"], "1 or more"),
    (["--video", "no/such.gif"], "does not exist"), (["--zoom"], "nothing to answer")])
def test_bad_options_get_one_sentence_and_exit_2(args, words, capsys):
    code, out, err = ask(capsys, *args)
    last = err.splitlines()[-1]
    assert code == 2 and out == "" and last.startswith("error: ") and words in last


def test_memory_that_runs_out_is_one_sentence_that_says_how_much_was_asked_for(capsys, monkeypatch):
    def on_a_gpu(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB.")

    for fail, much, given in ((lambda _: torch.empty(10**13), "40,000.0 GB", ["--quantize", "int4"]), (on_a_gpu, "20.00 GiB", [])):
        monkeypatch.setattr(run, "run", fail)
        code, out, err = ask(capsys, "--prompt", "Hi", *given)
        assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ") and much in err
        assert ("--quantize" in err) == (not given) and "--max-pixels" not in err      # it says what is left to try
    assert "--max-pixels" in ask(capsys, "--image", EXAMPLE)[2]


def test_what_a_folder_cannot_do_is_said_before_it_is_loaded(capsys, monkeypatch, tmp_path):
    shutil.copytree(HERE / "tiny", tmp_path / "x", ignore=shutil.ignore_patterns("*.safetensors", "*.pt", "*.py", "__pycache__"))
    added = json.loads((HERE / "tiny" / "added_tokens.json").read_text())
    (tmp_path / "x" / "added_tokens.json").write_text(json.dumps({name: id for name, id in added.items() if "think" not in name}))
    code, out, err = ask(capsys, "--prompt", "Hi", "--think", "--model", str(tmp_path / "x"))      # there are not even weights
    assert code == 2 and err == "error: this checkpoint was not taught to think before it answers: ask it without --think\n"


def test_a_line_that_is_no_utf8_ends_no_chat():
    out = subprocess.run([sys.executable, "run.py", "--chat"], cwd=HERE, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
                         input=b"caf\xe9\n/reset\nHello!\n", capture_output=True)
    assert out.returncode == 0 and out.stdout.splitlines()[-1] == b"Hello! Show me a picture."


def test_memory_that_runs_out_ends_no_conversation(script, capsys, monkeypatch):
    script("one")
    fake, calls = run.generate, iter([1])
    monkeypatch.setattr(run, "generate", lambda *args, **more: torch.empty(10**13) if next(calls, None) else fake(*args, **more))
    code, out, err = chat(capsys, monkeypatch, "q1", "q2")
    assert (code, out) == (0, "one\n") and "40,000.0 GB" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_is_refused_where_there_is_none(capsys):
    code, out, err = ask(capsys, "--prompt", "Hi", "--device", "cuda")
    assert code == 2 and err == "error: this machine or this build of torch has no cuda device: use --device cpu, or leave it out\n"


def test_a_missing_package_is_named(tmp_path):
    (tmp_path / "sentencepiece.py").write_text("raise ModuleNotFoundError(name='sentencepiece')")
    out = subprocess.run([sys.executable, "run.py", "--prompt", "Hi"], cwd=HERE, env=os.environ | {"PYTHONPATH": str(tmp_path)},
                         capture_output=True, text=True)
    assert out.returncode == 2 and out.stdout == "" and out.stderr == (
        "error: the package sentencepiece is not installed: pip install -r requirements.txt\n")


def test_the_answer_alone_goes_to_stdout_and_the_same_seed_gives_the_same(capsys):
    code, out, err = ask(capsys, "--image", EXAMPLE)
    assert code == 0 and out.endswith(".\n") and out.count("\n") == 1
    assert "-> " in err and "tokens/s" in err and "\r" not in err and "Warning" not in err
    drawn = [ask(capsys, "--image", EXAMPLE, "--temperature", "3", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert ask(capsys, "--image", EXAMPLE, "--temperature", "3", "--top-k", "1")[1] == out


def test_json_is_one_object(capsys):
    code, out, err = ask(capsys, "--image", EXAMPLE, "--json", "--max-new-tokens", "3")
    reply = json.loads(out)
    assert code == 0 and reply["usage"]["completion_tokens"] == 3 and reply["finish_reason"] == "length"
    assert reply["usage"]["prompt_tokens"] > reply["usage"]["picture_tokens"] > 0 and reply["role"] == "assistant" and set(reply["seconds"]) == {"pictures", "load", "first_token", "other_tokens"}


def test_max_pixels_makes_fewer_tokens(capsys):
    few, many = (json.loads(ask(capsys, "--image", EXAMPLE, "--json", *more)[1])["usage"]["picture_tokens"] for more in (("--max-pixels", "3136"), ()))
    assert 0 < few < many


def test_saved_logits_are_those_of_the_prompt(capsys, tmp_path):
    code, out, err = ask(capsys, "--image", EXAMPLE, "--save-logits", str(tmp_path / "l.safetensors"))
    saved = load_file(tmp_path / "l.safetensors")
    T, N = len(saved["ids"]), len(saved["patches"])
    assert code == 0 and out == "" and [*tmp_path.iterdir()] == [tmp_path / "l.safetensors"]
    assert {name: tuple(t.shape) for name, t in saved.items()} == {
        "ids": (T,), "positions": (3, T), "is_vision": (T,), "patches": (N, 588), "grids": (1, 3), "logits": (T, saved["logits"].shape[1])}
    model = load(HERE / "tiny")
    again = model(model.prepare(saved["ids"].tolist(), saved["patches"], saved["grids"].tolist()))
    assert torch.equal(again, saved["logits"]) and saved["logits"].dtype == torch.float32


def test_save_logits_replaces_nothing_but_a_file_and_only_when_complete(capsys, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")            # stands for a device
    (tmp_path / "old").write_text("precious")
    monkeypatch.setattr(run, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    for name, words in (("pipe", "cannot be written"), ("old", "disk full")):
        code, out, err = ask(capsys, "--image", EXAMPLE, "--save-logits", str(tmp_path / name))
        assert code == 2 and words in err.splitlines()[-1]
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "old").read_text() == "precious" and len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("name, text", [
    ("added_tokens.json", '{"<think>": "x"}'), ("added_tokens.json", "[]"), ("added_tokens.json", '{"<think>": 1e30}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'), ("tokenizer_config.json", "{"), ("tokenizer.model", ""),
    ("tokenizer.model", None), ("added_tokens.json", None), ("config.json", None), ("model.safetensors", None),
    ("generation_config.json", '{"eos_token_id": {"a": 1}}'), ("preprocessor_config.json", '{"size": [1]}'),
    ("preprocessor_config.json", '{"size": {"longest_edge": 0}}'), ("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}')])
def test_damaged_files_of_a_folder_are_named_in_one_sentence(capsys, tmp_path, name, text):
    shutil.copytree(HERE / "tiny", tmp_path / "copy", ignore=shutil.ignore_patterns("*.pt", "*.py", "__pycache__"))
    (tmp_path / "copy" / name).unlink(missing_ok=True)
    if text is not None:
        (tmp_path / "copy" / name).write_text(text)
    code, out, err = ask(capsys, "--image", EXAMPLE, "--model", str(tmp_path / "copy"))
    assert code == 2 and out == "" and err.splitlines()[-1].startswith("error: ") and str(tmp_path / "copy") in err


def test_what_is_written_to_a_link_goes_where_it_leads(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    run.write_whole(tmp_path / "link", lambda path: path.write_text("new"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_ctrl_c_keeps_the_text_so_far_and_exits_130():
    slow = """if True:
        import ernie_vl, run, sys, time
        fast = ernie_vl.sample
        ernie_vl.sample = lambda *args: time.sleep(0.3) or fast(*args)
        sys.exit(run.main())"""
    process = subprocess.Popen([sys.executable, "-c", slow, "--image", EXAMPLE], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and first == "A" and out.endswith("\n") and "Traceback" not in err


# ------------------------------------------------------------------------------------------------ 12. conversations
@pytest.fixture
def script(monkeypatch):
    """A stand-in for the model: it generates the texts given to it, one a reply, and records the prompts it was asked."""
    def play(*texts: str) -> list[str]:
        prompts, tokenizer, texts = [], Tokenizer(HERE / "tiny"), iter(texts)

        def generate(model, inputs, most, stop=(), *sampling, cache=None):
            if most == 1:                        # the conversation is only read
                return
            prompts.append(tokenizer.decode(inputs.ids.tolist(), tuple(tokenizer.special)))
            yield from tokenizer.encode(next(texts), control=True)[:most]
        monkeypatch.setattr(run, "generate", generate)
        return prompts
    return play


ZOOM_CALL = '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": %s}}\n</tool_call>\n'
CROPPED = "User: <tool_output>\nPicture {}:<|IMAGE_START|>"


def test_the_model_zooms_until_it_answers(script, capsys):
    prompts = script("Small.\n</think>\n\n" + ZOOM_CALL % "[0, 0, 500, 500]", "Now I see.</think>\n\n" + ZOOM_CALL % "[100, 100, 200, 200]", "x</think>A star.")
    code, out, err = ask(capsys, "--image", EXAMPLE, "--prompt", "Read it.", "--zoom", "--think")
    assert (code, out) == (0, "A star.\n") and err.count("zoom to [") == 2
    assert ZOOM_TOOL["function"]["description"] in prompts[0] and CROPPED.format(2) not in prompts[0]
    assert CROPPED.format(2) in prompts[1] and CROPPED.format(3) in prompts[2] and "\nSmall.\n</think>" in prompts[1]


@pytest.mark.parametrize("box, words", [("[500, 500, 100, 600]", "empty or reversed"), ("[2000, 0, 3000, 10]", "outside"), ('"all"', "four numbers"),
                                        ("[1, 2]", "four numbers"), ("null", "four numbers")])
def test_a_zoom_to_nowhere_is_refused_to_the_model(script, capsys, box, words):
    prompts = script(ZOOM_CALL % box, "I cannot tell.")
    code, out, err = ask(capsys, "--image", EXAMPLE, "--zoom")
    assert (code, out) == (0, "I cannot tell.\n") and words in prompts[1].split("<tool_output>")[1]


def test_zoom_calls_are_shown_where_nobody_runs_them(script, capsys):
    script("Let me see.\n" + ZOOM_CALL % "[0, 0, 5, 5]")
    code, out, err = ask(capsys, "--image", EXAMPLE)
    assert code == 0 and out.splitlines()[0] == "Let me see." and '"image_zoom_in_tool"' in out.splitlines()[1]


def test_zooming_ends(script, capsys):
    """After --max-zooms the model is told to answer; a call all the same is what the reply is."""
    prompts = script(*[ZOOM_CALL % "[0, 0, 500, 500]"] * 9)
    reply = json.loads(ask(capsys, "--image", EXAMPLE, "--zoom", "--max-zooms", "2", "--json")[1])
    assert len(prompts) == 4 and "There is no zoom left" in prompts[3] and reply["finish_reason"] == "tool_calls" and reply["content"] == ""
    script(*[ZOOM_CALL % "[0, 0, 500, 500]"] * 9)
    assert "--max-zooms allows 1" in ask(capsys, "--image", EXAMPLE, "--zoom", "--max-zooms", "1")[2]
    script(ZOOM_CALL % "[0, 0, 500, 500]", "Nothing.")
    assert ask(capsys, "--prompt", "Hi", "--zoom")[:2] == (0, "Nothing.\n")             # no picture


@pytest.fixture
def write_json(tmp_path):
    def write(name: str, value) -> str:
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return str(tmp_path / name)
    return write


def test_tool_calls_are_printed_as_json_and_results_go_back_as_messages(script, capsys, write_json):
    tools = write_json("tools.json", [WEATHER])
    prompts = script(f"Let me see.\n{CALLED}")
    code, out, err = ask(capsys, "--prompt", "Weather?", "--tools", tools)
    said, call = out.splitlines()
    assert code == 0 and said == "Let me see." and json.loads(call)["function"] == CALL["function"] and '"get_weather"' in prompts[0]
    script(CALLED)
    reply = json.loads(ask(capsys, "--prompt", "Weather?", "--tools", tools, "--json")[1])
    assert reply["finish_reason"] == "tool_calls" and reply["content"] == "" and reply["tool_calls"][0]["function"] == CALL["function"]
    prompts = script("Sunny.")
    talk = write_json("talk.json", {"messages": [says("user", "Weather?"), reply, says("tool", "sun", tool_call_id=reply["tool_calls"][0]["id"])],
                                    "tools": [WEATHER]})
    assert ask(capsys, "--messages", talk)[:2] == (0, "Sunny.\n")
    assert prompts[0].endswith(f"Assistant: {CALLED}{END}User: <tool_output>\nsun\n</tool_output>\n\nAssistant: {EMPTY}")


@pytest.mark.parametrize("text, thinking, reasoning, rest", REPLIES)
def test_hostile_replies_never_end_in_a_traceback(script, capsys, text, thinking, reasoning, rest):
    script(text, "Done.", "Done.")
    code, out, err = ask(capsys, "--image", EXAMPLE, *["--think"] * thinking, "--zoom", "--json", "--max-new-tokens", "2000")
    assert code == 0 and set(json.loads(out)) >= {"role", "content", "finish_reason"}


def test_reasoning_is_shown_where_it_is_wanted(script, capsys, monkeypatch):
    for options, out in (([], "B\n"), (["--show-thinking"], "A\n\nB\n")):
        script("A\n</think>\n\nB")
        assert ask(capsys, "--prompt", "Q", "--think", *options)[:2] == (0, out)
    script("A\n</think>\n\nB")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert ask(capsys, "--prompt", "Q", "--think")[1] == "\033[2mA\033[0m\n\nB\n"
    script("A, and then the tokens end")
    reply = json.loads(ask(capsys, "--prompt", "Q", "--think", "--json")[1])
    assert reply["reasoning_content"] == "A, and then the tokens end" and reply["content"] == ""


def test_boxes_are_drawn_and_in_the_json(script, capsys, tmp_path):
    answer = 'Two: ```json\n[{"bbox_2d": [0, 0, 500, 500], "label": "circle"}, {"bbox_2d": [600, 100, 1000, 1000]}]\n```'
    out, size = tmp_path / "boxes.png", load_picture(EXAMPLE).size
    script(answer)
    code, said, err = ask(capsys, "--image", EXAMPLE, "--boxes", str(out), "--json")
    assert code == 0 and json.loads(said)["boxes"][0] == {"label": "circle", "bbox": [0, 0, size[0] // 2, size[1] // 2]}
    assert "drew 2 boxes" in err and min(load_picture(out).size) >= 448
    script("Nothing.")
    out.unlink()
    assert ask(capsys, "--image", EXAMPLE, "--boxes", str(out))[0] == 0 and not out.exists()
    for path, words in ((tmp_path / "no" / "x.png", "cannot be written"), (tmp_path / "x.nonsense", "end in .png")):
        script(answer)
        code, _, err = ask(capsys, "--image", EXAMPLE, "--boxes", str(path))
        assert code == 2 and words in err.splitlines()[-1]
    assert "--boxes draws on a picture" in ask(capsys, "--prompt", "Hi", "--boxes", str(out))[2]


def chat(capsys, monkeypatch, *lines: str, options: tuple = ()) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return ask(capsys, "--chat", *options)


def test_a_chat_is_the_conversation_that_messages_would_be(capsys, monkeypatch, tmp_path):
    """A picture in each turn. The cache changes neither logits nor answers, and a turn computes its own tokens alone."""
    seen, saved = [], tmp_path / "talk.json"
    real, loaded = ernie_vl.generate, run.load

    @torch.inference_mode()
    def watched(model, inputs, most, *args, cache=None, **options):
        done = cache.keep(model.marks(inputs))
        alone = model(model.rest(inputs, done), copy.deepcopy(cache))[-1:]
        seen.append((most, len(inputs.ids), done, distance(alone, model(inputs)[-1:]), inputs.ids.tolist()))
        return real(model, inputs, most, *args, cache=cache, **options)
    monkeypatch.setattr(run, "generate", watched)
    monkeypatch.setattr(run, "load", lambda *given: loaded(*given).double())      # rounding would hide a small mistake
    star = str(HERE / "examples" / "star.jpg")
    code, out, err = chat(capsys, monkeypatch, "What is in this picture?", f"/image {star}", "Describe this image.", f"/save {saved}", "/quit",
                          options=("--image", EXAMPLE, "--prompt", "Describe this image."))
    assert code == 0 and len(out.splitlines()) == 3 and "error" not in err
    asked = [turn for turn in seen if turn[0] > 1]
    assert len(asked) == 3 and max(difference for *_, difference, _ in seen) < 1e-5
    for (_, length, done, _, ids), (_, settled, _, _, history) in zip(asked[1:], seen[1::2]):
        assert ids[:settled] == history and done == settled        # all that was said is there; only the new turn is computed
    again = json.loads(saved.read_text())
    assert [message["role"] for message in again] == ["user", "assistant"] * 3 and again[4]["content"][1] == {"type": "image", "image": star}
    (tmp_path / "again.json").write_text(json.dumps(again[:-1]))
    assert ask(capsys, "--messages", str(tmp_path / "again.json"))[:2] == (0, out.splitlines()[-1] + "\n")


def test_chat_commands(script, capsys, monkeypatch, tmp_path):
    prompts = script("one", "two", "three")
    lines = ("first", "/image no.png", "/image", "/frobnicate", f"/image {EXAMPLE}", "second", "/reset", "third", "/save /no/such/x", f"/save {'a' * 300}",
             "/quit", "never")
    code, out, err = chat(capsys, monkeypatch, *lines, options=("--system", "Be brief."))
    assert (code, out) == (0, "one\ntwo\nthree\n") and len(prompts) == 3
    assert prompts[1].startswith(f"{BEGIN}Be brief.\nUser: first\nAssistant: one{END}User: secondPicture 1:<|IMAGE_START|>")
    assert prompts[2] == f"{BEGIN}Be brief.\nUser: third\nAssistant: {EMPTY}"
    assert [words in err for words in ("no.png does not exist", "needs a file", "/frobnicate is no command", "cannot be written", "could not be written")] == [True] * 5


def test_one_tool_alone_is_a_list_of_one(script, capsys, write_json):
    prompts = script("ok")
    assert ask(capsys, "--prompt", "Q", "--tools", write_json("t.json", WEATHER))[0] == 0 and '"get_weather"' in prompts[0]


def test_in_a_chat_the_person_answers_for_the_tools(script, capsys, monkeypatch, write_json):
    prompts = script(CALLED, "Sunny.")
    code, out, err = chat(capsys, monkeypatch, "Weather?", "sun", options=("--tools", write_json("t.json", [WEATHER])))
    assert code == 0 and out.endswith("\nSunny.\n") and "<tool_output>\nsun\n" in prompts[1]


def test_ctrl_c_stops_an_answer_and_not_the_chat(capsys, monkeypatch):
    def interrupted(model, inputs, most, *args, **more):
        if most > 1:
            yield from Tokenizer(HERE / "tiny").encode("Half an")
            raise KeyboardInterrupt
    monkeypatch.setattr(run, "generate", interrupted)
    code, out, err = chat(capsys, monkeypatch, "q1", "q2")
    assert (code, out) == (0, "Half an\nHalf an\n")


def test_a_picture_waits_for_the_question_that_is_answered(script, capsys, monkeypatch):
    prompts, fake = script("never", "seen"), run.generate
    calls = iter([KeyboardInterrupt])

    def generate(model, inputs, most, *args, **more):
        if most > 1 and (stop := next(calls, None)):
            raise stop
        yield from fake(model, inputs, most, *args, **more)
    monkeypatch.setattr(run, "generate", generate)
    code, out, err = chat(capsys, monkeypatch, f"/image {EXAMPLE}", "q1", "q2")
    assert code == 0 and prompts[0].startswith(f"{BEGIN}User: q2Picture 1:")


def requests(tmp_path, *lines) -> Path:
    (tmp_path / "in.jsonl").write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return tmp_path / "in.jsonl"


def test_a_batch_answers_every_line_and_goes_on_where_it_stopped(script, capsys, tmp_path):
    good = {"messages": [user("Q")]}
    lines = requests(tmp_path, good, "{", "", [user(IMG)], {"messages": "x"}, good, {"tools": [{}], **good}, good)
    script("a", "b", "c")
    code, out, err = ask(capsys, "--batch", str(lines), "--out", str(tmp_path / "out.jsonl"))
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert code == 0 and out == "" and [reply["line"] for reply in found] == [1, 2, 4, 5, 6, 7, 8]
    assert [reply.get("content") for reply in found] == ["a", None, None, None, "b", None, "c"] and err.splitlines()[-1] == "7 of 7 requests, 4 with an error"
    assert "JSON" in found[1]["error"] and "x.png does not exist" in found[2]["error"]
    whole = (tmp_path / "out.jsonl").read_text()
    within = whole[: whole.index('{"line": 6') + 20].encode()
    for cut, redone in ((within, 3), (within + "\u4f60".encode()[:2], 3), (whole.encode(), 0)):      # interrupted within line 6, within a character; finished
        (tmp_path / "out.jsonl").write_bytes(cut)
        script(*"xyz"[:redone])
        assert ask(capsys, "--batch", str(lines), "--out", str(tmp_path / "out.jsonl"))[0] == 0
        again = [json.loads(line)["line"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert again == [1, 2, 4, 5, 6, 7, 8]
    script("a", "b", "c")
    assert len(ask(capsys, "--batch", str(lines))[1].splitlines()) == 7                 # to stdout


def test_a_batch_destroys_nothing_and_takes_any_text(script, capsys, tmp_path):
    notes, lines = tmp_path / "notes.txt", requests(tmp_path, {"messages": [says("user", "a\u2028b")]}, '{"messages": [{"role": "user", "content": ["text"]}]}')
    notes.write_text("precious")
    (tmp_path / "replies.jsonl").write_text('{"line": 1, "messages": [{"role": "user", "content": "Q"}]}\n')
    for given, out in ((lines, notes), (lines, lines), (tmp_path / "replies.jsonl",) * 2):
        before = out.read_text()
        code, _, err = ask(capsys, "--batch", str(given), "--out", str(out))
        assert code == 2 and "name another file" in err and out.read_text() == before
    lines.write_text('{"messages": [{"role": "user", "content": "a\u2028b"}]}\n' + json.dumps({"messages": [user(IMG, "\ud800")]}).replace("x.png", "\\ud800\u2028.png") + "\n", encoding="utf-8")
    for turn in range(2):
        script("ok\u2028")
        assert ask(capsys, "--batch", str(lines), "--out", str(tmp_path / "o"))[0] == 0
        found = [json.loads(line) for line in (tmp_path / "o").read_text(encoding="utf-8").split("\n")[:-1]]
        assert [reply["line"] for reply in found] == [1, 2] and found[0]["content"] == "ok\u2028" and "cannot be read" in found[1]["error"]


def test_pictures_come_as_data_uris_and_in_openai_messages(capsys, write_json):
    uri = "data:image/png;base64," + base64.b64encode(Path(EXAMPLE).read_bytes()).decode()
    expected = ask(capsys, "--image", EXAMPLE)[1]
    for url in (uri, EXAMPLE, f"file://{EXAMPLE}"):
        content = [{"type": "text", "text": "Describe this image."}, {"type": "image_url", "image_url": {"url": url}}]
        assert ask(capsys, "--messages", write_json("m.json", [{"role": "user", "content": content}]))[:2] == (0, expected)


def test_pictures_and_clips_keep_their_order(script, capsys, tmp_path):
    prompts, (clip, *_) = script("ok"), write_clip("gif", tmp_path, 3)
    code, out, err = ask(capsys, "--video", str(clip), "--image", EXAMPLE, "--video", str(clip), "--max-pixels", "3136")
    assert code == 0 and re.findall(r"(\w+ \d):<", prompts[0]) == ["Video 1", "Picture 1", "Video 2"] and "3 frames 120 x 90 -> " in err


@pytest.mark.parametrize("name, content, option, words", [
    ("m.json", "{", "--messages", "no valid JSON"), ("m.json", "[]", "--messages", "list of messages"), ("m.json", b"\xff\xfe\xff", "--messages", "no UTF-8"),
    ("m.json", '[{"role": "robot"}]', "--messages", "'robot'"), ("m.json", '[{"role": "assistant", "content": "A"}]', "--messages", "asks nothing"), (None, "", "--messages", "cannot be read"), (None, "", "--batch", "cannot be read"),
    ("t.json", '[{"function": {}}]', "--tools", "has no name"), ("t.json", '{"messages": []}', "--tools", "are a list"), ("t.json", "{", "--tools", "no valid JSON"), ("t.json", "5", "--tools", "are a list"),
    ("m.json", '[{"role": "user", "content": [{"type": "image", "image": "https://x/y.png"}]}]', "--messages", "nothing is downloaded"),
    ("m.json", '[{"role": "user", "content": [{"type": "image", "image": "data:image/png;base64,abc"}]}]', "--messages", "picture")])
def test_files_that_are_no_requests_get_one_sentence(capsys, tmp_path, name, content, option, words):
    path = tmp_path / (name or "missing")
    if name:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = ask(capsys, option, str(path), *(["--prompt", "Hi"] if option == "--tools" else []))
    assert code == 2 and out == "" and words in err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------- 13. tiny/ and README
LEAST = {"describe": 19, "read": 19, "count": 19, "locate": 19, "compare": 19, "watch": 19, "talk": 19, "think": 18, "zoom": 19, "decline": 18}      # of 20


@pytest.mark.parametrize("skill", LEAST)
def test_tiny_on_pictures_it_never_saw(skill):
    """20 fresh samples. tiny/README.md says what it gets of 500; the bar is at most one below what it got of these."""
    model, tokenizer = load(HERE / "tiny"), Tokenizer(HERE / "tiny")
    assert 20 * evaluate.score(model, tokenizer, skill, 20) >= LEAST[skill]


def test_tiny_is_small():
    assert sum(f.stat().st_size for f in (HERE / "tiny").iterdir() if f.is_file() and f.name != "training.pt") <= 4_000_000


def told(text: str) -> list[tuple[str, str, str]]:
    """A scene in words -> (colour, shape, place) of every thing."""
    return re.findall(r"a (\w+) (circle|square|triangle|star) ((?:at|on|in) the \w+(?: left| right)?)", text)


def true_answer(question: str, things: list[tuple[str, str, str]]) -> str:
    """What follows from the words alone; of what is counted the number."""
    one = lambda words: [thing for thing in things if set(words.split()) <= {*thing, "thing"}]
    if match := re.match(r"(?:How many things are|How many are|Count what is|How many|Count the) (.*?)s?(?: are there| do you see)?[.?]$", question):
        return f"{len(one(match[1]))}."
    if match := re.match(r"Where (?:is|do you see) the (.*)[?]", question):
        if match[1] in ("circle", "square", "triangle", "star"):
            return f"The {match[1]} is {one(match[1])[0][2]}."
        return f"{one(match[1])[0][2]}." if one(match[1]) else f"no {match[1]}."
    at = {place: (colour, shape) for colour, shape, place in things}
    if match := re.match(r"What colour is the thing (.*)[?]", question):
        return f"{at[match[1]][0].capitalize()}."
    if match := re.match(r"What (colour|shape) is the (.*)[?]", question):
        [(colour, shape, _)] = one(match[2])
        return f"The {match[2]} is {colour if match[1] == 'colour' else 'a ' + shape}."
    return f"A {' '.join(at[re.match(r'What is (.*)[?]', question)[1]])}."


def test_what_scenes_says_about_a_scene_told_in_words_is_true():
    asked = set()
    for seed in range(150):
        it = scenes.example("told", seed)
        scene, question = it.messages[0]["content"][0]["text"].split(". ", 1)
        for question, answer in [(question, it.answer), *((question, answer) for _, question, answer in it.more)]:
            assert answer.split(": ")[-1] == true_answer(question, told(scene)), (scene, question)
            if ": " in answer:      # it counts along, one by one
                for (colour, shape, place), item in zip(told(scene), answer.lower().split(": ")[0].split(", "), strict=True):
                    assert re.fullmatch(rf"{place} ({colour}|a {shape}|{colour} {shape})( \(\d\))?", item)
                assert [*map(int, re.findall(r"\((\d)\)", answer))] == [*range(1, (int(answer[-2]) if answer[-2].isdigit() else " no " not in answer) + 1)]
            asked.add(" ".join(question.split()[:2]))
    assert asked == {"How many", "Count the", "Count what", "Where is", "Where do", "What is", "What colour", "What shape"}


def test_scenes_are_the_same_for_the_same_seed():
    for skill in scenes.SKILLS | scenes.PRACTICE:
        one, two, other = (scenes.example(skill, seed) for seed in (7, 7, 8))
        assert one.answer == two.answer and [p.tobytes() for p in scenes.pictures_of(one)] == [p.tobytes() for p in scenes.pictures_of(two)]
        assert (one.answer, one.messages[0]["content"]) != (other.answer, other.messages[0]["content"])


@pytest.mark.parametrize("example", json.loads((HERE / "examples" / "examples.json").read_text()), ids=lambda example: example["question"])
def test_tiny_answers_the_examples(capsys, example):
    files = [argument for file in example["files"] for argument in ("--video" if file.endswith(".gif") else "--image", str(HERE / "examples" / file))]
    code, out, _ = ask(capsys, *files, "--prompt", example["question"], *example.get("options", ()))
    assert code == 0 and out.split("</think>")[-1].strip() == example["answer"]


def test_conversations_of_a_pack_do_not_see_one_another():
    model, tokenizer = load(HERE / "tiny"), Tokenizer(HERE / "tiny")
    examples = [(skill, scenes.example(skill, 3)) for skill in ("compare", "talk", "watch", "count")]
    pack, alone = train.Pack(tokenizer, model.cfg, examples), [train.Pack(tokenizer, model.cfg, [it]) for it in examples]
    assert pack.lengths == [len(one.targets) for one in alone] and torch.equal(pack.targets, torch.cat([one.targets for one in alone]))
    with torch.no_grad():
        separately = torch.cat([model(one.inputs) for one in alone])
        with train.apart(pack.lengths):
            assert distance(model(pack.inputs), separately) < 3e-5
        assert distance(model(pack.inputs), separately) > 0.1


def test_the_bias_brings_in_experts_that_nobody_chooses():
    model = load(HERE / "tiny")
    gate = next(module for module in model.modules() if isinstance(module, Router))
    x, chosen = torch.randn(1, gate.weight.shape[1], generator=torch.manual_seed(0)), set()
    for rate, everybody in ((0.0, False), (0.05, True)):
        balance = train.Balance(model, rate, 0, 0)
        for _ in range(100):
            chosen |= set(gate(x)[1].flatten().tolist())
            balance.step()
        assert (len(chosen) == len(gate.weight)) is everybody


def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    drawn, draw = [], train.Drawn.__getitem__
    monkeypatch.setattr(train.Drawn, "__getitem__", lambda self, step: drawn.append(step) or draw(self, step))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def again(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path), "--workers", "0", *more])
        with torch.enable_grad():
            train.main()
        return capsys.readouterr().out

    assert re.fullmatch(r" +\d+\.\d min  step +2  loss \d\.\d+ .*  describe 0 .*\n", again("--steps", "2"))
    before = load(tmp_path).embed_tokens.weight
    assert "step     4  loss" in again("--steps", "4", "--resume") and not torch.equal(load(tmp_path).embed_tokens.weight, before)
    assert load_picture(str(tmp_path / "curves.png")).width > 800
    (tmp_path / "training.pt").unlink()      # from the weights alone, on pictures that nobody was trained on
    again("--steps", "1", "--resume")
    assert drawn == [0, 1, 2, 3, train.FRESH_START]
    kept = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="error: there are weights in .*: --resume goes on"):      # it would begin in their place
        again("--steps", "1")
    assert (tmp_path / "model.safetensors").read_bytes() == kept


@pytest.mark.parametrize("args, words", [(["--count", "0"], "1 or more"), (["--folder", "nowhere"], "config.json"), (["--skills"], "--skills")])
def test_evaluate_refuses_bad_options_in_one_sentence(args, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *args])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_print_that_is_wider_than_its_picture_is_drawn(monkeypatch):
    monkeypatch.setattr(scenes, "word", lambda rng, longest: "W" * longest)
    for seed in range(40):
        assert scenes.example("small", seed).answer == "WWW"


def test_the_answers_that_the_readme_shows(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(HERE)
    shown = re.findall(r"^\$ .*\bpython run.py (--(?:image|video) examples.*)\n((?:(?!\$|```).*\n)+)", (HERE / "README.md").read_text(), re.M)
    for command, answer in shown:
        assert ask(capsys, *shlex.split(command.replace("box.png", str(tmp_path / "box.png"))))[:2] == (0, answer), command
    assert len(shown) == 6 and (tmp_path / "box.png").is_file()


def test_the_python_of_the_readme_runs(capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    code = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.S)[1]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == "A yellow star at the bottom.\n"


# ------------------------------------------------------------------------- 14. live, where transformers is installed
@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers==5.23.0 to compare live")


def media(prompt: str) -> list[torch.Tensor]:
    return [REFERENCE[f"patches.{name}"] for name in ref.prompt_ids(prompt)[1]]


@pytest.mark.parametrize("size", [(56, 56), (100, 75), (30, 20), (640, 480), (14, 300), (301, 299), (1, 1), (1280, 720),
                                  (97, 1033), (2500, 2300), (4000, 700), (28, 112)])
def test_transformers_makes_the_same_patches(transformers, size):
    theirs, grid = ref.their_patches([ref.picture(*size)])
    patches, ours = patchify([ref.picture(*size)])
    assert grid[0].tolist() == list(ours) and (patches - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ref.MODELS)
@pytest.mark.parametrize("prompt", ref.PROMPTS)
def test_transformers_computes_the_same_logits_and_greedy_ids(transformers, tmp_path, name, prompt):
    folder = ref.write_checkpoint(name, tmp_path)
    ours, theirs = load(folder), ref.their_model(folder)
    for rule in ref.RULES:
        inputs = prepared(ours, prompt, rule)
        given = ref.their_inputs(inputs.ids.tolist(), media(prompt), inputs.grids)
        assert distance(ours(inputs), ref.their_logits(theirs, given, inputs.positions if rule == "official" else None)) <= 1e-5
    assert [*generate(ours, inputs, 32, stop=())] == ref.their_greedy(theirs, given).tolist()


@pytest.mark.parametrize("name", ref.MODELS)
def test_transformers_in_bf16_is_no_closer_to_fp32_than_we_are(transformers, tmp_path, name):
    """Mean error over all fixtures; routing can flip in bf16, so a single fixture is a matter of luck."""
    folder, errors = ref.write_checkpoint(name, tmp_path), {"ours": 0.0, "theirs": 0.0}
    exact, ours, theirs = load(folder), load(folder, dtype=torch.bfloat16), ref.their_model(folder, torch.bfloat16)
    for prompt in ref.PROMPTS:
        inputs = prepared(exact, prompt, "hf_5_23")
        truth, given = exact(inputs), ref.their_inputs(inputs.ids.tolist(), media(prompt), inputs.grids)
        errors["ours"] += float((ours(inputs).float() - truth).abs().mean())
        errors["theirs"] += float((ref.their_logits(theirs, given).float() - truth).abs().mean())
    assert errors["ours"] <= 1.1 * errors["theirs"], errors


def test_transformers_opens_tiny_and_says_the_same(transformers):
    ours, theirs = load(HERE / "tiny"), ref.their_model(HERE / "tiny")
    question = [{"type": "text", "text": "Describe this image."}, {"type": "image", "image": EXAMPLE}]
    prompt = encode_chat(Tokenizer(HERE / "tiny"), [{"role": "user", "content": question}])
    inputs = ours.prepare(*prompt)
    given = {"input_ids": inputs.ids[None], "attention_mask": torch.ones_like(inputs.ids)[None], "pixel_values": prompt.patches,
             "image_grid_thw": torch.tensor(prompt.grids), "mm_token_type_ids": (inputs.ids == ours.cfg.image_token_id).long()[None],
             "moe_mm_token_type_ids": inputs.is_vision.long()[None]}
    assert distance(ours(inputs), ref.their_logits(theirs, given)) <= 1e-4
    assert [*generate(ours, inputs, 12, stop=())] == ref.their_greedy(theirs, given, 12).tolist()
    budget = dict(zip(("shortest_edge", "longest_edge"), pixel_budget(HERE / "tiny")))
    theirs, grid = ref.their_patches([load_picture(EXAMPLE)], size=budget)
    assert grid.tolist() == [list(g) for g in prompt.grids] and (theirs - prompt.patches).abs().max() <= 1e-6


# --------------------------------------------------------------------------- 15. the file says what it does, and is short
def execute(source: str) -> types.ModuleType:
    sys.modules["edited"] = module = types.ModuleType("edited")
    exec(compile(source, "<ernie_vl>", "exec"), module.__dict__)
    return module


def like(model, source: str):
    """The same weights in an edited copy of ernie_vl.py."""
    edited = execute(source).ErnieVL(model.cfg)
    edited.load_state_dict(model.state_dict(), assign=True)
    return edited.eval()


MISTAKES = {  # old text -> new text; each was made by a port of this model, or could be
    "markers go to text experts": ("| torch.isin(ids, torch.tensor(markers))", ""),
    "everything goes to text experts": ("y[mine] = experts(x[mine])", "y[mine] = self.text_moe(x[mine])"),
    "router bias also weighs": ("scores.gather(", "(scores + self.e_score_correction_bias).gather("),
    "router bias ignored": ("(scores + self.e_score_correction_bias).topk", "scores.topk"),
    "router bias on logits": ("chosen = (scores + ", "chosen = (F.linear(x.float(), self.weight) + "),
    "expert weights not renormalised": ("(weights / weights.sum(-1, keepdim=True).clamp(min=1e-12))", "weights"),
    "sigmoid for softmax": ("F.linear(x.float(), self.weight.float()).softmax(-1)", "F.linear(x.float(), self.weight).sigmoid()"),
    "shared experts forgotten": ("else y + self.shared_experts(x)", "else y"),
    "h and w swapped": ("[1, 2] * rows", "[2, 1] * rows"),
    "sections side by side": ("[1, 2] * rows", "[1] * rows + [2] * rows"),
    "time takes the fast pairs": ("[1, 2] * rows + [0] * times", "[0] * times + [1, 2] * rows"),
    "rope theta 10,000": ("cfg.rope_theta, positions.device", "10_000.0, positions.device"),
    "halves for pairs in the decoder": ("class KVCache:", "rotate_pairs = rotate_halves\nclass KVCache:"),
    "pairs for halves in the ViT": ("class VisionMLP", "rotate_halves = lambda *x: rotate_pairs(*x)\nclass VisionMLP"),
    "one position a picture token": ("torch.cartesian_prod(*map(torch.arange, grid)).T + start",
                                     "(start + torch.arange(len(tokens))).expand(3, -1)"),
    "text continues after the count": ('start += max(grid[1:] if rule == "hf_5_23" else grid)', "start += len(tokens)"),
    "text continues after the rows": ('start += max(grid[1:] if rule == "hf_5_23" else grid)', "start += h"),
    "key heads tiled": ("z[:, None].expand(-1, len(q) // len(z), -1, -1)", "z.tile(len(q) // len(z), 1, 1).unflatten(0, (len(z), -1))"),
    "no causal mask": ("is_causal=T == S", "is_causal=False"),
    "ViT row and column swapped": ("return blocks.transpose(1, 2)", "return blocks.flip(-1).transpose(1, 2)"),
    "ViT positions in raster order": ("return blocks.transpose(1, 2).reshape(h * w, 2)", "return cells"),
    "ViT frequencies over d": ("VISION_ROPE_THETA, self", "VISION_ROPE_THETA**0.5, self"),
    "frames see each other": ("[h * w for t, h, w in grids for _ in range(t)]", "[t * h * w for t, h, w in grids]"),
    "pictures see each other": ("[h * w for t, h, w in grids for _ in range(t)]", "[len(patches)]"),
    "GELU for QuickGELU": ("a * torch.sigmoid(1.702 * a)", "F.gelu(a)"),
    "last norm of the ViT forgotten": ("return self.ln(x)", "return x"),
    "tanh GELU in the resampler": ("nn.GELU()", 'nn.GELU("tanh")'),
    "a picture paired with zeros": ("(frames, frames) if", "(frames, 0 * frames) if"),
    "odd and even frames swapped": ("(frames[0::2], frames[1::2])", "(frames[1::2], frames[0::2])"),
    "after_norm forgotten": ("self.after_norm(", "("),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_known_mistakes_would_be_noticed(model, mistake):
    """One-line edits of ernie_vl.py must move the logits or positions of the reference prompt, far above its tolerance."""
    old, new = MISTAKES[mistake]
    assert SOURCE.count(old) == 1
    inputs, edited = prepared(model, "mixed"), like(model, SOURCE.replace(old, new))
    theirs = prepared(edited, "mixed")
    assert theirs.positions.tolist() != inputs.positions.tolist() or distance(edited(theirs), model(inputs)) > 1e-4


SHAPE = r"\([^()]*,[^()]*\)"
SHAPES = re.compile(rf"#\s*({SHAPE}(?:, {SHAPE})*)?\s*(?:->\s*({SHAPE}(?:, {SHAPE})*))?")


class ShapeComments:
    """A trace function that compares `x = ...  # (T, D)` and `def f(x):  # (T, D) -> (T, K)` with live tensors. A letter
    that the config gives has its value everywhere; the others get theirs where they first stand in a call."""

    def __init__(self, source: str, cfg):
        text, vision = cfg.text, cfg.vision
        self.letters = dict(V=text.vocab_size, D=text.hidden_size, H=text.num_attention_heads, G=text.num_key_value_heads,
                            d=text.head_dim, E=text.moe_num_experts, K=text.moe_k, C=vision.hidden_size, P=3 * 14 * 14)
        self.in_vit = dict(H=vision.num_heads, d=vision.hidden_size // vision.num_heads)
        found = {n: SHAPES.search(line) for n, line in enumerate(source.splitlines(), 1)}
        found = {n: match.groups() for n, match in found.items() if match and any(match.groups())}
        self.assigned, self.functions, self.checked, self.lies = {}, {}, set(), []
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.lineno in found:
                self.functions[node.lineno] = found[node.lineno]
            if isinstance(node, ast.Assign) and node.lineno in found:
                target = node.targets[0]
                parts = target.elts if isinstance(target, ast.Tuple) else [target]
                self.assigned[node.lineno] = [part.id for part in parts], found[node.lineno][0]

    def compare(self, line: int, shapes: str | None, values, letters: dict) -> None:
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        for shape, tensor in zip(re.findall(SHAPE, shapes or ""), tensors):
            dims = [dim.strip() for dim in shape[1:-1].split(",") if dim.strip()]
            wanted = [self.size(dim, size, letters) for dim, size in zip(dims, tensor.shape)]
            self.checked.add(line)
            if len(dims) != tensor.ndim or wanted != list(tensor.shape):
                self.lies.append(f"line {line}: {shape} is {tuple(tensor.shape)}")

    def size(self, dim: str, found: int, letters: dict):
        if dim.isidentifier():
            return letters.setdefault(dim, found)
        return found if " " in dim or dim == "tokens" else eval(re.sub(r"(\d)([A-Za-z])", r"\1*\2", dim), {}, letters)      # "sum of merged"

    def __call__(self, frame, event, arg):
        code, live, before = frame.f_code, frame.f_locals, None
        if code.co_filename != "<ernie_vl>" or code.co_name.startswith("<"):
            return None
        in_vit = type(live.get("self")).__name__.startswith("Vision") or code.co_name == "rotate_halves"
        letters = self.letters | (self.in_vit if in_vit else {}) | dict(zip("thw", live.get("grid", ())))
        letters |= {name: live[name] for name in ("h", "w", "pairs") if name in live}
        if code.co_name == "rotate_pairs":                    # of queries, (T, H, d), and of keys, (T, G, d)
            del letters["H"]
        takes, gives = self.functions.get(code.co_firstlineno, (None, None))
        self.compare(code.co_firstlineno, takes, [live[name] for name in code.co_varnames[: code.co_argcount]], letters)

        def step(frame, event, arg):
            nonlocal before                                   # the line that has just run
            if before in self.assigned:
                names, shapes = self.assigned[before]
                self.compare(before, shapes, map(frame.f_locals.get, names), letters)
            before = frame.f_lineno if event == "line" else None
            if event == "return":
                self.compare(code.co_firstlineno, gives, arg if isinstance(arg, tuple) else (arg,), letters)
            return step
        return step


def check_shape_comments(model, source: str) -> ShapeComments:
    edited, comments, before = like(model, source), ShapeComments(source, model.cfg), sys.gettrace()
    generate = sys.modules[type(edited).__module__].generate
    sys.settrace(comments)
    try:
        list(generate(edited, prepared(edited, "mixed"), 3, stop=(), temperature=1.0, repetition_penalty=1.2, seed=0))
    finally:
        sys.settrace(before)
    return comments


def test_shape_comments_are_true(model):
    comments = check_shape_comments(model, SOURCE)
    assert comments.lies == []
    assert comments.checked == {*comments.assigned, *comments.functions} and len(comments.checked) >= 40


@pytest.mark.parametrize("truth, lie", [
    ("softmax(-1)                      # (T, E)", "softmax(-1)   # (T, K)"),
    ("transpose(0, 1)                                      # (H, T, d)", "transpose(0, 1)   # (T, H, d)"),
    ("# (N/4, 4C)", "# (N/2, 4C)"),
    ("# (T, 1, d/2)", "# (T, d/2)"),
    ("# -> (h*w, 2)", "# -> (2, h*w)"),
    ("# (2, G, T, d) -> (2, G, S, d)", "# (2, G, T, d) -> (2, G, T, d)"),
    ("# (T, D) -> (T, K), (T, K)", "# (T, D) -> (T, K), (T, E)"),
])
def test_a_lie_in_a_shape_comment_would_be_noticed(model, truth, lie):
    assert SOURCE.count(truth) == 1
    assert len(check_shape_comments(model, SOURCE.replace(truth, lie)).lies) > 0


def test_the_model_is_short_and_imports_torch_alone():
    tree = ast.parse(SOURCE)
    imported = {name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"torch", "dataclasses", "hashlib", "math", "typing"} and len(SOURCE.splitlines()) <= 600
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 40] == []
    assert [phrase for phrase in ("**kwargs", "strict=False", "getattr(cfg") if phrase in SOURCE] == []
