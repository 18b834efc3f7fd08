"""Ask ERNIE-4.5-VL about pictures and clips.

    python run.py --image photo.jpg
    python run.py --image before.jpg --image after.jpg --prompt "What changed?"
    python run.py --video clip.mp4 --prompt "What happens, and when?"
    python run.py --model ERNIE-4.5-VL-28B-A3B-Thinking --image page.png --prompt "Read the small print." --zoom
    python run.py --image street.jpg --prompt "Locate every car as JSON with bbox_2d and label." --boxes cars.png
    python run.py --chat
    python run.py --image photo.jpg --save-logits logits.safetensors

The answer goes to stdout as it is produced, everything else to stderr. Exit code 2: something given cannot be used.
"""
import os
import signal

if __name__ == "__main__":      # Ctrl-C ends the program at once, also while the libraries are loading
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import base64
import contextlib
import io
import json
import math
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Iterator

TINY = Path(__file__).resolve().parent / "tiny"
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun sets them; rank 0 speaks


# ----------------------------------------------------------------------------------------------- the command line
class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message} (python run.py --help lists the options)\n")


def at_least(smallest: float, kind: type, what: str = ""):
    def check(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not smallest <= value < 2**63:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} is not {name} of {smallest} or more{what}")
        return value
    return check


def share(text: str) -> float:
    value = at_least(0, float)(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and up to 1")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("what to ask").add_argument
    add("--image", metavar="FILE", dest="media", action="append", default=[], type=lambda file: ("image", file),
        help="a picture; give it again for more of them")
    add("--video", metavar="FILE", dest="media", action="append", type=lambda file: ("video", file), help="a clip: an animated "
        "picture, a folder of numbered frames, or with PyAV installed a film; pictures and clips keep the order given")
    add("--prompt", metavar="TEXT", help="the question (default with a picture: Describe this image.)")
    add("--system", metavar="TEXT", help="a system message before the question")
    add("--think", action=argparse.BooleanOptionalAction, help="reason before answering, or not (default: what the checkpoint "
        "was made for)")
    add("--max-pixels", metavar="N", type=at_least(28 * 28, int, ": one token takes 28 x 28 pixels"),
        help="resize pictures and frames to at most N pixels: fewer tokens, faster, less detail")
    add("--fps", metavar="X", type=at_least(0.001, float), default=2.0, help="frames of a clip to look at, a second (default: 2)")
    add("--max-frames", metavar="N", type=at_least(1, int), default=180, help="and at most so many (default: %(default)s)")
    add("--tools", metavar="FILE", type=Path, help="JSON list of tools in OpenAI's format that the model may call")
    add("--zoom", action="store_true", help="let the model zoom into the last picture of the question, as the Thinking "
        "checkpoint has learned to")
    add("--max-zooms", metavar="N", type=at_least(0, int), default=4, help="how often (default: %(default)s)")
    add = parser.add_argument_group("instead of one question").add_argument
    add("--chat", action="store_true", help="a conversation in the terminal")
    add("--messages", metavar="FILE", type=Path, help="JSON list of messages in OpenAI's format, the last of which is answered")
    add("--batch", metavar="FILE", type=Path, help='one request a line, {"messages": [...]}, and one line of JSON for each')
    add("--out", metavar="FILE", type=Path, help="where --batch writes (default: stdout); lines that are there are not done again")
    add = parser.add_argument_group("which model").add_argument
    add("--model", metavar="FOLDER", default=str(TINY), help="a checkpoint folder, or a hub id in the local Hugging Face cache "
        "(default: the bundled tiny/, which knows coloured shapes and printed words)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto takes cuda, then mps, then cpu")
    add("--quantize", choices=("int8", "int4"), help="round the decoder's weights while loading: half or a third of the memory")
    add("--compile", action="store_true", help="compile the step that makes a token, which takes up to a few minutes: "
        "made for a GPU, where it has not been measured yet")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto keeps what the checkpoint stores (fp16 becomes float32)")
    add = parser.add_argument_group("how to answer").add_argument
    add("--max-new-tokens", metavar="N", type=at_least(1, int), default=1024, help="longest answer (default: %(default)s)")
    add("--temperature", metavar="X", type=at_least(0, float), default=0.0, help="0, the default, takes the likeliest token")
    add("--top-k", metavar="N", type=at_least(0, int), default=0, help="draw among the N likeliest tokens (default: all)")
    add("--top-p", metavar="X", type=share, default=1.0, help="draw among the likeliest tokens that sum to X (default: 1)")
    add("--repetition-penalty", metavar="X", type=at_least(0.01, float), default=1.0, help="above 1, repeats become less likely")
    add("--seed", metavar="N", type=at_least(0, int), help="the same seed gives the same answer (default: another each time)")
    add = parser.add_argument_group("what to print").add_argument
    add("--show-thinking", action="store_true", help="the reasoning too, when the output is no terminal")
    add("--boxes", metavar="FILE", type=Path, help="draw what the answer locates on the last picture of the question")
    add("--json", action="store_true", help="the reply as one JSON object in OpenAI's format: content, reasoning_content, "
        "tool_calls, with boxes in pixels, token counts, and seconds by stage")
    add("--save-logits", metavar="FILE", type=Path, help="do not answer: run the prompt once and write its inputs and the logits "
        "of every token in fp32, to check other implementations against")
    args = parser.parse_args(argv)
    modes = [name for name in ("chat", "batch", "save_logits") if getattr(args, name)]
    question = args.media or args.prompt is not None
    if len(modes) > 1:
        parser.error("--chat, --batch and --save-logits are different things to do: give one of them")
    if not (question or args.messages or args.chat or args.batch):
        parser.error("nothing to answer: give --image FILE, --prompt TEXT, or both")
    if (args.messages or args.batch) and (question or args.system is not None):
        parser.error("--messages and --batch hold whole conversations: put the question, its pictures and system message there")
    if args.messages and args.batch or args.out and not args.batch:
        parser.error("--out goes with --batch, and --messages does not")
    if modes and (args.boxes or args.json):
        parser.error("--json and --boxes are for one reply: leave out --chat, --batch or --save-logits")
    return args


if __name__ == "__main__":
    parse(None)     # --help and wrong options are answered at once, and not after the second that torch takes to load

try:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from ernie_vl import ErnieVL, InputError, Inputs, generate, merged
    from load_weights import find_folder, load, size
    from tokenizer import (ZOOM_TOOL, Box, Media, Reply, Tokenizer, crop, draw_boxes, encode_chat, find_boxes, load_media,
                           read_tools, short)
except ModuleNotFoundError as missing:
    print(f"error: the package {missing.name} is not installed: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------------------------------------------------- small parts
def say(line: str = "", redraw: bool = False) -> None:
    """A line on stderr. Only in a terminal may it draw over itself; elsewhere what would be drawn over is left out."""
    try:
        terminal = sys.stderr.isatty()
        if terminal or not redraw:
            print(f"\r\033[K{line}" if terminal else line, end="" if redraw else "\n", file=sys.stderr, flush=True)
    except (OSError, AttributeError):
        pass        # nobody reads stderr: the answer still counts


class Clock:
    """Seconds by stage."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, stage: str) -> float:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0) + now - self.last
        self.last = now
        return self.seconds[stage]


def pick_device(asked: str) -> str:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in there if there[name]) if asked == "auto" else asked
    if not there[device]:
        raise InputError(f"this machine or this build of torch has no {device} device: use --device cpu, or leave it out")
    return device


def join_ranks(device: str) -> str:
    """The device of this process of several that torchrun has started."""
    if RANKS == 1:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    if RANK:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    return device


def shared(value):
    """The first rank's value, on all of them."""
    if RANKS > 1:
        torch.distributed.broadcast_object_list(box := [value])
        return box[0]
    return value


def check_output(path: Path | None) -> Path | None:
    """Before minutes of work, not after them. Only an ordinary file may be replaced, never a device or a folder."""
    path = path and Path(os.path.realpath(path))      # unlike Path's own, os.path's functions raise nothing, whatever the name
    if path and (os.path.exists(path) and not os.path.isfile(path) or not os.path.isdir(path.parent) or not os.access(path.parent, os.W_OK)):
        raise InputError(f"{path} cannot be written: name a file in a folder that exists and is yours")
    return path


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """The file appears when it is complete; until then, and if that fails, whatever stood there stays."""
    if RANK:
        return
    path = check_output(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as folder:
            write(Path(folder) / path.name)
            os.replace(Path(folder) / path.name, path)
    except (SafetensorError, OSError, ValueError) as error:       # ValueError: pillow does not know the ending
        raise InputError(f"{path} could not be written ({error})") from None


def read_text(path: Path, errors: str = "strict") -> str:
    try:
        return path.read_text(encoding="utf-8-sig", errors=errors)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no UTF-8 text'}") from None


def read_request(text: str, where: str | Path, key: str = "messages") -> dict:
    """JSON of a request, {"messages": [...], "tools": [...]}, or of the list under one of its keys alone."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no valid JSON ({error})") from None
    value = {"tools": [value]} if isinstance(value, dict) and "function" in value else value       # one tool alone
    value = value if isinstance(value, dict) and key in value else {key: value}
    return {"messages": value.get("messages"), "tools": read_tools(value.get("tools") or [])}


# --------------------------------------------------------------------------------------------------------- an answer
class Printer:
    """Shows a reply while it comes: the answer plain, the reasoning dim in a terminal and elsewhere only when asked for."""

    def __init__(self, args: argparse.Namespace):
        self.terminal, self.zoom, self.last = bool(sys.stdout) and sys.stdout.isatty(), args.zoom, None
        self.hidden = set() if self.terminal or args.show_thinking else {"reasoning"}

    def show(self, kind: str, text: str) -> None:
        if kind == "tool_call" and self.zoom and is_zoom(json.loads(text)):      # it is answered here; stderr tells of it
            if self.last:
                self.end()
        elif kind not in self.hidden:
            if self.last and (kind != self.last or kind == "tool_call"):
                print("\n\n" if self.last == "reasoning" else "\n", end="")
            print(f"\033[2m{text}\033[0m" if kind == "reasoning" and self.terminal else text, end="", flush=True)
            self.last = kind

    def end(self) -> None:
        print(flush=True)
        self.last = None


def is_zoom(call: dict) -> bool:
    return call["function"]["name"] == ZOOM_TOOL["function"]["name"]


class Assistant:
    """A loaded checkpoint that answers conversations. What it has computed for one is not computed again for the next, as
    far as they begin alike."""

    def __init__(self, model: ErnieVL, tokenizer: Tokenizer, tools: list[dict], args: argparse.Namespace, clock: Clock):
        self.model, self.tokenizer, self.args, self.clock = model, tokenizer, args, clock
        self.tools, self.cache = tools + [ZOOM_TOOL] * args.zoom, model.new_cache()
        self.stop, self.forbidden = tuple(tokenizer.stop), tokenizer.forbidden(model.cfg.text.vocab_size)
        self.ended, self.tokens, self.prompt_tokens, self.media_tokens = "stop", 0, 0, 0      # of the last turn

    def read(self, messages: list[dict], seen: Callable[[Media], None] = lambda media: None) -> list[dict]:
        return load_media(messages, self.tokenizer.folder, self.args.max_pixels, self.args.fps, self.args.max_frames, seen)

    def inputs(self, messages: list[dict], ask: bool = True) -> Inputs:
        return self.model.prepare(*encode_chat(self.tokenizer, messages, self.args.think, self.tools, ask=ask))

    def answer(self, messages: list[dict], show: Callable) -> dict:
        """The next message. show(kind, text) is called with its parts as they come. Ctrl-C ends it early, and what is there
        stands."""
        inputs = self.inputs(messages)
        self.prompt_tokens, self.media_tokens = len(inputs.ids), sum(math.prod(merged(grid)) for grid in inputs.grids)
        reply = Reply(self.tokenizer.begins_thinking(inputs.ids.tolist()))
        try:
            for kind, text in reply.follow(self.tokenizer, self.generate(inputs)):
                show(kind, text)
        except KeyboardInterrupt:
            self.ended = "interrupted"
            for kind, text in reply.push("", final=True):
                show(kind, text)
        self.clock.lap("other_tokens" if self.tokens else "first_token")
        return reply.message()

    def generate(self, inputs: Inputs) -> Iterator[int]:
        args, before, room = self.args, self.tokens, self.model.cfg.text.max_position_embeddings - len(inputs.ids)
        most = min(args.max_new_tokens, room)
        for id in generate(self.model, inputs, most, self.stop, args.temperature, args.top_k, args.top_p,
                           args.repetition_penalty, args.seed, self.forbidden, cache=self.cache):
            self.clock.lap("other_tokens" if self.tokens else "first_token")
            self.tokens += 1
            yield id
        self.ended = "length" if self.tokens - before == most else "stop"

    def converse(self, messages: list[dict], show: Callable = lambda kind, text: None) -> None:
        """Appends the answer to a conversation, and before it what the model wanted to see more closely."""
        self.tokens, zooms = 0, 0
        while True:
            messages += self.read([self.answer(messages, show)])
            calls = messages[-1].get("tool_calls", [])
            self.ended = "tool_calls" if calls and self.ended == "stop" else self.ended
            ours = self.args.zoom and calls and all(map(is_zoom, calls))
            if ours and zooms > self.args.max_zooms:
                say(f"the model asks to zoom again, and --max-zooms allows {self.args.max_zooms}")
            if not ours or zooms > self.args.max_zooms or self.ended == "interrupted":
                return
            for call in calls:
                zooms += 1
                messages += self.zoom(messages, call, zooms <= self.args.max_zooms)

    def zoom(self, messages: list[dict], call: dict, allowed: bool) -> list[dict]:
        """The message that answers a call of image_zoom_in_tool."""
        box, picture = json.loads(call["function"]["arguments"]).get("bbox_2d"), last_picture(messages)
        answer = lambda content: self.read([{"role": "tool", "tool_call_id": call["id"], "content": content}])
        try:
            if not allowed:
                raise InputError("There is no zoom left: answer with what you have seen.")
            if not picture:
                raise InputError("There is no picture to zoom into.")
            result = answer([{"type": "image", "image": crop(picture.image, box)}])
            say(f"zoom to {box}: {result[0]['content'][0]['image'].note}")
        except InputError as error:
            result = answer(str(error))
            say(f"zoom to {box}: {error}")
        return result

    def settle(self, messages: list[dict]) -> None:
        """Reads the conversation as the next turn will have it, while the person reads the answer. The template may leave
        out of an earlier answer what stood before it when it was new, the empty <think>, so its place has changed."""
        next(generate(self.model, self.inputs(messages, ask=False), 1, cache=self.cache), None)

    def report(self) -> None:
        seconds, tokens = self.clock.seconds, self.tokens
        speed = f", then {(tokens - 1) / seconds['other_tokens']:.1f} tokens/s" if tokens > 1 else ""
        say(f"{self.prompt_tokens:,} tokens read, first token after {seconds['first_token']:.2f} s{speed}; "
            f"{tokens:,} tokens in {sum(seconds.values()):.1f} s")

    def reply(self, messages: list[dict]) -> dict:
        """The last message with what a program wants to know of it."""
        boxes, picture = boxes_of(messages[-1]), last_picture(messages)
        found = [{"label": box.label, "bbox": box.pixels(picture.image.size)} for box in boxes] if picture else []
        return {**written(messages[-1]), "finish_reason": self.ended, "boxes": found,
                "usage": {"prompt_tokens": self.prompt_tokens, "picture_tokens": self.media_tokens, "completion_tokens": self.tokens},
                "seconds": {stage: round(s, 4) for stage, s in self.clock.seconds.items()}}


def check_question(messages: list[dict]) -> None:
    if messages[-1]["role"] not in ("user", "tool"):
        raise InputError("the conversation asks nothing: let it end with a message of the user or the result of a tool")


def announce(media: Media) -> None:
    say(f"{short(media.source)} {media.note}")


def last_picture(messages: list[dict]) -> Media | None:
    """The zoom tool's schema has no number of a picture: it is the last one that a user has shown."""
    items = [item for message in messages if message["role"] == "user" for item in message["content"]]
    return next((item["image"] for item in reversed(items) if item["type"] == "image"), None)


def boxes_of(message: dict) -> list[Box]:
    return find_boxes("".join(item["text"] for item in message["content"]))


def written(message: dict) -> dict:
    """A message as JSON: pictures and clips as the paths they came from, what a zoom cut out as a data URI."""
    def item(part: dict) -> dict:
        kind = part["type"]
        if kind == "text" or isinstance(part[kind].source, (str, Path)):
            return {"type": kind, kind: part["text"] if kind == "text" else str(part[kind].source)}
        buffer = io.BytesIO()
        part[kind].image.save(buffer, "PNG")
        return {"type": "image", "image": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}

    content = [item(part) for part in message["content"]]
    content = content[0]["text"] if [part["type"] for part in content] == ["text"] else content
    return {key: value for key, value in {**message, "content": content}.items() if value or key == "content"}


# -------------------------------------------------------------------------------------------------------- what to do
def run(args: argparse.Namespace) -> None:
    clock, device, folder = Clock(), pick_device(args.device), find_folder(args.model)
    device = join_ranks(device)
    if RANKS > 1 and args.seed is None:
        args.seed = shared(int.from_bytes(os.urandom(4), "big"))      # all ranks must draw the same tokens
    args.save_logits, args.boxes, args.out = map(check_output, (args.save_logits, args.boxes, args.out))
    tokenizer, requests = Tokenizer(folder), batch_lines(args) if args.batch else []
    messages, tools = question(args), read_request(read_text(args.tools), args.tools, "tools")["tools"] if args.tools else []
    if args.messages:
        request = read_request(read_text(args.messages), args.messages)
        messages, tools = request["messages"], tools + request["tools"]
    encode_chat(tokenizer, [{"role": "user", "content": []}], args.think, tools)      # what the folder cannot do is said before it is loaded
    if messages or args.messages:
        messages = load_media(messages, tokenizer.folder, args.max_pixels, args.fps, args.max_frames, announce)
    if not args.chat and not args.batch:
        check_question(messages)
    if args.boxes and not last_picture(messages):
        raise InputError("--boxes draws on a picture: give one with --image")
    if args.boxes and args.boxes.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"{args.boxes} must end in .png, .jpg or .webp")
    clock.lap("pictures")
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    progress = lambda done, all: say(f"loading {folder.name}: {100 * done // all} %", redraw=True)
    model = load(folder, device, dtype, progress, args.quantize, say, RANK, RANKS, args.compile)
    say(f"{folder.name} loaded on {device} in {clock.lap('load'):.1f} s")
    if sum(p.numel() for p in model.parameters()) < 1e7:
        torch.set_num_threads(1)        # so small a model is faster when threads need not wait for one another
    assistant = Assistant(model, tokenizer, tools, args, clock)
    signal.signal(signal.SIGINT, signal.default_int_handler)      # from here on Ctrl-C ends an answer, and its text stands
    if args.save_logits:
        save_logits(model, assistant.inputs(messages), args.save_logits)
    elif args.batch:
        batch(assistant, requests, args.out)
    elif args.chat:
        chat(assistant, messages)
    else:
        answer(assistant, messages)


def question(args: argparse.Namespace) -> list[dict]:
    usual = f"Describe this {'video' if args.media and all(kind == 'video' for kind, _ in args.media) else 'image'}."
    content = [{"type": "text", "text": usual if args.prompt is None else args.prompt}]
    content += [{"type": kind, kind: file} for kind, file in args.media]
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": content}] if args.media or args.prompt is not None else system


def answer(assistant: Assistant, messages: list[dict]) -> None:
    args, printer = assistant.args, Printer(assistant.args)
    if args.json:
        assistant.converse(messages)
        print(json.dumps(assistant.reply(messages), ensure_ascii=False), flush=True)
    else:
        assistant.converse(messages, printer.show)
        printer.end()
    assistant.report()
    if args.boxes:
        boxes, picture = boxes_of(messages[-1]), last_picture(messages)
        if boxes:
            write_whole(args.boxes, draw_boxes(picture.image, boxes).save)
        say(f"drew {len(boxes)} boxes in {args.boxes}" if boxes else f"the answer locates nothing, so {args.boxes} was not written")
    if assistant.ended == "interrupted":
        raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------- chat, and batches
COMMANDS = "/image FILE, /video FILE, /reset, /save FILE, /quit"


def chat(assistant: Assistant, messages: list[dict]) -> None:
    """Questions from the terminal, or one a line from a pipe, until it ends."""
    with contextlib.suppress(ImportError):
        import readline     # noqa: F401     line editing and history, where the system has it
    say(f"Ask, or {COMMANDS}. Ctrl-C stops an answer.")
    system, media = [message for message in messages if message["role"] == "system"], []
    waiting = bool(messages) and messages[-1]["role"] in ("user", "tool")
    while True:
        try:
            if waiting:
                waiting = False
                take_turn(assistant, messages)
            line = listen("> ").strip()
            command, _, file = line.partition(" ")
            file = os.path.expanduser(file.strip().strip("'\""))
            if command == "/quit":
                return
            if command == "/reset":
                messages[:], media = system, []
            elif command in ("/image", "/video", "/save") and not file:
                raise InputError(f"{command} needs a file behind it")
            elif command in ("/image", "/video"):
                item = {"type": command[1:], command[1:]: file}
                media += assistant.read([{"role": "user", "content": [item]}], announce)[0]["content"]
            elif command == "/save":
                text = json.dumps([written(message) for message in messages], ensure_ascii=False, indent=1)
                write_whole(Path(file), lambda path: path.write_text(text + "\n", encoding="utf-8", errors="replace"))
                say(f"wrote {file}: --messages reads it, --chat goes on with it")
            elif command.startswith("/"):
                raise InputError(f"{command} is no command; these are: {COMMANDS}")
            elif line:
                before = len(messages)
                messages += assistant.read([{"role": "user", "content": [{"type": "text", "text": line}, *media]}])
                take_turn(assistant, messages)
                media = [] if len(messages) > before else media
        except (InputError, MemoryError, RuntimeError) as error:
            say(in_a_sentence(error, assistant.args))
        except KeyboardInterrupt:
            say("(/quit or Ctrl-D leaves)")
        except EOFError:
            say()
            return


def listen(prompt: str) -> str:
    """A line from the terminal. input() would write its prompt to stdout also where that is a file."""
    line = None
    if sys.stdin is None:
        raise EOFError
    with contextlib.suppress(EOFError):
        if sys.stdin.isatty() and not sys.stdout.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
            prompt = ""
        line = None if RANK else input(prompt if sys.stdin.isatty() else "")
    if (line := shared(line)) is None:
        raise EOFError
    return line


def take_turn(assistant: Assistant, messages: list[dict]) -> None:
    """Answers the last message; if that fails, or is stopped before a word, the conversation is as it was before it."""
    before, printer = len(messages) - 1, Printer(assistant.args)
    try:
        while True:
            assistant.clock = Clock()
            assistant.converse(messages, printer.show)
            printer.end()
            assistant.report()
            calls = messages[-1].get("tool_calls", [])
            if assistant.ended != "tool_calls" or assistant.args.zoom and all(map(is_zoom, calls)):
                break
            for call in calls:
                result = listen(f"result of {call['function']['name']}> ")
                messages += assistant.read([{"role": "tool", "tool_call_id": call["id"], "content": result}])
    except BaseException:
        del messages[before:]
        raise
    if assistant.ended == "interrupted" and not written(messages[-1])["content"]:
        del messages[before:]
    with contextlib.suppress(InputError, KeyboardInterrupt):      # a full context is the next question's trouble
        assistant.settle(messages)


def batch_lines(args: argparse.Namespace) -> list[tuple[int, str]]:
    """The requests that --out has no line for yet, with their line numbers. A line of it that was not finished is dropped."""
    lines, done = read_text(args.batch).split("\n"), set()        # not splitlines: JSON may hold other ends of lines
    if args.out and args.out.exists():
        text = read_text(args.out, "replace")      # it may end within a character
        whole = text[: text.rfind("\n") + 1]
        try:
            done = {json.loads(line)["line"] for line in whole.split("\n")[:-1]}
            ours = '{"line": '.startswith(text[len(whole) :][:9]) and args.out != args.batch.resolve()
        except (ValueError, TypeError, KeyError):
            ours = False
        if not ours:
            raise InputError(f"{args.out} was not written by --batch: name another file") from None
        if whole != text:
            write_whole(args.out, lambda path: path.write_text(whole, encoding="utf-8"))
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip() and number not in done]


def batch(assistant: Assistant, requests: list[tuple[int, str]], out: Path | None) -> None:
    """A line of JSON for every request, and an error in it where one cannot be answered: the others are."""
    failed, own_tools = 0, assistant.tools
    with open(out, "a", encoding="utf-8", errors="replace") if out and not RANK else contextlib.nullcontext(sys.stdout) as file:
        for i, (number, line) in enumerate(requests):
            assistant.clock = Clock()
            try:
                request = read_request(line, f"line {number}")
                messages, assistant.tools = assistant.read(request["messages"]), own_tools + request["tools"]
                check_question(messages)
                assistant.clock.lap("pictures")
                assistant.converse(messages)
                if assistant.ended == "interrupted":
                    raise KeyboardInterrupt
                reply = assistant.reply(messages)
            except Exception as error:      # whatever it is, the other requests are answered
                failed, reply = failed + 1, {"error": str(error) or type(error).__name__}
            print(json.dumps({"line": number, **reply}, ensure_ascii=False), file=file, flush=True)
            say(f"{i + 1} of {len(requests)} requests, {failed} with an error", redraw=i + 1 < len(requests))


def save_logits(model: ErnieVL, inputs: Inputs, path: Path) -> None:
    with torch.inference_mode():
        logits = model(inputs).float()
    tensors = {**inputs._asdict(), "grids": torch.tensor(inputs.grids, dtype=torch.long).view(-1, 3), "logits": logits}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda path: save_file(tensors, path))
    say(f"wrote {path}: " + ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()))


