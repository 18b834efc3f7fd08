"""Conversations in OpenAI's format: read, written into the prompt with their tools, and calls read from replies.

    python -m pytest -q extras/test_messages.py
"""
import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ernie_vl import InputError
from extras.messages import (ToolReplyParser, media_loader, open_source, plain_messages, read_messages, read_request, read_text,
                             read_tools, to_json)
from extras.video import Video
from tokenizer import Media, Tokenizer, chat_template, encode_chat, load_image, render

ROOT = Path(__file__).resolve().parent.parent
TINY, EXAMPLE, MOVING = ROOT / "tiny", ROOT / "examples" / "shapes.png", ROOT / "examples" / "moving.gif"

BEGIN, END, EMPTY = "<|begin_of_sentence|>", "<|end_of_sentence|>", "<think>\n\n</think>\n\n"
IMG, VID = ("<|{0}_START|><|{0}_PLACEHOLDER|><|{0}_END|>".format(kind) for kind in ("IMAGE", "VIDEO"))
ERNIE = "You are a multimodal AI assistant called ERNIE developed by Baidu based on the PaddlePaddle framework."
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
LISTED = f"\n<tool_list>\n{json.dumps([WEATHER])}\n</tool_list>\n\n"
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}
CALLED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>\n'
MEDIA = {IMG: {"type": "image", "image": "x.png"}, VID: {"type": "video", "video": "x.mp4"}}
user = lambda *items: {"role": "user", "content": [MEDIA.get(item, {"type": "text", "text": item}) for item in items]}
says = lambda role, text, **more: {"role": role, "content": text, **more}


def unread(kind: str, source) -> Media:
    """Stands in for the loader where nobody looks at pixels: the smallest image there is."""
    return Media(kind, source, Image.new("RGB", (28, 28)), torch.zeros(4, 588), (1, 2, 2), "")


def read(*messages: dict) -> list[dict]:
    return read_messages(list(messages), unread)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    """By chat template: the vocabulary of tiny/, as a Thinking checkpoint has it and as a text-only model does."""
    folders = {"instruct": TINY}
    for name in ("thinking", "text"):
        folders[name] = tmp_path_factory.mktemp(name)
        shutil.copy(TINY / "tokenizer.model", folders[name])
        shutil.copy(TINY / "added_tokens.json", folders[name])
    (folders["thinking"] / "chat_template.jinja").write_text("{% if options.thinking_mode == 'open' %}")
    (folders["text"] / "added_tokens.json").write_text(json.dumps({BEGIN: 769, END: 768}))
    return {name: Tokenizer(folder) for name, folder in folders.items()}


def prompt(tokenizer: Tokenizer, messages: list[dict], tools: list[dict] = ()) -> str:
    return "".join(render(plain_messages(messages, tools, tokenizer), chat_template(tokenizer)))


