"""The prefix cache, and what run.py does when one of the flags of a conversation is given."""
import base64
import contextlib
import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import run
from ernie_vl import generate, pieces
from extras import session
from extras.conftest import EXAMPLE, ROOT, TINY, interrupt
from extras.session import Clock, PrefixCache, Session, drop_prefix
from load_weights import load
from tokenizer import Tokenizer, load_image

WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = {"name": "get_weather", "arguments": '{"city": "北京"}'}
CALLED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>\n'
ZOOM_CALL = '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": %s}}\n</tool_call>\n'
SEE = "User: <tool_output>\nPicture {}:<|IMAGE_START|>"
EMPTY = "<think>\n\n</think>\n\n"


def distance(a, b) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max())


# ------------------------------------------------------------------------------------------------- prefix cache
@pytest.fixture(scope="module")
def model():
    """In double precision, where rounding hides no small mistake."""
    return load(TINY).double()


WIDE, FILM = (1, 4, 6), (6, 4, 4)                                           # grids, in patches: 6 tokens, and 3 x 4
PATCHES = torch.randn(24, 588, generator=torch.Generator().manual_seed(0))
TEXT = range(300, 340)


def prompt(model, *parts):
    """Inputs from parts: ids, a list of them, or pairs of (patches, grid)."""
    cfg, ids, media = model.cfg, [], []
    for part in parts:
        if isinstance(part, tuple):
            media.append(part)
            tokens = part[1][0] * part[1][1] * part[1][2] // 4 // min(part[1][0], 2)
            part = [cfg.image_start_token_id, *[cfg.image_token_id] * tokens, cfg.image_end_token_id]
        ids += [part] if isinstance(part, int) else part
    return model.prepare(ids, torch.cat([patches for patches, _ in media]) if media else None, [grid for _, grid in media])


def kept(cache: PrefixCache, model, inputs) -> int:
    """How much of a prompt the cache holds; what follows it must have the logits of the whole prompt."""
    rest = cache.reuse(inputs, model.cfg)
    n = len(inputs.ids) - len(rest.ids)
    assert {kv.length for kv in cache.layers} == {n}
    with torch.inference_mode():
        assert distance(model(rest, copy.deepcopy(cache.layers)), model(inputs)[n:]) < 1e-5
    return n


def filled(model, *parts) -> PrefixCache:
    cache = PrefixCache(len(model.layers))
    with torch.inference_mode():
        model(cache.reuse(prompt(model, *parts), model.cfg), cache.layers)
    return cache


LAST = PATCHES.clone()
LAST[-1] += 1
BEFORE = [*TEXT[:4]], (PATCHES, WIDE), [*TEXT[4:20]]                        # 4 + 8 + 16 tokens


@pytest.mark.parametrize("after, n", [
    (BEFORE, 27), ((*BEFORE, [*TEXT[20:25]]), 28), ((*BEFORE[:2], [*TEXT[4:10]]), 17),
    ((*BEFORE[:2], [*TEXT[4:10], 9, 9]), 18), (([9, *TEXT[1:4]], *BEFORE[1:]), 0), ((BEFORE[0], (LAST, WIDE), BEFORE[2]), 5),
    ((BEFORE[0], (PATCHES, (1, 6, 4)), BEFORE[2]), 5), ((BEFORE[0], (PATCHES, WIDE), (PATCHES, WIDE)), 12)],
    ids=["nothing", "text behind", "shorter", "other text", "beginning", "last patch", "grid", "a second image"])
def test_a_cache_is_used_as_far_as_the_prompts_agree(model, after, n):
    """Placeholders of different images have the same ids: the images are compared, and none is kept in half."""
    cache = filled(model, *BEFORE)
    assert kept(cache, model, prompt(model, *after)) == n


def test_neither_image_nor_the_last_token_is_kept_in_part(model):
    """A prompt may end with an image; runs of one token are no image."""
    start = [*TEXT[:2], model.cfg.image_start_token_id]
    inputs = model.prepare([*start, *[model.cfg.image_token_id] * 6], PATCHES, [WIDE])
    cache = PrefixCache(len(model.layers))
    for turn in range(2):
        rest = cache.reuse(inputs, model.cfg)
        (id,) = generate(model, rest, stop=(), max_new_tokens=1, cache=cache.layers)
        assert len(inputs.ids) - len(rest.ids) == 3 * turn
        with torch.inference_mode():
            assert id == int(model(inputs)[-1].argmax())
    assert kept(filled(model, [9] * 8), model, prompt(model, [9] * 8)) == 7


