"""Conversations in OpenAI's and Hugging Face's format: reading them, their tools, and what an answer calls.

`read_messages` brings a conversation into one form, once, and everything in extras/ goes on with that form:

    {"role": "system" | "user" | "assistant" | "tool", "content": list of str and tokenizer.Media}

with "reasoning_content" in an assistant's message, and "tool_calls" in OpenAI's form where there are any; with
"tool_call_id" in a tool's. `plain_messages` turns it into the core's three roles, tools written out as in training.
"""
import base64
import contextlib
import io
import json
import re
import urllib.parse
import uuid
from pathlib import Path
from typing import Callable

from PIL import Image

from ernie_vl import InputError, require
from extras.video import Video, load_video
from tokenizer import Control, Media, ReplyParser, Tokenizer, chat_template, input_errors, load_image, wrap

ROLES = ("system", "developer", "user", "assistant", "tool")
SOURCE = str | Path | Image.Image | Video | Media      # of an image or video
MEDIA_TYPES = ("image", "image_url", "video", "video_url")
ITEMS = {  # type of an item -> what it holds, and the keys under which that may stand
    "text": (str, ("text",)), **{kind: (SOURCE, (kind, "url", "path")) for kind in MEDIA_TYPES}}
# Training code of the Thinking checkpoint has the tool list in front of the system message in one place and behind it
# in another, and a tool's output on the line of "User: " or on the next. Here it is behind, and on the line.
TOOL_LIST = "\n<tool_list>\n{}\n</tool_list>\n"
TOOL_CALL = "<tool_call>\n{}\n</tool_call>\n"
TOOL_OUTPUT = "<tool_output>\n{}\n</tool_output>\n"
PLAIN = {  # role -> the role in the core's template, and what stands around the content
    "system": ("system", "{}"), "user": ("user", "{}"), "assistant": ("assistant", "{}"), "tool": ("user", TOOL_OUTPUT)}
CALL_EXAMPLE = '{"type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}'
# What stands between the tags of a call, up to the first closing tag that is not in a string of its JSON.
CALL = r'\s*((?:"(?:\\.|[^"\\])*"|[^"<]|<(?!/tool_call>))*)'
Load = Callable[[str, object], Media]      # (kind "image" or "video", its source as it stands in a message) -> Media


# ------------------------------------------------------------------------------------------------------- 1. requests
def read_text(path: Path, errors: str = "strict") -> str:
    """A file of UTF-8 text, with or without a byte order mark. Raises InputError."""
    with input_errors(path, "UTF-8 text"):
        return path.read_text(encoding="utf-8-sig", errors=errors)


def read_request(text: str, where: str | Path, key: str = "messages") -> dict:
    """JSON of a request, {"messages": [...], "tools": [...]}, or of what stands under one of its keys -> {"messages":
    as they were given, or None, "tools": list}. Raises InputError, which says where the text stood."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no valid JSON ({error})") from None
    if not isinstance(value, dict) or key not in value:
        value = {key: value}
    return {"messages": value.get("messages"), "tools": read_tools(value.get("tools") or [])}


def read_tools(tools: list[dict] | dict) -> list[dict]:
    """Tools as OpenAI's API takes them, or one alone; a bare function is wrapped. Raises InputError without a name."""
    tools = as_list(tools)
    require(all(isinstance(tool, dict) for tool in tools),
            'tools are a list, [{"type": "function", "function": {"name": "f", "parameters": {}}}] for example')
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for tool in tools:
        require(isinstance(tool["function"], dict) and isinstance(tool["function"].get("name"), str),
                f"a tool has no name: {tool!r:.200}")
    return tools


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


# ------------------------------------------------------------------------------------------------------- 2. messages
def read_messages(messages: list[dict], load: Load) -> list[dict]:
    """A conversation -> the form at the top of this file. `load` is called for each image and video whose source is no
    Media already. An assistant's reasoning may also stand in its content, before </think>. Raises InputError."""
    require(isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages),
            'a conversation is a list of messages, [{"role": "user", "content": "Hi"}] for example')
    return [read_message(message, load) for message in messages]


def read_message(message: dict, load: Load) -> dict:
    role = message.get("role")
    require(role in ROLES, f"a message has the role {role!r}, and system, user, assistant and tool are known")
    role = {"developer": "system"}.get(role, role)          # OpenAI's newer word
    out = {"role": role, "content": read_content(role, message.get("content"), load)}
    if role == "assistant":
        out = read_answer(out["content"], message.get("reasoning_content"), message.get("tool_calls"))
    return out | {key: message[key] for key in ("tool_call_id",) if key in message}


