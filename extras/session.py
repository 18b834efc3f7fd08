"""Conversations with a loaded checkpoint: turns that share a KV cache, zoom calls, and the reply as JSON.

run.py hands over to `run` when one of --chat, --batch, --messages, --tools, --zoom, --boxes and --json is given.
"""
import argparse
import hashlib
import itertools
import json
import math
import time
from pathlib import Path
from typing import Callable, Iterator

import torch

from ernie_vl import Config, ErnieVL, InputError, Inputs, KVCache, generate, is_placeholder, pieces, require, token_grid
from extras.boxes import ZOOM_TOOL, check_boxes_path, crop, draw_boxes, find_boxes_in, is_zoom, last_image
from extras.messages import (ToolReplyParser, media_loader, plain_messages, read_messages, read_request,
                             read_text, to_json)
from run import (Printer, check_output, make_sampler, extra, load_model, log, question, report, save_logits,
                 write_atomically)
from tokenizer import Media, Tokenizer, chat_template, encode_chat, generation_prompt, load_image, short_name


# ------------------------------------------------------------------------------------------------- prefix cache
class PrefixCache:
    """The KV cache of a conversation, and one fingerprint per token, by which the longest common prefix with the next
    prompt is found."""

    def __init__(self, layers: int):
        self.layers, self.fingerprints = [KVCache() for _ in range(layers)], []

    def reuse(self, inputs: Inputs, cfg: Config) -> Inputs:
        """Truncates the cache to the longest prefix that it shares with a prompt, never inside an image or video and
        without the prompt's last token, whose logits are wanted. Returns the inputs that follow this prefix."""
        # Where an interrupt or an error ended a forward pass, some layers have computed more tokens than others.
        computed = self.fingerprints[: min(kv.length for kv in self.layers)]
        wanted = fingerprints(inputs, cfg)
        n = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], zip(computed, wanted[:-1]))])
        while n and isinstance(wanted[n], tuple) and wanted[n - 1] == wanted[n]:      # back to where the image begins
            n -= 1
        self.fingerprints = wanted      # of all that will be computed; the lengths say how much of it has been
        for kv in self.layers:
            kv.length = n
        return drop_prefix(inputs, n, cfg)


def fingerprints(inputs: Inputs, cfg: Config) -> list:
    """One per token: its id, or for a placeholder the grid and a digest of its whole image or video."""
    out, grids = inputs.ids.tolist(), inputs.grids
    places = is_placeholder(inputs.ids, cfg).nonzero().flatten().split([math.prod(token_grid(grid)) for grid in grids])
    images = inputs.patches.cpu().split([math.prod(grid) for grid in grids])
    for grid, image, place in zip(grids, images, places):
        out[place[0] : place[-1] + 1] = [(grid, hashlib.sha1(image.numpy()).digest())] * len(place)
    return out


def drop_prefix(inputs: Inputs, n: int, cfg: Config) -> Inputs:
    """The inputs after the first n (cached) tokens, with the images and videos among them. n lies inside none."""
    dropped = is_placeholder(inputs.ids[:n], cfg).sum()
    ends = itertools.accumulate(math.prod(token_grid(grid)) for grid in inputs.grids)
    grids = [grid for grid, end in zip(inputs.grids, ends) if end > dropped]
    patches = inputs.patches[len(inputs.patches) - sum(math.prod(grid) for grid in grids) :]
    return Inputs(inputs.ids[n:], inputs.positions[:, n:], inputs.is_vision[n:], patches, grids)