def test_a_video_that_was_read_in_part_is_read_again(model):
    """Prefill may stop between two pairs of frames."""
    frames = torch.randn(96, 588, generator=torch.Generator().manual_seed(1))
    inputs, cache = prompt(model, [*TEXT[:4]], (frames, FILM), [*TEXT[4:8]]), PrefixCache(len(model.layers))
    with torch.inference_mode():
        for piece in [*pieces(cache.reuse(inputs, model.cfg), model.cfg, limit=6)][:3]:
            model(piece, cache.layers)
    assert 5 < cache.layers[0].length < 17 and kept(cache, model, inputs) == 5


def test_images_that_follow_the_prefix_come_along(model):
    inputs = prompt(model, [3], (PATCHES, WIDE), [4, 5], (LAST, WIDE), (PATCHES, WIDE))
    for n, images in ((0, 3), (1, 3), (9, 2), (11, 2), (12, 2), (19, 1), (27, 0)):
        rest = drop_prefix(inputs, n, model.cfg)
        assert len(rest.grids) == images and torch.equal(rest.patches, inputs.patches[len(inputs.patches) - 24 * images :])
        assert len(rest.ids) == rest.positions.shape[1] == len(rest.is_vision) == 27 - n


# ----------------------------------------------------------------------------------------------- turns of a session
def opened(model, *options: str, tools: list[dict] = ()) -> Session:
    return Session(model, Tokenizer(TINY), run.parse(["--json", "--prompt", "x", *options]), Clock(), tools)


def asked(*content) -> dict:
    return {"role": "user", "content": list(content)}


def shown(file: str = "shapes.png"):
    return load_image(ROOT / "examples" / file, TINY)


def test_a_second_turn_computes_only_its_own_tokens(model):
    """With an image in each turn: what is in the cache is left alone, and the answer is that of a new cache."""
    model = copy.deepcopy(model)
    talk, messages, counts = opened(model), [asked("Describe this image.", shown())], []
    talk.converse(messages)
    talk.prefill_next_turn(messages)
    done = len(talk.inputs(messages, add_generation_prompt=False).ids)
    hook = model.layers[0].register_forward_hook(lambda layer, given, out: counts.append(len(out)))
    messages.append(asked("What is in this picture?", shown("star.jpg")))
    other, talk.clock = copy.deepcopy(messages), Clock()
    talk.converse(messages)
    hook.remove()
    assert counts[0] == talk.prompt_tokens - done and set(counts[1:]) == {1} and len(counts) == talk.tokens + 1
    fresh = opened(model)
    fresh.converse(other)
    assert other[-1]["content"] == messages[-1]["content"] and (fresh.tokens, fresh.ended) == (talk.tokens, talk.ended)


def test_what_was_generated_is_kept_too(model):
    talk = opened(model)
    inputs = talk.inputs([asked("Describe this image.", shown())])
    before, answer = inputs.ids.tolist(), [*talk.generate(inputs)]
    assert talk.ended == "stop" and len(answer) > 5
    for ids, n in (([*before, *answer, 300, 301], len(before) + len(answer)), ([*before, *answer[:4], 300], len(before) + 4)):
        longer = model.prepare(ids, inputs.patches, inputs.grids)
        assert kept(copy.deepcopy(talk.cache), model, longer) == n


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("turn, at", [(1, 1), (2, 1), (2, 4)], ids=["first prompt", "second prompt", "third token"])
def test_after_a_failed_turn_the_cache_answers_as_a_new_one(model, turn, at, failure):
    """The failure comes within a forward pass, when the first layer has computed and the second has not."""
    model, passes = copy.deepcopy(model), []

    def fail(layer, given):
        passes.append(len(given[0]))
        if len(passes) == at:
            raise failure

    talk, messages = opened(model), [asked("Describe this image.", shown())]
    if turn == 2:
        talk.converse(messages)
        messages.append(asked("What colours are there?", shown("star.jpg")))
    hook = model.layers[1].register_forward_pre_hook(fail)
    with contextlib.suppress(MemoryError):
        talk.converse(list(messages))
    hook.remove()
    assert len(passes) == at and len({kv.length for kv in talk.cache.layers}) == 2
    assert kept(copy.deepcopy(talk.cache), model, talk.inputs(messages)) < talk.prompt_tokens
    again, fresh = list(messages), list(messages)
    talk.converse(again)
    opened(model).converse(fresh)
    assert again[-1]["content"] == fresh[-1]["content"] and talk.ended == "stop"