def in_a_sentence(error: Exception, args: argparse.Namespace) -> str:
    """What went wrong; where memory ran out, how much was asked for, if torch says so, and what of the options is left to try.
    Raises again what is a mistake of the program."""
    if isinstance(error, (InputError, OSError)):
        return f"error: {error}"
    if isinstance(error, RuntimeError) and "memory" not in str(error):
        raise error
    asked = re.search(r"allocate (?:(\d+) bytes|([\d.]+ \w+))", str(error))
    much = asked and (asked[2] or size(int(asked[1])))
    left = {"--max-pixels": args.media or args.prompt is None, "--quantize int4": args.quantize != "int4",
            "--dtype bfloat16": args.dtype == "float32", "a shorter prompt": True}
    return (f"error: there is not enough memory for this{f' ({much} more are needed)' if much else ''}: "
            f"try {' or '.join(option for option in left if left[option])}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        for stream in (sys.stdin, sys.stdout):
            if hasattr(stream, "reconfigure"):      # None where there is none
                stream.reconfigure(errors="replace")
        run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                 # whoever read the answer has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        say(in_a_sentence(error, args))
        return 2
    return 0


if __name__ == "__main__":
    code = main()
    if RANKS > 1 and code == 0:
        torch.distributed.destroy_process_group()
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # nothing is left to interrupt
    sys.exit(code)
