"""The bundled checkpoint: what it knows, that what it is trained on is true, and how it is trained.

    python -m pytest -q tiny
"""
import argparse
import copy
import hashlib
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

TINY = Path(__file__).resolve().parent
EXAMPLES = TINY.parent / "examples"
sys.path[:0] = [str(TINY.parent), str(TINY)]

import evaluate                                                                                     # noqa: E402
import run                                                                                          # noqa: E402
import scenes                                                                                       # noqa: E402
import train                                                                                        # noqa: E402
from ernie_vl import Attention, Router                                                              # noqa: E402
from load_weights import load                                                                       # noqa: E402
from tokenizer import Tokenizer                                                                     # noqa: E402


@pytest.fixture(scope="module")
def tiny():
    return evaluate.load_model(TINY), Tokenizer(TINY)


@pytest.fixture
def model():
    """One that may be changed."""
    return evaluate.load_model(TINY)


# ------------------------------------------------------------------------------------------------- what it knows
LEAST = {"describe": 19, "read": 19, "count": 19, "locate": 19, "compare": 19, "watch": 19, "talk": 19, "think": 18,
         "zoom": 19, "decline": 18}      # of 20


@pytest.mark.parametrize("skill", LEAST)
def test_tiny_on_images_it_never_saw(tiny, skill):
    """20 fresh samples. README.md says what it gets of 500; the bar is at most one below what it got of these."""
    assert 20 * evaluate.score(*tiny, skill, 20) >= LEAST[skill]


@pytest.mark.parametrize("example", json.loads((EXAMPLES / "examples.json").read_text()), ids=lambda it: it["question"])
def test_tiny_answers_the_examples(capsys, example):
    flags = [(f"--{'video' if file.endswith('.gif') else 'image'}", str(EXAMPLES / file)) for file in example["files"]]
    options = ["--prompt", example["question"], *example.get("options", ())]
    assert run.main([*itertools.chain(*flags), *options]) == 0
    assert capsys.readouterr().out.split("</think>")[-1].strip() == example["answer"]


def test_evaluate_loads_a_checkpoint_and_quantises_it():
    model = evaluate.load_model(TINY, "int4")
    assert evaluate.score(model, Tokenizer(TINY), "describe", 4) >= 0.75
    assert any(parameter.dtype == torch.uint8 for parameter in model.parameters())


@pytest.mark.parametrize("args, words", [(["--count", "0"], "1 or more"), (["--folder", "nowhere"], "config.json"),
                                         (["--skills"], "--skills")])
def test_evaluate_refuses_bad_options_in_one_sentence(args, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *args])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_evaluate_counts_every_choice_of_every_router(model):
    use, inputs = evaluate.ExpertUse(model), model.prepare(*scenes.encode(Tokenizer(TINY), scenes.example("describe", 0)))
    with torch.no_grad():
        model(inputs)
    tokens = {"text": int((~inputs.is_vision).sum()), "vision": int(inputs.is_vision.sum())}
    assert {name: int(count.sum()) for name, count in use.counts.items()} == {
        f"layers.{layer}.mlp.{kind}_moe.gate": 2 * count for layer in (1, 2, 3) for kind, count in tokens.items()}


# ----------------------------------------------------------------------------------------------- what it is told
def told(text: str) -> list[tuple[str, str, str]]:
    """A scene in words -> (colour, shape, place) of every thing."""
    return re.findall(r"a (\w+) (circle|square|triangle|star) ((?:at|on|in) the \w+(?: left| right)?)", text)


COUNTED = r"(?:How many things are|How many are|Count what is|How many|Count the) (.*?)s?(?: are there| do you see)?[.?]$"


def true_answer(question: str, things: list[tuple[str, str, str]]) -> str:
    """What follows from the words alone; of what is counted the number."""
    one = lambda words: [thing for thing in things if set(words.split()) <= {*thing, "thing"}]
    if match := re.match(COUNTED, question):
        return f"{len(one(match[1]))}."
    if match := re.match(r"Where (?:is|do you see) the (.*)[?]", question):
        if match[1] in scenes.SHAPES:
            return f"The {match[1]} is {one(match[1])[0][2]}."
        return f"{one(match[1])[0][2]}." if one(match[1]) else f"no {match[1]}."
    at = {place: (colour, shape) for colour, shape, place in things}
    if match := re.match(r"What colour is the thing (.*)[?]", question):
        return f"{at[match[1]][0].capitalize()}."
    if match := re.match(r"What (colour|shape) is the (.*)[?]", question):
        [(colour, shape, _)] = one(match[2])
        return f"The {match[2]} is {colour if match[1] == 'colour' else 'a ' + shape}."
    return f"A {' '.join(at[re.match(r'What is (.*)[?]', question)[1]])}."