# ------------------------------------------------------------------------------------------------------- zooming
def test_the_model_zooms_until_it_answers(script, ask):
    """Always into the image that the user has shown, never into what a zoom cut out."""
    prompts = script("Small.\n</think>\n\n" + ZOOM_CALL % "[0, 0, 500, 500]",
                     "Now.</think>\n\n" + ZOOM_CALL % "[0, 0, 1000, 1000]", "x</think>A star.")
    code, out, err = ask("--image", EXAMPLE, "--prompt", "Read it.", "--zoom", "--think")
    assert (code, out) == (0, "A star.\n")
    assert re.findall(r"zoom to \[.*\]: (\d+ x \d+) ->", err) == ["124 x 97", "249 x 195"]
    assert '"image_zoom_in_tool"' in prompts[0] and SEE.format(2) not in prompts[0]
    assert SEE.format(2) in prompts[1] and SEE.format(3) in prompts[2] and "\nSmall.\n</think>" in prompts[1]
    script(ZOOM_CALL % "[0, 0, 1000, 1000]", "A star.")
    code, out, err = ask("--image", EXAMPLE, "--zoom", "--max-pixels", "3136")
    assert re.findall(r"-> (\d+ x \d+) ->", err) == ["56 x 28"] * 2


@pytest.mark.parametrize("box, words", [
    ("[500, 500, 100, 600]", "reversed"), ("[2000, 0, 3000, 10]", "outside"), ('"all"', "four"), ("null", "four")])
def test_a_zoom_to_nowhere_is_refused_to_the_model(script, ask, box, words):
    prompts = script(ZOOM_CALL % box, "I cannot tell.")
    assert ask("--image", EXAMPLE, "--zoom")[:2] == (0, "I cannot tell.\n") and words in prompts[1].split("<tool_output>")[1]


def test_zoom_calls_are_shown_where_nobody_runs_them(script, ask, write_json):
    """Without --zoom, and beside a call of another tool, whose result the caller has to find out."""
    script("Let me see.\n" + ZOOM_CALL % "[0, 0, 5, 5]")
    code, out, err = ask("--image", EXAMPLE, "--tools", write_json("t.json", []))
    assert code == 0 and out.splitlines()[0] == "Let me see." and "image_zoom_in_tool" in out.splitlines()[1]
    script(ZOOM_CALL % "[0, 0, 5, 5]" + CALLED)
    reply = json.loads(ask("--image", EXAMPLE, "--zoom", "--json")[1])
    assert reply["finish_reason"] == "tool_calls" and len(reply["tool_calls"]) == 2


def test_zooming_ends(script, ask):
    """After --max-zooms the model is told to answer; a call all the same is what the reply is."""
    prompts = script(*[ZOOM_CALL % "[0, 0, 500, 500]"] * 4)
    code, out, err = ask("--image", EXAMPLE, "--zoom", "--max-zooms", "2", "--json")
    reply = json.loads(out)
    assert len(prompts) == 4 and "no zoom left" in prompts[3] and "no zoom left" not in prompts[2] and "--max-zooms" in err
    assert reply["finish_reason"] == "tool_calls" and reply["content"] == "" and len(reply["tool_calls"]) == 1
    script(ZOOM_CALL % "[0, 0, 500, 500]", "Nothing.")
    assert ask("--prompt", "Hi", "--zoom")[:2] == (0, "Nothing.\n")             # no image
    script("Let me see.\n" + ZOOM_CALL % "[0, 0, 500, 500]", "A star.")
    assert ask("--image", EXAMPLE, "--zoom")[:2] == (0, "Let me see.\nA star.\n")