def read_content(role: str, content, load: Load) -> list[str | Media]:
    if isinstance(content, str):
        return [content]
    if isinstance(content, list) and all(isinstance(i, dict) and i.get("type") in tuple(ITEMS) for i in content):
        return [read_item(item, load) for item in content]
    if role == "tool" or content is None and role == "assistant":
        # Training data has lists of JSON results. None is a tool that had nothing to say, or a call without a word.
        return [json.dumps(content, ensure_ascii=False)] * (content is not None)
    raise InputError(f"the content of a message is a text or a list of text, images and videos, not {content!r:.200}")


def read_item(item: dict, load: Load) -> str | Media:
    """OpenAI's items hold {"url": ...} where those of Hugging Face hold the source itself."""
    kind, (allowed, keys) = item["type"], ITEMS[item["type"]]
    places = [place for place in (item, item.get(kind)) if isinstance(place, dict)]
    source = next((place[key] for place in places for key in keys if isinstance(place.get(key), allowed)), None)
    require(source is not None, f"a message holds an item of type {kind!r} that has no text, or no path or data URI")
    if kind == "text" or isinstance(source, Media):
        return source
    return load(kind.removesuffix("_url"), source)


def read_answer(content: list, reasoning: str | None, calls: list[dict] | dict | None) -> dict:
    require(all(isinstance(item, str) for item in content) and isinstance(reasoning, str | None),
            "an assistant's message holds text, as reasoning_content and as content, and nothing else")
    text = "".join(content)
    if reasoning is None and "</think>" in text:
        reasoning, _, text = text.removeprefix("<think>").partition("</think>")
    out = {"role": "assistant", "content": [text.lstrip("\n")], "reasoning_content": (reasoning or "").strip("\n")}
    if calls:
        out["tool_calls"] = [read_call(call) for call in as_list(calls)]
    return out


def read_call(call: dict) -> dict:
    """A call in OpenAI's format, with its arguments as an object or as JSON of one -> the same with JSON and an id."""
    with contextlib.suppress(TypeError, AttributeError, KeyError, ValueError, RecursionError):
        name, arguments = call["function"]["name"], call["function"].get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        require(isinstance(name, str) and isinstance(arguments, dict), "these are others")
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {"id": call.get("id") or f"call_{uuid.uuid4().hex[:12]}", "type": "function", "function": function}
    raise InputError(f"a tool call looks like {CALL_EXAMPLE}")


def to_json(message: dict) -> dict:
    """A message in OpenAI's format again, without what is empty. An image that came from no file is a data URI."""
    content = [item_to_json(item) for item in message["content"]]
    if [item["type"] for item in content] == ["text"]:
        content = content[0]["text"]
    return {key: value for key, value in {**message, "content": content}.items() if value or key == "content"}


def item_to_json(item: str | Media) -> dict:
    if isinstance(item, str):
        return {"type": "text", "text": item}
    if isinstance(item.source, str | Path):
        return {"type": item.kind, item.kind: str(item.source)}
    item.image.save(buffer := io.BytesIO(), "PNG")
    return {"type": "image", "image": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}


# ----------------------------------------------------------------------------------------------- 3. images and videos
def media_loader(folder: Path, max_pixels: int | None = None, fps: float = 2.0, max_frames: int = 180,
                 loaded: Callable[[Media], None] = lambda media: None) -> Load:
    """What `read_messages` takes, for the checkpoint in `folder`: it opens paths, data URIs, file: URIs, PIL images and
    Videos, and calls loaded(media) for each. Nothing is downloaded. It raises InputError."""
    readers = {"image": lambda file: load_image(file, folder, max_pixels),
               "video": lambda file: load_video(file, folder, max_pixels, fps, max_frames)}

    def load(kind: str, source) -> Media:
        with input_errors(source, kind):
            file = open_source(source)
        media = readers[kind](file)._replace(source=source)      # a data URI, and not its bytes
        loaded(media)
        return media
    return load


def open_source(source):
    """A str -> a path, or the bytes of a data URI; anything else as it is. Raises ValueError for what is neither."""
    if not isinstance(source, str):
        return source
    scheme, _, rest = source.partition(":")
    head, _, data = rest.partition(",")
    require(source, "no file is named")
    require(scheme not in ("http", "https"), "nothing is downloaded here: save it in a file, and give the path")
    require(scheme != "data" or head.endswith(";base64"), "a data URI must begin like data:image/png;base64,")
    if scheme == "data":
        return io.BytesIO(base64.b64decode(data))
    return Path(urllib.parse.unquote(rest.removeprefix("//")) if scheme == "file" else source)