# --------------------------------------------------------------------------------------------------------- 1. messages
def test_messages_of_all_spellings_are_the_same():
    image, video = ("image", "a.png"), ("video", "b.gif")
    spelled = [{"type": "text", "text": "Q"}, {"type": "image", "image": "a.png"}, {"type": "video", "video": "b.gif"},
               {"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "video_url", "video_url": "b.gif"},
               {"type": "image", "url": "a.png"}, {"type": "video", "path": "b.gif"},
               {"type": "video", "video": {"url": "b.gif"}}]
    (message,) = read_messages([says("user", spelled)], lambda kind, source: unread(kind, (kind, source)))
    assert [item if isinstance(item, str) else item.source for item in message["content"]] == [
        "Q", image, video, image, video, image, video, video]
    assert [item.kind for item in message["content"][1:]] == ["image", "video"] * 3 + ["video"]
    assert read(says("user", "Q"), says("developer", "D")) == [says("user", ["Q"]), says("system", ["D"])]
    assert read(says("tool", None, tool_call_id="7"), says("tool", [{"type": "event"}])) == [
        says("tool", [], tool_call_id="7"), says("tool", ['[{"type": "event"}]'])]


def test_calls_have_an_id_and_arguments_in_json():
    calls = [{"function": {"name": "f", "arguments": {"x": 1}}}, {"id": "7", "function": {"name": "g", "arguments": ""}}]
    (message,) = read(says("assistant", "A", tool_calls=calls))
    first, second = message["tool_calls"]
    assert [call["function"]["arguments"] for call in (first, second)] == ['{"x": 1}', "{}"]
    assert second["id"] == "7" and first["id"] not in ("", "7") and first["type"] == "function"
    assert read(says("assistant", None, tool_calls=CALL)) == [
        {"role": "assistant", "content": [""], "reasoning_content": "", "tool_calls": [CALL]}]
    assert "tool_calls" not in read(says("assistant", "A", tool_calls=[]))[0]


@pytest.mark.parametrize("given", [
    says("assistant", "ANS", reasoning_content="\nTH\n"), says("assistant", "<think>\nTH\n</think>\n\nANS"),
    says("assistant", [{"type": "text", "text": "TH\n</think>"}, {"type": "text", "text": "\n\nANS"}])])
def test_reasoning_stands_in_a_field_of_its_own_or_in_the_content(given):
    assert read(given) == [{"role": "assistant", "content": ["ANS"], "reasoning_content": "TH"}]


def test_sources_that_are_loaded_already_are_not_loaded_again():
    media, image, video = unread("image", "a"), Image.new("RGB", (9, 9)), Video([], [])
    loaded = []
    items = [{"type": "image", "image": media}, {"type": "image", "image": image}, {"type": "video", "video": video},
             {"type": "image", "image": Path("p")}]
    (message,) = read_messages([says("user", items)], lambda *given: loaded.append(given) or unread(*given))
    assert message["content"][0] is media and loaded == [("image", image), ("video", video), ("image", Path("p"))]


@pytest.mark.parametrize("messages, words", [
    ([], "list of messages"), ("Hi", "list of messages"), (["Hi"], "list of messages"), (None, "list of messages"),
    ([says("robot", "Hi")], "'robot'"), ([says([], "Hi")], "role"),
    ([says("user", 5)], "not 5"), ([{"role": "user", "text": "Q"}], "not None"), ([says("user", {})], "not {}"),
    ([says("user", ["text"])], "'text'"), ([says("user", ["image"])], "'image'"), ([says("user", ["Hi"])], "'Hi'"),
    ([says("user", [{"type": "smell"}])], "'smell'"), ([says("user", [{"type": []}])], "content"),
    ([says("user", [{"type": "text"}])], "'text'"), ([says("user", [{"type": "text", "path": "notes.txt"}])], "'text'"),
    ([says("user", [{"type": "image", "image": 5}])], "'image'"),
    ([says("user", [{"type": "image_url", "image_url": {}}])], "'image_url'"),
    ([says("assistant", [MEDIA[IMG]])], "holds text"), ([says("assistant", "", reasoning_content=5)], "holds text"),
    ([says("assistant", "", tool_calls=5)], "tool call"),
    ([says("assistant", "", tool_calls=[{"function": {"name": 5}}])], "tool call"),
    ([says("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])], "tool call"),
    ([says("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": [1]}}])], "tool call")])
def test_what_is_no_conversation_is_refused(messages, words):
    with pytest.raises(InputError, match=words):
        read_messages(messages, unread)


def test_a_message_goes_back_to_json_and_can_be_read_again():
    """Files by their paths; an image that has none, as a PNG in a data URI."""
    load = media_loader(TINY)
    cropped = load_image(Image.effect_noise((60, 40), 99), TINY)
    talk = [says("user", ["Q", load("image", str(EXAMPLE)), load("video", MOVING), cropped]),
            says("tool", ["t"], tool_call_id="call_1"),
            {"role": "assistant", "content": [""], "reasoning_content": "TH", "tool_calls": [CALL]},
            {"role": "assistant", "content": ["A"], "reasoning_content": ""}]
    first, *rest = json.loads(json.dumps([to_json(message) for message in talk]))
    assert rest == [says("tool", "t", tool_call_id="call_1"), says("assistant", "", reasoning_content="TH", tool_calls=[CALL]),
                    says("assistant", "A")]
    assert first["content"][:3] == [{"type": "text", "text": "Q"}, {"type": "image", "image": str(EXAMPLE)},
                                    {"type": "video", "video": str(MOVING)}]
    again = read_messages([first, *rest], load)
    assert again[1:] == talk[1:] and again[0]["content"][0] == "Q" and len(again[0]["content"]) == 4
    for before, after in zip(talk[0]["content"][1:], again[0]["content"][1:]):
        assert before.kind == after.kind and before.grid == after.grid and torch.equal(before.patches, after.patches)


# --------------------------------------------------------------------------------------------- 2. images and videos
def test_images_come_as_paths_and_as_uris_and_from_memory():
    uri = "data:image/png;base64," + base64.b64encode(EXAMPLE.read_bytes()).decode()
    seen = []
    load = media_loader(TINY, loaded=seen.append)
    expected = load_image(EXAMPLE, TINY)
    sources = [str(EXAMPLE), EXAMPLE, uri, f"file://{EXAMPLE}", f"file:{EXAMPLE}", Image.open(EXAMPLE)]
    media = [load("image", source) for source in sources]
    assert all(torch.equal(item.patches, expected.patches) and item.summary == expected.summary for item in media)
    assert [item.source for item in media] == sources and all(a is b for a, b in zip(seen, media)) and len(seen) == len(media)


def test_videos_come_as_paths_and_as_uris_and_from_memory():
    uri = "data:image/gif;base64," + base64.b64encode(MOVING.read_bytes()).decode()
    load = media_loader(TINY)
    media = [load("video", source) for source in (str(MOVING), uri)]
    assert torch.equal(media[0].patches, media[1].patches) and [item.kind for item in media] == ["video"] * 2
    assert media[1].source == uri
    assert load("video", Video([Image.new("RGB", (168, 126))], [0.0])).grid == (2, 10, 14)


def test_the_options_of_the_loader_reach_the_readers():
    limited = media_loader(TINY, max_pixels=3136, max_frames=2)
    assert limited("video", MOVING).grid[0] == 2 and limited("video", MOVING).summary.startswith("2 frames ")
    for kind, source in (("image", EXAMPLE), ("video", MOVING)):
        _, h, w = limited(kind, source).grid
        assert h * w * 14 * 14 <= 3136
    assert media_loader(TINY, fps=1000.0, max_frames=4)("video", MOVING).grid[0] == 4


def test_a_path_may_have_any_characters(tmp_path):
    file = tmp_path / "a b%20c:d,e.png"
    Image.new("RGB", (56, 56)).save(file)
    uri = "file://" + str(file).replace("%", "%25").replace(" ", "%20")
    assert open_source(str(file)) == file == open_source(uri) and open_source(file) is file
    assert open_source("file://a/b.png") == open_source("file:a/b.png") == open_source("a/b.png") == Path("a/b.png")


@pytest.mark.parametrize("source, words", [
    ("", "no file"), ("https://x/y.png", "downloaded"), ("http://x/y.png", "downloaded"), ("data:image/png,abc", "data URI"),
    ("data:image/png;base64,abc", "data:image/png;base64"), ("data:image/png;base64,aGVsbG8=", "image"),
    ("no/such.png", "does not exist")])
def test_sources_that_cannot_be_opened_are_refused_in_a_short_sentence(source, words):
    with pytest.raises(InputError, match=words) as refused:
        media_loader(TINY)("image", source)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 250
    if source:
        with pytest.raises(InputError):
            media_loader(TINY)("video", source)


# -------------------------------------------------------------------------------------------- 3. tools in the prompt
@pytest.mark.parametrize("style, messages, expected", [
    ("thinking", [says("user", "Q")], f"{BEGIN}{ERNIE}{LISTED}User: Q\nAssistant: \n<think>\n"),
    ("instruct", [says("user", "Q")], f"{BEGIN}{LISTED}User: Q\nAssistant: {EMPTY}"),
    ("text", [says("user", "Q")], f"{BEGIN}{LISTED}User: Q\nAssistant: "),
    ("instruct", [says("system", "S"), says("user", "Q"), says("system", "T")],
     f"{BEGIN}S{LISTED}User: QT\n\nAssistant: {EMPTY}"),
    ("thinking", [says("user", "Q"), says("assistant", "", reasoning_content="TH", tool_calls=[CALL]), says("tool", "23")],
     f"{BEGIN}{ERNIE}{LISTED}User: Q\nAssistant: \n<think>\nTH\n</think>\n\n{CALLED}{END}"
     f"User: <tool_output>\n23\n</tool_output>\n\nAssistant: \n<think>\n"),
    ("instruct", [user(IMG), says("assistant", None, tool_calls=[CALL, CALL]), says("tool", user(IMG, "seen")["content"]),
                  says("tool", [{"t": 1}]), says("user", "And?")],
     f"{BEGIN}{LISTED}User: Picture 1:{IMG}\nAssistant: {CALLED}{CALLED}{END}"
     f"User: <tool_output>\nPicture 2:{IMG}seen\n</tool_output>\n"
     f'<tool_output>\n[{{"t": 1}}]\n</tool_output>\nUser: And?\nAssistant: {EMPTY}'),
    ("instruct", [says("user", "Q"), says("assistant", "One moment.", tool_calls=[CALL]), says("tool", "1"),
                  says("assistant", "Again.", tool_calls=[CALL]), says("tool", "2")],
     f"{BEGIN}{LISTED}User: Q\nAssistant: One moment.{CALLED}{END}User: <tool_output>\n1\n</tool_output>\n"
     f"\nAssistant: Again.{CALLED}{END}User: <tool_output>\n2\n</tool_output>\n\nAssistant: {EMPTY}"),
])
def test_tools_stand_in_the_prompt_as_in_training(tokenizers, style, messages, expected):
    messages = read(*messages)
    before = json.dumps([to_json(message) for message in messages])
    for tool in (WEATHER, WEATHER["function"]):       # a bare function is wrapped
        assert prompt(tokenizers[style], messages, read_tools([tool])) == expected
    assert json.dumps([to_json(message) for message in messages]) == before      # the conversation is as it was


@pytest.mark.parametrize("style, messages, expected", [
    ("instruct", [user(IMG, "a", VID, "b", IMG)],
     f"{BEGIN}User: Picture 1:{IMG}aVideo 1:{VID}bPicture 2:{IMG}\nAssistant: {EMPTY}"),
    ("thinking", [says("user", "q1"), says("assistant", "TH\n</think>\n\nANS"), says("user", "q2")],
     f"{BEGIN}{ERNIE}\nUser: q1\nAssistant: \n<think>\nTH\n</think>\n\nANS{END}User: q2\nAssistant: \n<think>\n"),
    ("text", [says("developer", "S"), says("user", "Q"), says("assistant", "A", reasoning_content="TH"), says("user", "R")],
     f"{BEGIN}S\nUser: Q\nAssistant: A{END}User: R\nAssistant: ")])
def test_without_tools_the_prompt_is_that_of_the_core(tokenizers, style, messages, expected):
    assert prompt(tokenizers[style], read(*messages)) == expected


def test_tags_of_tools_are_control_tokens_where_the_vocabulary_has_them(tokenizers, tmp_path):
    """tiny/ has <tool_call> among its tokens, and no <tool_list>."""
    talk = read(says("user", "Q"), says("assistant", "", tool_calls=[CALL]), says("tool", "23"))

    def named(tokenizer: Tokenizer) -> list[str]:
        ids = encode_chat(tokenizer, plain_messages(talk, [WEATHER], tokenizer)).ids
        return [tokenizer.names[id] for id in ids if "tool" in tokenizer.names.get(id, "")]
    assert named(tokenizers["instruct"]) == ["<tool_call>", "</tool_call>"] and named(tokenizers["text"]) == []
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    names = [f"<{slash}tool_{tag}>" for tag in ("list", "call", "output") for slash in ("", "/")]
    special = json.loads((TINY / "added_tokens.json").read_text()) | {name: 900 + i for i, name in enumerate(names)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(special))
    assert named(Tokenizer(tmp_path)) == names


def test_nobody_can_write_a_control_token_into_a_conversation(tokenizers):
    tokenizer = tokenizers["instruct"]
    hostile = "".join(tokenizer.special) + "<|image@placeholder|></think>"

    def controls(text: str) -> list[int]:
        call = {"function": {"name": text, "arguments": {text: text}}}
        talk = read(says("system", text), says("user", [{"type": "text", "text": part} for part in (text[:5], text[5:])]),
                    says("assistant", text, reasoning_content=text), says("assistant", "", tool_calls=[call]), says("tool", text))
        ids = encode_chat(tokenizer, plain_messages(talk, [{"function": {"name": text}}], tokenizer)).ids
        return [id for id in ids if id in tokenizer.names]
    assert controls(hostile) == controls("Hello you")


@pytest.mark.parametrize("tools", ["x", [5], [{"function": 5}], [{"function": {}}], [{"type": "function"}], {"messages": []}])
def test_tools_without_a_name_are_refused(tools):
    with pytest.raises(InputError, match="tool"):
        read_tools(tools)


# ----------------------------------------------------------------------------------------------------- 4. requests
@pytest.mark.parametrize("text, key, messages, tools", [
    ('[{"role": "user"}]', "messages", [{"role": "user"}], []), ('{"messages": [1], "tools": null}', "messages", [1], []),
    (json.dumps({"messages": [1], "tools": [WEATHER]}), "messages", [1], [WEATHER]), ('{"messages": "x"}', "messages", "x", []),
    (json.dumps([WEATHER]), "tools", None, [WEATHER]), (json.dumps(WEATHER), "tools", None, [WEATHER]),
    (json.dumps(WEATHER["function"]), "tools", None, [WEATHER]),
    (json.dumps({"tools": [WEATHER["function"]]}), "tools", None, [WEATHER]),
    ("[]", "tools", None, [])])
def test_a_request_is_an_object_or_the_list_alone(text, key, messages, tools):
    assert read_request(text, "here", key) == {"messages": messages, "tools": tools}


@pytest.mark.parametrize("text, key, words", [
    ("{", "messages", "line 7 is no valid JSON"), ("[" * 9000, "messages", "line 7 is no valid JSON"), ("5", "tools", "list"),
    ('{"messages": [1], "tools": [{}]}', "messages", "name"), ('{"messages": []}', "tools", "name")])
def test_what_is_no_request_is_refused(text, key, words):
    with pytest.raises(InputError, match=words):
        read_request(text, "line 7", key)


def test_text_files_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbf[\xe4\xbd\xa0]")
    assert read_text(tmp_path / "x") == "[你]"
    (tmp_path / "x").write_bytes(b"ab\xe4")
    assert read_text(tmp_path / "x", errors="replace") == "ab\ufffd"
    for path in (tmp_path / "x", tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            read_text(path)


# ---------------------------------------------------------------------------------------------------- 5. replies
NAMED = lambda name, **arguments: ("call", name, arguments)
NO_CALL = lambda text: (text, False, "", [text])
F = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
REPLIES = [  # generated text; whether the prompt has opened the reasoning; reasoning; content and calls
    ("abc</think>xyz", True, "abc", ["xyz"]),
    ("abc\n</think>\n\nxyz", True, "abc", ["xyz"]),
    ("\nabc\n\ndef\n</think>\n\nx\n\ny", True, "abc\n\ndef", ["x\n\ny"]),
    ('abc\n</think>\n\n\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n', True, "abc", [NAMED("f", x=1)]),
    (f"abc</think>hello{F}", True, "abc", ["hello", NAMED("f")]),
    (f"hello\n{F}\n", False, "", ["hello", NAMED("f")]),
    ("abc", True, "abc", []), ("abc", False, "", ["abc"]), ("", True, "", []), ("", False, "", []),
    (F, True, "", [NAMED("f")]), (f"<think>\n{F}", True, "", [NAMED("f")]), (f"<think>\n{F}", False, "", [NAMED("f")]),
    ("<think>abc</think>def", True, "abc", ["def"]), ("<think>abc</think>def", False, "abc", ["def"]), ("abc\n", True, "abc", []),
    ("abc\n</think>\n\n<response>\ndef\n</response>\n", True, "abc", ["<response>\ndef\n</response>\n"]),
    ("a</think>b</think>c", True, "a", ["b</think>c"]), ("a < b </thin", True, "a < b </thin", []), NO_CALL("x</think>y"),
    NO_CALL("a <tool_cal"), NO_CALL("a <tool_call>"), (f"a{F}<tool_ca", False, "", ["a", NAMED("f"), "<tool_ca"]),
    ('<tool_call>{"name": "get_weather", "arguments": {"location": "北京"}}</tool_call>', False, "",
     [NAMED("get_weather", location="北京")]),
    NO_CALL('<tool_call>{"name": "get_weather", "arguments": {"location": "北"</tool_call>'),
    NO_CALL('<tool_call>"name": "get_weather", "arguments": {</tool_call>'),
    (f"</think>abc{F}", True, "", ["abc", NAMED("f")]),
    ('<tool_call>\n{"name": "f", "arguments": {"x": {"y": {"z": 1}}}}\n</tool_call>\n'
     '<tool_call>\n{"name": "g", "arguments": "{\\"a\\": 1}"}\n</tool_call>\n', False, "",
     [NAMED("f", x={"y": {"z": 1}}), NAMED("g", a=1)]),
    (f'two\n{F}\n<tool_call>{{"name": "g", "arguments": []}}</tool_call>', False, "", ["two", NAMED("f"), NAMED("g")]),
    # An outer brace was forgotten, or there is one too many.
    ('<tool_call>"name": "f", "arguments": {"x": 2}}</tool_call>', False, "", [NAMED("f", x=2)]),
    ('<tool_call>{"name": "f", "arguments": {"x": 2}</tool_call>', False, "", [NAMED("f", x=2)]),
    ('<tool_call>"name": "f", "arguments": {"x": 2}</tool_call>', False, "", [NAMED("f", x=2)]),
    NO_CALL('<tool_call>{"name": "f", "arguments": {"x": 1}}}</tool_call>'),
    # Tags in strings.
    ('<tool_call>{"name": "f", "arguments": {"x": "a</tool_call>b"}}</tool_call>', False, "", [NAMED("f", x="a</tool_call>b")]),
    ('<tool_call>{"name": "f", "arguments": {"x": "\\"</tool_call>"}}', False, "", [NAMED("f", x='"</tool_call>')]),
    ('<tool_call>{"name": "f", "arguments": {"x": "<tool_call>"}}</tool_call>', False, "", [NAMED("f", x="<tool_call>")]),
    ('<tool_call>{"name": "f", "arguments": {"x": "line\nline"}}</tool_call>', False, "", [NAMED("f", x="line\nline")]),
    # The answer ends behind a call that is complete, and in one that broke off: nobody knows what the model meant to add.
    ('<tool_call>{"name": "f", "arguments": {"x": 1}}', False, "", [NAMED("f", x=1)]),
    *map(NO_CALL, ('<tool_call>{"name": "f", "arguments": {"x": 1}', '<tool_call>"name": "f", "arguments": {"x": 1}}',
                   '<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "arguments": {"x": 1',
                   '<tool_call>{"name": "f", "arguments": {"x": 1}} and', '<tool_call>{"name": "f</tool_call>')),
    # What is no call.
    (f"<tool_call>bad</tool_call>{F}", False, "", ["<tool_call>bad</tool_call>", NAMED("f")]),
    (f'<tool_call>{{"x": "open</tool_call>then {F}', False, "", ['<tool_call>{"x": "open</tool_call>then ', NAMED("f")]),
    *map(NO_CALL, ("Hello\n\n<tool_call>oops</tool_call>", "<tool_call>5</tool_call>", "<tool_call></tool_call>",
                   '<tool_call>{"name": 5, "arguments": {}}</tool_call>', '<tool_call>{"name": "f"}</tool_call>',
                   '<tool_call>{"name": "f", "arguments": {}} {}</tool_call>', "<tool_call>" + "[" * 9000 + "</tool_call>",
                   "<tool_call>" + '{"a":' * 9000 + "</tool_call>")),
]


@pytest.mark.parametrize("letters", [10**6, 3, 1])
@pytest.mark.parametrize("text, thinking, reasoning, rest", REPLIES, ids=range(len(REPLIES)))
def test_a_reply_is_taken_apart_however_it_comes(text, thinking, reasoning, rest, letters):
    letters = letters if len(text) < 1000 else max(letters, 1000)
    parser, found, thoughts = ToolReplyParser(thinking), [], ""
    pushes = [(text[i : i + letters], False) for i in range(0, len(text), letters)] + [("", True)]
    for kind, part in (event for push in pushes for event in parser.push(*push)):
        if kind == "tool_call":
            function = json.loads(part)["function"]
            found.append(NAMED(function["name"], **json.loads(function["arguments"])))
        elif kind == "content":
            found[-1:] = [found[-1] + part] if found and isinstance(found[-1], str) else [*found[-1:], part]
        else:
            thoughts += part
    content = "".join(part for part in rest if isinstance(part, str))
    assert found == rest and thoughts == reasoning == parser.text["reasoning"] and parser.text["content"] == content
    message = parser.message()
    assert message["reasoning_content"] == reasoning.strip("\n") and message["content"] == [content]
    calls = parser.tool_calls
    assert message.get("tool_calls", []) == calls and len({call["id"] for call in calls}) == len(calls)
    if "</think>" not in content:      # which would be read as the end of reasoning
        assert read_messages([to_json(message)], unread) == [message]


def test_text_comes_out_as_soon_as_it_is_certain():
    push = lambda parser, *pieces: [[text for _, text in parser.push(piece)] for piece in pieces]
    assert push(ToolReplyParser(thinking=True), "I see", " a <", "b </th", "ink", ">", "\n\n", "Yes", "\n", "!") == [
        ["I see"], [" a "], ["<b "], [], [], [], ["Yes"], [], ["\n!"]]
    # The name of a tag in prose holds nothing up, nor does a call that cannot be one.
    assert push(ToolReplyParser(thinking=False), "Use <tool_call>", " in prose", ".") == [
        ["Use "], ["<tool_call>", " in prose"], ["."]]
    assert push(ToolReplyParser(thinking=False), '<tool_call>{"x"', "}</tool_call>", " so") == [
        [], ["<tool_call>", '{"x"}</tool_call>'], [" so"]]


def test_a_call_comes_out_when_it_is_closed_and_not_before():
    parser = ToolReplyParser(thinking=False)
    pieces = ("Hm.\n<tool_", 'call>{"name": "f", "arguments": {}}', "\n</tool_call", ">", "\n")
    kinds = [[kind for kind, _ in parser.push(piece)] for piece in pieces]
    assert kinds == [["content"], [], [], ["tool_call"], []] and parser.text["content"] == "Hm."


def test_the_parser_follows_generated_tokens():
    """Of tiny/, whose vocabulary has tags of calls as tokens: they are shown to the parser."""
    tokenizer = Tokenizer(TINY)
    parser = ToolReplyParser(thinking=True)
    ids = tokenizer.encode(f"Hm.\n</think>\n\n{CALLED}<|end_of_sentence|>", control=True)
    events = list(parser.follow(tokenizer, ids))
    assert [kind for kind, _ in events][-1] == "tool_call" and json.loads(events[-1][1])["function"] == CALL["function"]
    assert parser.message()["tool_calls"][0]["function"] == CALL["function"] and parser.text["reasoning"] == "Hm."