# --------------------------------------------------------------------------------------------- tools, and the reply
def test_tool_calls_are_printed_as_json_and_results_go_back_as_messages(script, ask, write_json):
    tools = write_json("tools.json", WEATHER)                                    # one tool alone is a list of one
    prompts = script(f"Let me see.\n{CALLED}")
    code, out, err = ask("--prompt", "Weather?", "--tools", tools)
    text, call = out.splitlines()
    assert code == 0 and text == "Let me see." and json.loads(call)["function"] == CALL and '"get_weather"' in prompts[0]
    script(CALLED)
    reply = json.loads(ask("--prompt", "Weather?", "--tools", tools, "--json")[1])
    assert reply["finish_reason"] == "tool_calls" and reply["content"] == "" and reply["tool_calls"][0]["function"] == CALL
    prompts = script("Sunny.")
    result = {"role": "tool", "content": "sun", "tool_call_id": reply["tool_calls"][0]["id"]}
    talk = write_json("talk.json", {"messages": [{"role": "user", "content": "Weather?"}, reply, result], "tools": [WEATHER]})
    assert ask("--messages", talk)[:2] == (0, "Sunny.\n")
    assert f"<tool_list>\n{json.dumps([WEATHER])}\n</tool_list>" in prompts[0]
    result = "User: <tool_output>\nsun\n</tool_output>\n"
    assert prompts[0].endswith(f"Assistant: {CALLED}<|end_of_sentence|>{result}\nAssistant: {EMPTY}")
    prompts = script("Sunny.")
    other = write_json("tools.json", [{"name": "other"}])
    assert ask("--messages", talk, "--tools", other)[0] == 0 and '"get_weather"' in prompts[0] and '"other"' in prompts[0]


@pytest.mark.parametrize("text, content, calls", [
    ('Yes.\n<tool_call>{"name": "f", "arguments": {"x": "a</tool_call>b"}}</tool_call>', "Yes.",
     [("f", {"x": "a</tool_call>b"})]),
    ('<tool_call>{"name": "f", "arguments": {"x": 2}}</tool_call>\n<tool_call>{"name": "g", "arguments": []}</tool_call>', "",
     [("f", {"x": 2}), ("g", {})]),
    ('<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
    ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', '<tool_call>{"name": 5, "arguments": {}}</tool_call>', []),
    ("x</think>y" + "[" * 300, "x</think>y" + "[" * 300, [])])
def test_hostile_replies_are_answers_too(script, ask, text, content, calls):
    script(text)
    code, out, err = ask("--prompt", "Q", "--json")
    reply = json.loads(out)
    found = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in reply.get("tool_calls", [])]
    assert code == 0 and reply["content"] == content and found == calls


def test_the_reply_says_why_it_ended(script, ask):
    def reply(*options) -> tuple[str, int]:
        reply = json.loads(ask("--image", EXAMPLE, "--json", *options)[1])
        return reply["finish_reason"], reply["usage"]["completion_tokens"]

    zoom, length = ZOOM_CALL % "[0, 0, 500, 500]", len(Tokenizer(TINY).encode(ZOOM_CALL % "[0, 0, 500, 500]", control=True))
    script("A star.")
    assert reply()[0] == "stop"
    script(zoom, "a" * 200)                            # the limit holds for each turn: the first ends before it, the second there
    assert reply("--zoom", "--max-new-tokens", length + 1) == ("length", 2 * length + 1)
    script(zoom + "Then")                              # the call is complete, what follows it is cut off
    assert reply("--max-new-tokens", length + 1)[0] == "length"
    for text, content in (("Half <tool", "Half <tool"), (zoom, "")):      # what could have become a call; a call that was one
        script((text, interrupt))
        code, out, err = ask("--image", EXAMPLE, "--json", "--zoom")
        assert code == 130 and json.loads(out)["finish_reason"] == "interrupted" and json.loads(out)["content"] == content