# ------------------------------------------------------------------------------------------- 4. tools in the prompt
def plain_messages(messages: list[dict], tools: list[dict], tokenizer: Tokenizer) -> list[dict]:
    """A conversation with tools -> messages of the core's three roles, for `tokenizer.encode_chat`. The list of tools
    is behind the first system message, calls are behind an answer, neighbouring results share a turn of the user."""
    if tools and not any(message["role"] == "system" for message in messages):
        messages = [{"role": "system", "content": [chat_template(tokenizer).system]}, *messages]
    tool_list = wrap_tags(TOOL_LIST, tokenizer, json.dumps(tools, ensure_ascii=False)) if tools else []
    waiting, plain, before = {"system": tool_list}, [], None
    for message in messages:
        role, (plain_role, template) = message["role"], PLAIN[message["role"]]
        content = wrap_tags(template, tokenizer, *message["content"]) + waiting.pop(role, [])
        for call in message.get("tool_calls", ()):
            function = {**call["function"], "arguments": json.loads(call["function"]["arguments"])}
            content += wrap_tags(TOOL_CALL, tokenizer, json.dumps(function, ensure_ascii=False))
        if role == before == "tool":
            plain[-1]["content"] += content
        else:
            plain.append({**message, "role": plain_role, "content": content})
        before = role
    return plain


def wrap_tags(template: str, tokenizer: Tokenizer, *inside: str | Media) -> list[str | Media]:
    """Tags of tools are control tokens in some vocabularies and plain text in others."""
    known = lambda part: str(part) if isinstance(part, Control) and part not in tokenizer.special else part
    return [known(part) for part in wrap(template, *inside)]


# --------------------------------------------------------------------------------------------- 5. tool calls in a reply
class ToolReplyParser(ReplyParser):
    """A reply in which <tool_call> may open the JSON of a call. It is parsed once, when it is complete; what is no call
    or breaks off is text as it stands. Unlike in the official parsers, text before a call is kept as content."""

    tags = ("<think>", "<tool_call>")

    def __init__(self, thinking: bool):
        super().__init__(thinking)
        self.text["tool_call"], self.tool_calls, self.newlines = "", [], ""

    def message(self) -> dict:
        """The reply in the form of `read_messages`."""
        return read_answer([self.text["content"]], self.text["reasoning"], self.tool_calls)

    def _reasoning(self, final: bool) -> tuple[str, str] | None:
        start = re.match(r"\n*(<think>)?\n*(?=<tool_call>)", self.buffer)
        if start and not self.text["reasoning"]:      # the model calls without closing a thought
            self.state, self.buffer = "content", self.buffer[start.end() :]
            return "reasoning", ""
        return super()._reasoning(final)

    def _split_at(self, tag: str | None, next_state: str, final: bool) -> tuple[str, str] | None:
        if tag is None:
            tag, next_state = "<tool_call>", "tool_call"
        if final and self.tool_calls:
            self.buffer = self.buffer.rstrip("\n")
        before, _, _ = self.buffer.partition(tag)
        self.newlines = before[len(before.rstrip("\n")) :]      # they are dropped before a call, and not before text
        return super()._split_at(tag, next_state, final)

    def _tool_call(self, final: bool) -> tuple[str, str] | None:
        """A call ends at its closing tag, or with the answer."""
        begun, ends = re.match(r'\s*([{"]|\Z)', self.buffer), final or "</tool_call>" in self.buffer
        # Without a closing tag there is nothing to search for: a search would begin anew with every token.
        found = ends and re.match(CALL + r"(</tool_call>" + r"|\Z" * final + ")", self.buffer, re.DOTALL)
        if begun and not found and not final:
            return None
        self.state, call = "content", found and parse_call(found[1].strip(), closed=bool(found[2]))
        if not call:
            return "content", f"{self.newlines}<tool_call>"
        self.buffer = self.buffer[found.end() :]
        self.tool_calls.append(call)
        return "tool_call", json.dumps(call, ensure_ascii=False)


def parse_call(text: str, closed: bool) -> dict | None:
    """JSON of a call -> the call. An outer brace that the model forgot is put back in a call that it closed."""
    text = "{" * (closed and not text.startswith("{")) + text + "}" * closed      # one too many is left over
    with contextlib.suppress(TypeError, KeyError, ValueError, RecursionError):
        call, end = json.JSONDecoder(strict=False).raw_decode(text)               # models write newlines into strings
        require(text[end:] in ("", "}" * closed), "there is more than a call")
        return read_call({"function": {"name": call["name"], "arguments": call["arguments"]}})