# ------------------------------------------------------------------------------------------------------ session
class Clock:
    """Seconds by stage."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, stage: str) -> None:
        since, self.last = self.last, time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0) + self.last - since


class Session:
    """A loaded checkpoint that answers conversations, and computes of each only what follows the prefix that it shares
    with the one before. `ended`, `tokens`, `prompt_tokens` and `media_tokens` tell of the last reply."""

    def __init__(self, model: ErnieVL, tokenizer: Tokenizer, args: argparse.Namespace, clock: Clock, tools: list = ()):
        self.model, self.tokenizer, self.args, self.clock = model, tokenizer, args, clock
        self.tools = [*tools, ZOOM_TOOL] if args.zoom else list(tools)
        self.load_media = loader(args, tokenizer.folder)
        self.cache = PrefixCache(len(model.layers))
        self.ended, self.tokens, self.prompt_tokens, self.media_tokens = "stop", 0, 0, 0

    def inputs(self, messages: list[dict], add_generation_prompt: bool = True) -> Inputs:
        """The prompt of a conversation in the form of `read_messages`. Raises InputError."""
        plain = plain_messages(messages, self.tools, self.tokenizer)
        return self.model.prepare(*encode_chat(self.tokenizer, plain, self.args.think, add_generation_prompt))

    def converse(self, messages: list[dict], show: Callable = lambda kind, text: None) -> None:
        """Appends the reply to a conversation, after running any zoom calls. show(kind, text) is called with its parts
        as they come. Ctrl-C ends it early, and what was generated stands. Raises InputError."""
        check_question(messages)
        self.tokens, zooms = 0, 0
        messages.append(self.answer(messages, show))
        while calls := self.zoom_calls(messages[-1]):
            if zooms > self.args.max_zooms:
                return log(f"the model asks to zoom again, and --max-zooms allows {self.args.max_zooms}")
            for call in calls:
                zooms += 1
                messages.append(self.zoom(messages, call, allowed=zooms <= self.args.max_zooms))
            messages.append(self.answer(messages, show))

    def answer(self, messages: list[dict], show: Callable) -> dict:
        """The next message."""
        inputs = self.inputs(messages)
        self.prompt_tokens = len(inputs.ids)
        self.media_tokens = sum(math.prod(token_grid(grid)) for grid in inputs.grids)
        parser = ToolReplyParser(self.tokenizer.begins_thinking(inputs.ids.tolist()))
        try:
            for kind, text in parser.follow(self.tokenizer, self.generate(inputs)):
                show(kind, text)
        except KeyboardInterrupt:
            self.ended = "interrupted"
            for kind, text in parser.push("", final=True):
                show(kind, text)
        self.lap()
        if parser.tool_calls and self.ended == "stop":
            self.ended = "tool_calls"
        return parser.message()

    def generate(self, inputs: Inputs) -> Iterator[int]:
        choose = make_sampler(self.args, self.tokenizer, self.model, inputs.ids.tolist())
        rest, stop = self.cache.reuse(inputs, self.model.cfg), tuple(self.tokenizer.stop)

        def ids() -> Iterator[int]:
            ended = yield from generate(self.model, rest, choose, stop, self.args.max_new_tokens, self.cache.layers)
            self.ended = {"context": "length"}.get(ended, ended)

        for id in ids():
            self.lap()
            self.tokens += 1
            self.cache.fingerprints.append(id)
            yield id

    def lap(self) -> None:
        self.clock.lap("other_tokens" if self.tokens else "first_token")

    def restart_clock(self) -> None:
        self.clock = Clock()

    def zoom_calls(self, reply: dict) -> list[dict]:
        """The calls of a reply that are run here: with --zoom all of them where all are zooms, and otherwise none."""
        calls = reply.get("tool_calls", [])
        return calls if self.args.zoom and all(map(is_zoom, calls)) and self.ended != "interrupted" else []

    def zoom(self, messages: list[dict], call: dict, allowed: bool) -> dict:
        """The message that answers a call of image_zoom_in_tool."""
        box, shown = json.loads(call["function"]["arguments"]).get("bbox_2d"), last_image(messages)
        try:
            require(allowed, "There is no zoom left: answer with what you have seen.")
            require(shown is not None, "There is no image to zoom into.")
            result = load_image(crop(shown.image, box), self.tokenizer.folder, self.args.max_pixels)
            log(f"zoom to {box}: {result.summary}")
        except InputError as error:
            result = str(error)
            log(f"zoom to {box}: {error}")
        return {"role": "tool", "tool_call_id": call["id"], "content": [result]}

    @torch.inference_mode()
    def prefill_next_turn(self, messages: list[dict]) -> None:
        """Prefills the cache with the history as the next turn will render it, while the person reads the answer: the
        template may leave out of an earlier answer what stood before it, an empty <think>. Raises InputError."""
        inputs = self.inputs(messages, add_generation_prompt=False)
        for piece in pieces(self.cache.reuse(inputs, self.model.cfg), self.model.cfg):
            self.model(piece, self.cache.layers, only_last=True)

    def printer(self) -> Printer:
        return ReplyPrinter(self.args.show_thinking, self.args.zoom)

    def report(self) -> None:
        first, others = (self.clock.seconds.get(stage, 0) for stage in ("first_token", "other_tokens"))
        report(self.prompt_tokens, self.tokens, first, others, sum(self.clock.seconds.values()))

    def reply(self, messages: list[dict]) -> dict:
        """The last message in OpenAI's format, with its boxes in pixels, token counts and seconds by stage."""
        image = last_image(messages)
        boxes = find_boxes_in(messages[-1]) if image else []
        return {**to_json(messages[-1]), "finish_reason": self.ended,
                "boxes": [{"label": box.label, "bbox": box.pixels(image.image.size)} for box in boxes],
                "usage": {"prompt_tokens": self.prompt_tokens, "picture_tokens": self.media_tokens,
                          "completion_tokens": self.tokens},
                "seconds": {stage: round(seconds, 4) for stage, seconds in self.clock.seconds.items()}}