def test_an_answer_ends_where_the_context_does(model):
    model, talk = copy.copy(model), opened(model)
    room = len(talk.inputs([asked("Hi")]).ids) + 2
    model.cfg = model.cfg._replace(text=model.cfg.text._replace(max_position_embeddings=room))
    talk = opened(model)
    talk.converse([asked("Hi")])
    assert (talk.ended, talk.tokens) == ("length", 2)


def test_seconds_are_counted_by_stage(monkeypatch):
    monkeypatch.setattr(session.time, "perf_counter", iter([0, 1, 3, 6]).__next__)
    clock = Clock()
    for stage in ("load", "tokens", "load"):
        clock.lap(stage)
    assert clock.seconds == {"load": 4, "tokens": 2}


def test_json_is_one_object(ask):
    code, out, err = ask("--image", EXAMPLE, "--json", "--max-new-tokens", "3")
    reply = json.loads(out)
    assert code == 0 and reply["role"] == "assistant" and reply["finish_reason"] == "length"
    assert reply["usage"] == {"prompt_tokens": 55, "picture_tokens": 30, "completion_tokens": 3}
    assert set(reply["seconds"]) == {"pictures", "load", "first_token", "other_tokens"}
    few = json.loads(ask("--image", EXAMPLE, "--json", "--max-new-tokens", "3", "--max-pixels", "3136")[1])
    assert few["usage"]["picture_tokens"] == 2


def test_reasoning_is_shown_where_it_is_wanted(script, ask):
    for options, out in (([], "B\n"), (["--show-thinking"], "A\n\nB\n")):
        script("A\n</think>\n\nB")
        assert ask("--prompt", "Q", "--think", "--zoom", *options)[:2] == (0, out)
    script("A, and then the tokens end")
    reply = json.loads(ask("--prompt", "Q", "--think", "--json")[1])
    assert reply["reasoning_content"] == "A, and then the tokens end" and reply["content"] == ""