def check_counting(answer: str, things: list[tuple[str, str, str]]) -> None:
    """It goes from thing to thing, and the numbers on the way end with the one that it says."""
    way, end = answer.lower().split(": ")
    for (colour, shape, place), item in zip(things, way.split(", "), strict=True):
        assert re.fullmatch(rf"{place} ({colour}|a {shape}|{colour} {shape})( \(\d\))?", item)
    found = int(end[:-1]) if end[:-1].isdigit() else not end.startswith("no ")
    assert [*map(int, re.findall(r"\((\d)\)", way))] == [*range(1, found + 1)]


def test_what_scenes_says_about_a_scene_told_in_words_is_true():
    asked = set()
    for seed in range(150):
        it = scenes.example("told", seed)
        scene, question = scenes.question_of(it).split(". ", 1)
        for question, answer in [(question, it.answer), *(turn[1:] for turn in it.more)]:
            assert answer.split(": ")[-1] == true_answer(question, told(scene)), (scene, question)
            if ": " in answer:
                check_counting(answer, told(scene))
            asked.add(" ".join(question.split()[:2]))
    assert asked == {"How many", "Count the", "Count what", "Where is", "Where do", "What is", "What colour", "What shape"}


def test_scenes_are_the_same_for_the_same_seed():
    for skill in scenes.SKILLS | scenes.PRACTICE:
        one, two, other = (scenes.example(skill, seed) for seed in (7, 7, 8))
        assert one.answer == two.answer
        assert [image.tobytes() for image in scenes.images_of(one)] == [image.tobytes() for image in scenes.images_of(two)]
        assert (one.answer, one.messages[0]["content"]) != (other.answer, other.messages[0]["content"])


def test_texts_and_random_numbers_are_those_that_it_was_trained_on():
    """Of the skills that draw no letters, since how wide these are is up to the fonts."""
    digest = hashlib.sha256()
    for skill in ("describe", "count", "locate", "compare", "watch", "talk", "think", "ask", "told"):
        for it in (scenes.example(skill, seed) for seed in range(10)):
            digest.update(repr((scenes.question_of(it), it.answer, it.think, it.more)).encode())
    assert digest.hexdigest() == "25feabd8c99f5d209d5a8fdc4a810ad41cf8db8cbe23b6ac567ba95cd72d405c"


def test_a_zoom_goes_on_with_the_crop_and_its_reading():
    tokenizer = Tokenizer(TINY)
    for it in (scenes.example("zoom", seed, scenes.Look()) for seed in range(5)):
        after = scenes.after_zoom(it, scenes.called_box(it))
        whole, crop = scenes.images_of(after)
        assert crop.width < whole.width and crop.height < whole.height and after.answer.endswith(it.truth)
        prompt = scenes.encode(tokenizer, after)
        assert len(prompt.grids) == 2 and tokenizer.special["</tool_call>"] in prompt.ids


def test_print_that_is_wider_than_its_image_is_drawn(monkeypatch):
    monkeypatch.setattr(scenes, "word", lambda rng, longest: "W" * longest)
    for seed in range(40):
        assert scenes.example("small", seed).answer == "WWW"


# ---------------------------------------------------------------------------------------------- how it is trained
def test_conversations_of_a_pack_do_not_see_one_another(tiny):
    model, tokenizer = tiny
    examples = [(skill, scenes.example(skill, 3)) for skill in ("compare", "talk", "watch", "count")]
    pack, *alone = (train.Pack(tokenizer, model.cfg, some) for some in (examples, *([it] for it in examples)))
    assert pack.lengths == [len(one.targets) for one in alone]
    assert torch.equal(pack.targets, torch.cat([one.targets for one in alone]))
    with torch.no_grad():
        separately = torch.cat([model(one.inputs) for one in alone])
        with train.packed(model, pack.lengths):
            assert (model(pack.inputs) - separately).abs().max() < 3e-5
        assert (model(pack.inputs) - separately).abs().max() > 0.1
    assert all(type(layer.self_attn) is Attention for layer in model.layers)