class ReplyPrinter(Printer):
    """Shows tool calls too, a line each; but not zoom calls that are run here, of which stderr tells."""

    def __init__(self, show_thinking: bool, zooms: bool):
        super().__init__(show_thinking)
        self.zooms, self.styles["tool_call"] = zooms, "{}"

    def show(self, kind: str, text: str) -> None:
        if kind == "tool_call" and self.zooms and is_zoom(json.loads(text)):
            print(end="\n" * bool(self.last), flush=True)
            self.last = None
        else:
            print(end="\n" * (kind == self.last == "tool_call"))
            super().show(kind, text)


# ---------------------------------------------------------------------------------------------- the command line
def run(args: argparse.Namespace, tokenizer: Tokenizer, device: str) -> None:
    """Answers what the flags ask for. What cannot be used is said before the model is loaded. Raises InputError."""
    clock = Clock()
    check_flags(args)
    args.save_logits, args.boxes, args.out = map(check_output, (args.save_logits, args.boxes, args.out))
    generation_prompt(chat_template(tokenizer), args.think)
    requests = extra("batch").open_requests(args) if args.batch else []
    messages, tools = conversation(args, tokenizer.folder)
    if not args.chat and not args.batch:
        check_question(messages)
    if args.boxes:
        check_boxes_path(args.boxes)
        require(last_image(messages) is not None, "--boxes draws on an image: give one with --image")
    clock.lap("pictures")
    model = load_model(args, tokenizer.folder, device)
    clock.lap("load")
    session = Session(model, tokenizer, args, clock, tools)
    if args.save_logits:
        save_logits(model, session.inputs(messages), args.save_logits)
    elif args.batch:
        extra("batch").batch(session, requests)
    elif args.chat:
        extra("chat").chat(session, messages)
    else:
        reply_once(session, messages)


def check_flags(args: argparse.Namespace) -> None:
    given = {name for name, value in vars(args).items() if value or value == ""}
    modes, asked = given & {"chat", "batch", "save_logits"}, given & {"media", "prompt", "system"}
    require(len(modes) < 2, "--chat, --batch and --save-logits are different things to do: give one of them")
    require(not modes or not given & {"boxes", "json"},
            "--json and --boxes are for one reply: leave out --chat, --batch or --save-logits")
    require(not asked or not given & {"messages", "batch"},
            "--messages and --batch hold whole conversations: put the question, its images and system message there")
    require(not {"messages", "batch"} <= given, "--messages is one conversation and --batch are many: leave one out")
    require("batch" in given or "out" not in given, "--out is where --batch writes: give both")


def conversation(args: argparse.Namespace, folder: Path) -> tuple[list[dict], list[dict]]:
    """The messages, their images and videos loaded, and the tools that the flags name."""
    tools = read_request(read_text(args.tools), args.tools, "tools")["tools"] if args.tools else []
    if not args.messages:
        return question(args, folder), tools
    request = read_request(read_text(args.messages), args.messages)
    return read_messages(request["messages"], loader(args, folder)), tools + request["tools"]


def loader(args: argparse.Namespace, folder: Path) -> Callable[[str, str], Media]:
    """What `read_messages` takes, with the options of the command line. In a batch stderr has a line a request."""
    announce = lambda media: args.batch or log(f"{short_name(media.source)} {media.summary}")
    return media_loader(folder, args.max_pixels, args.fps, args.max_frames, announce)


def check_question(messages: list[dict]) -> None:
    require(messages[-1]["role"] in ("user", "tool"),
            "the conversation asks nothing: let it end with a message of the user or the result of a tool")


def reply_once(session: Session, messages: list[dict]) -> None:
    args, printer = session.args, session.printer()
    if args.json:
        session.converse(messages)
        print(json.dumps(session.reply(messages), ensure_ascii=False), flush=True)
    else:
        session.converse(messages, printer.show)
        printer.end()
    session.report()
    if args.boxes:
        boxes, path = find_boxes_in(messages[-1]), args.boxes
        if boxes:
            write_atomically(path, draw_boxes(last_image(messages).image, boxes).save)
        log(f"drew {len(boxes)} boxes in {path}" if boxes else f"the answer locates nothing, so {path} was not written")
    if session.ended == "interrupted":
        raise KeyboardInterrupt