# ------------------------------------------------------------------------------------------------- the command line
def test_boxes_are_drawn_and_in_the_json(script, ask, tmp_path):
    answer = '[{"bbox_2d": [0, 0, 500, 500], "label": "circle"}, {"bbox_2d": [600, 100, 1000, 1000]}]'
    out, (width, height) = tmp_path / "boxes.png", Image.open(EXAMPLE).size
    script(answer)
    code, text, err = ask("--image", EXAMPLE, "--boxes", out, "--json")
    assert code == 0 and "drew 2 boxes" in err and min(Image.open(out).size) >= 448
    assert json.loads(text)["boxes"] == [{"label": "circle", "bbox": [0, 0, width // 2, height // 2]},
                                         {"label": "", "bbox": [int(0.6 * width), int(0.1 * height), width, height]}]
    out.unlink()
    script("Nothing.")
    assert ask("--image", EXAMPLE, "--boxes", out)[0] == 0 and not out.exists()
    for options, words in ((["--image", EXAMPLE, "--boxes", tmp_path / "no" / "x.png"], "written"),
                           (["--image", EXAMPLE, "--boxes", tmp_path / "x.nonsense"], ".png"),
                           (["--prompt", "Hi", "--boxes", out], "image")):
        code, _, err = ask(*options)
        assert code == 2 and words in err.splitlines()[-1]


def test_images_come_in_all_ways(ask, write_json):
    """As a path, a file: URI and a data URI, in messages, the answer is the same."""
    uri = "data:image/png;base64," + base64.b64encode(Path(EXAMPLE).read_bytes()).decode()
    expected = ask("--image", EXAMPLE)[1]
    for url in (uri, EXAMPLE, f"file://{EXAMPLE}"):
        content = [{"type": "text", "text": "Describe this image."}, {"type": "image_url", "image_url": {"url": url}}]
        assert ask("--messages", write_json("m.json", [{"role": "user", "content": content}]))[:2] == (0, expected)


def test_images_and_videos_keep_their_order(script, ask):
    prompts, film = script("ok"), ROOT / "examples" / "moving.gif"
    code, out, err = ask("--video", film, "--image", EXAMPLE, "--video", film, "--max-pixels", "3136", "--json")
    assert code == 0 and re.findall(r"(\w+ \d):<", prompts[0]) == ["Video 1", "Picture 1", "Video 2"]


def test_options_reach_the_videos_of_messages(script, ask, write_json):
    script("ok", "ok")
    content = [{"type": "video", "video": str(ROOT / "examples" / "moving.gif")}]
    talk = write_json("m.json", [{"role": "user", "content": content}])
    for options, frames in (([], 6), (["--max-frames", "2"], 2)):
        code, out, err = ask("--messages", talk, "--json", "--max-pixels", "3136", *options)
        assert code == 0 and f"{frames} frames" in err and json.loads(out)["usage"]["picture_tokens"] == frames


def test_logits_of_messages_are_those_of_the_same_question(ask, tmp_path, write_json):
    content = [{"type": "text", "text": "Describe this image."}, {"type": "image", "image": EXAMPLE}]
    talk = write_json("m.json", [{"role": "user", "content": content}])
    for name, given in (("a", ["--image", EXAMPLE]), ("b", ["--messages", talk])):
        assert ask(*given, "--save-logits", tmp_path / name)[:2] == (0, "")
    saved, expected = load_file(tmp_path / "b"), load_file(tmp_path / "a")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)


@pytest.mark.parametrize("options, words", [
    (["--chat", "--batch", "x"], "--batch"), (["--chat", "--save-logits", "x"], "--save-logits"),
    (["--chat", "--json"], "one reply"), (["--messages", "x", "--batch", "y"], "--messages"),
    (["--batch", "x", "--boxes", "x.png"], "one reply"), (["--messages", "x", "--prompt", ""], "conversations"),
    (["--batch", "x", "--system", "y"], "conversations"), (["--prompt", "x", "--out", "y"], "--out")])
def test_flags_that_exclude_each_other_are_refused(ask, options, words):
    code, out, err = ask(*options)
    assert code == 2 and out == "" and words in err and err.count("\n") == 1


@pytest.mark.parametrize("name, content, option, words", [
    ("m.json", "{", "--messages", "JSON"), ("m.json", "[]", "--messages", "list"),
    ("m.json", b"\xff\xfe\xff", "--messages", "UTF-8"), ("m.json", '[{"role": "robot"}]', "--messages", "robot"),
    ("m.json", '[{"role": "assistant", "content": "A"}]', "--messages", "asks nothing"),
    (None, "", "--messages", "missing"), (None, "", "--batch", "missing"), ("t.json", '[{"function": {}}]', "--tools", "name"),
    ("t.json", '{"messages": []}', "--tools", "tool"), ("t.json", "{", "--tools", "JSON"),
    ("m.json", '[{"role": "user", "content": [{"type": "image", "image": "https://x/y.png"}]}]', "--messages", "downloaded"),
    ("m.json", '[{"role": "user", "content": [{"type": "image", "image": "data:image/png;base64,a"}]}]', "--messages", "image")])
def test_files_that_are_no_requests_get_one_sentence(ask, monkeypatch, tmp_path, name, content, option, words):
    monkeypatch.setattr(session, "load_model", None)                             # it is said before the model is loaded
    path = tmp_path / (name or "missing")
    if name:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = ask(option, path, *(["--prompt", "Hi"] if option == "--tools" else []))
    assert code == 2 and out == "" and words in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")


def test_what_a_folder_cannot_do_is_said_before_it_is_loaded(ask, tmp_path):
    """There are not even weights in this one."""
    for name in ("config.json", "tokenizer.model", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    added = json.loads((TINY / "added_tokens.json").read_text())
    (tmp_path / "added_tokens.json").write_text(json.dumps({name: id for name, id in added.items() if "think" not in name}))
    code, out, err = ask("--prompt", "Hi", "--json", "--think", "--model", tmp_path)
    assert code == 2 and out == "" and err.count("\n") == 1 and "think" in err


def test_a_part_of_extras_that_is_missing_is_named(ask, monkeypatch):
    monkeypatch.setitem(sys.modules, "extras.boxes", None)
    monkeypatch.delitem(sys.modules, "extras.session")
    code, out, err = ask("--prompt", "Hi", "--json")
    assert (code, out) == (2, "") and "extras/boxes is not here" in err