def test_answers_of_a_pack_are_what_is_trained(tiny):
    model, tokenizer = tiny
    it = scenes.example("describe", 3)
    pack, asked = train.Pack(tokenizer, model.cfg, [("describe", it)]), [it.answer, *(answer for _, _, answer in it.more)]
    trained = [pack.targets[begin:end].tolist() for _, begin, end in pack.answers]
    assert trained == [tokenizer.encode(answer) + [2] for answer in asked]
    assert (pack.targets >= 0).sum() == sum(map(len, trained))
    ids = pack.inputs.ids.tolist()
    assert all(ids[begin + 1 : end] == pack.targets[begin : end - 1].tolist() for _, begin, end in pack.answers)


def routers(model) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def test_the_bias_brings_in_experts_that_nobody_chooses(model):
    gate, chosen = routers(model)[0], set()
    x = torch.randn(1, gate.weight.shape[1], generator=torch.manual_seed(0))
    for rate, everybody in ((0.0, False), (0.05, True)):
        balance = train.Balance(model, rate, 0, 0)
        for _ in range(100):
            chosen |= set(gate(x)[1].flatten().tolist())
            balance.step()
        assert (len(chosen) == len(gate.weight)) is everybody


def test_the_balancing_losses_are_those_of_the_routers_own_probabilities(model):
    gate, x = routers(model)[0], torch.randn(50, 128, generator=torch.manual_seed(0))
    balance = train.Balance(model, 0.0, load=1.0, orthogonal=0.0)
    with torch.enable_grad():
        gate(x)
        loss = balance.loss()
        loss.backward()
    expected = F.linear(x, gate.weight.detach()).softmax(-1)
    share = F.one_hot(expected.topk(2).indices, 8).sum((0, 1)) / 50
    assert torch.allclose(train.probabilities(gate, x), expected, atol=1e-6)
    assert abs(loss.item() - 8 * float((expected.mean(0) * share).sum())) < 1e-5
    assert gate.weight.grad.abs().max() > 0 and gate.k == 2 and len(balance.seen) == 1


def test_a_trainer_that_is_restored_makes_the_same_step():
    args = argparse.Namespace(rate=1e-3, bias=1e-3, load=1e-2, orthogonal=1e-2, device="cpu")
    one, other = (train.Trainer(evaluate.load_model(TINY), args) for _ in range(2))
    pack = train.Pack(Tokenizer(TINY), one.model.cfg, [("describe", scenes.example("describe", 3))])
    with torch.enable_grad():
        one.step(pack, 1.0, 0.0)
        other.load_state(copy.deepcopy(one.state()))
        for trainer in (one, other):
            trainer.step(pack, 1.0, 0.0)
    assert all(map(torch.equal, one.model.state_dict().values(), other.model.state_dict().values()))
    assert not torch.equal(one.model.norm.weight, load(TINY).norm.weight)


def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    drawn, draw = [], train.Drawn.__getitem__
    monkeypatch.setattr(train.Drawn, "__getitem__", lambda self, step: drawn.append(step) or draw(self, step))
    monkeypatch.setattr(train, "PACK", 8)

    def again(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path), "--workers", "0", *more])
        with torch.enable_grad():
            train.main()
        return capsys.readouterr().out

    assert re.fullmatch(r" +\d+\.\d min  step +2  loss \d\.\d+ .*  describe 0 .*\n", again("--steps", "2"))
    before = load(tmp_path).embed_tokens.weight
    assert "step     4  loss" in again("--steps", "4", "--resume")
    assert not torch.equal(load(tmp_path).embed_tokens.weight, before)
    assert Image.open(tmp_path / "curves.png").width > 800
    (tmp_path / "training.pt").unlink()      # from the weights alone, on images that nobody was trained on
    again("--steps", "1", "--resume")
    assert drawn == [0, 1, 2, 3, train.FRESH_START]


def test_training_never_begins_over_weights(tmp_path, monkeypatch, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 2 and "--resume" in capsys.readouterr().err
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"precious"]


def test_what_is_saved_is_what_was_trained(model, tmp_path):
    """Under the names of the released files, in fp16: the shipped checkpoint comes back byte for byte."""
    train.save(model, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()
