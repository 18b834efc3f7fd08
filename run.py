"""Ask ERNIE-4.5-VL about images and videos.

    python run.py photo.jpg "What is this?"
    python run.py --model ERNIE-4.5-VL-28B-A3B-Thinking page.png "Read the small print." --zoom

The answer goes to stdout as it is produced, everything else to stderr. Exit code 2: something given cannot be used.
"""
import os
import signal
if __name__ == "__main__":      # Ctrl-C: while the libraries load the end at once, then the KeyboardInterrupt of `main`
    signal.signal(signal.SIGINT, lambda *at: signal.default_int_handler(*at) if "load" in globals() else os._exit(130))

import contextlib
import importlib
import re
import sys
import tempfile
import time
from argparse import (ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter)
from pathlib import Path
from typing import Callable, Iterator

HERE = Path(__file__).resolve().parent
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # as torchrun sets them
VIDEO = re.compile(r".*\.(mp4|m4v|mov|mkv|webm|avi|mpe?g|wmv|flv|ts|3gp)", re.I)
NAME = re.compile(rf"{VIDEO.pattern}|.*\.(jpe?g|png|webp|gif|bmp|tiff?|avif|heic)|\S*[/\\]\S*", re.I)


# ----------------------------------------------------------------------------------------------- the command line
def number(kind: type, least: float, default=None, most: float = 2**63 - 1, name: str = "") -> dict:
    name = name or f"a {'whole ' * (kind is int)}number of {least} or more"
    def check(text: str):
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        raise ArgumentTypeError(f"{text} is not {name}")
    return dict(metavar="N", type=check, default=default)


TEXT, FILE, ON = dict(metavar="TEXT"), dict(metavar="FILE", type=Path), dict(action="store_true")
MEDIA = dict(metavar="FILE", dest="media", action="append", default=[])
CORE = (  # flag, how argparse reads it, help
    ("--image", MEDIA | dict(type=lambda file: ("image", file)), "an image; give it again for more of them"),
    ("--prompt", TEXT, "the question (default with an image: Describe this image.)"),
    ("--system", TEXT, "a system message before the question"),
    ("--model", dict(metavar="FOLDER", default=str(HERE / "tiny")), "or a hub id in the local cache (default: tiny/)"),
    ("--device", dict(choices=("auto", "cpu", "cuda", "mps"), default="auto"), "auto takes cuda, then mps, then cpu"),
    ("--dtype", dict(choices=("auto", "float32", "bfloat16", "float64"), default="auto"), "auto keeps what is stored"),
    ("--think", dict(action=BooleanOptionalAction), "reason first or not (default: as it was trained)"),
    ("--show-thinking", ON, "print the reasoning too when the output is no terminal"),
    ("--max-pixels", number(int, 784, name="784 or more: a token is 28 x 28"), "resize images and frames to N pixels"),
    ("--max-new-tokens", number(int, 1, 1024), "longest answer, reasoning included (default: 1024)"),
    ("--temperature", number(float, 0, 0.0), "0, the default, is greedy"),
    ("--top-k", number(int, 0, 0), "draw among the N likeliest tokens (default: all)"),
    ("--top-p", number(float, 1e-99, 1.0, 1, "above 0 and up to 1"), "from the smallest set of probability N"),
    ("--repetition-penalty", number(float, 0.01, 1.0), "above 1, repeats become less likely"),
    ("--seed", number(int, 0), "the same seed gives the same answer (default: another each time)"),
    ("--save-logits", FILE, "do not answer: write inputs and all logits of the prompt, to check other code against"),
    ("--stages", ON, "and with them every stage before (reference/README.md)"),
)
EXTRAS = (  # flag, file in extras/, how argparse reads it, help
    ("--video", "video", MEDIA | dict(type=lambda file: ("video", file)), "an animated image, frames, or a video file"),
    ("--fps", "video", number(float, 0.001, 2.0), "frames of a video to look at, a second (default: 2)"),
    ("--max-frames", "video", number(int, 1, 180), "at most so many frames (default: 180)"),
    ("--chat", "chat", ON, "a conversation in the terminal"),
    ("--messages", "messages", FILE, "JSON list of messages in OpenAI's format, the last of which is answered"),
    ("--tools", "messages", FILE, "JSON list of tools in OpenAI's format that the model may call"),
    ("--json", "session", ON, "the reply as one JSON object, with boxes in pixels, token counts and seconds by stage"),
    ("--batch", "batch", FILE, 'one request a line, {"messages": [...]}, and one line of JSON for each'),
    ("--out", "batch", FILE, "where --batch writes (default: stdout); lines that are there are not done again"),
    ("--boxes", "boxes", FILE, "draw what the answer locates on the last image of the question"),
    ("--zoom", "boxes", ON, "let the model zoom into the last image, as the Thinking checkpoint has learned to"),
    ("--max-zooms", "boxes", number(int, 0, 4), "how often it may zoom (default: 4)"),
    ("--quantize", "quantize", dict(choices=("int8", "int4")), "round the weights: half or a third of the memory"),
    ("--compile", "compiled", ON, "compile the step that makes a token: for a GPU, where it is not measured yet"),
)
RUN_BY = dict.fromkeys(("chat", "messages", "session", "batch", "boxes"), "session")      # who runs a file's flags


def parse(argv: list[str]) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda text: parser.exit(2, f"error: {text} (python run.py --help lists the options)\n")
    parser.add_argument("words", nargs="*", metavar="WORD", help="image, video, or the question; - is stdin")
    group = parser.add_argument_group("capabilities of extras/ (what each does: extras/README.md)")
    for flag, *where, options, text in CORE + EXTRAS:
        (group if where else parser).add_argument(flag, **options, help=text)
    given = {flag: name for flag, name, *_ in EXTRAS if any(word.partition("=")[0] == flag for word in argv)}
    for flag in (flag for flag, name in given.items() if not has_extra(name)):
        parser.error(f"{flag} needs extras/{given[flag]}.py, which is not here")
    args = parser.parse_intermixed_args(argv)
    args.runner = next((RUN_BY[name] for name in given.values() if name in RUN_BY), None)
    flagged = len(args.media)
    for word in args.words:      # an image or a video where there is such a file, and otherwise the question
        if os.path.exists(word):
            args.media = [*args.media, ("video" if os.path.isdir(word) or VIDEO.fullmatch(word) else "image", word)]
        elif NAME.fullmatch(word):
            parser.error(f"{word} does not exist: give the path of a file (nothing is downloaded)")
        elif args.prompt is not None:
            parser.error(f"{word!r} is a second question: put quotes around the whole of it")
        else:
            args.prompt = word
    if 0 < flagged < len(args.media):
        parser.error("give all images and videos with their flags, or all without: their order counts")
    if args.prompt == "-" or not (args.media or args.chat or args.messages or args.batch or args.prompt is not None):
        readable = sys.stdin and WORLD_SIZE == 1 and (args.prompt == "-" or not sys.stdin.isatty())
        args.prompt = sys.stdin.read().strip() if readable else ""
        if not args.prompt:
            parser.error("nothing to answer: give --image FILE, --prompt TEXT (or - and a text on stdin), or both")
    return args


def has_extra(name: str) -> bool:
    return (HERE / "extras" / f"{name}.py").is_file()


if __name__ == "__main__":      # --help and wrong options are answered at once, not after the second that torch takes
    sys.modules["run"] = sys.modules["__main__"]      # the name by which extras import this file
    for stream in filter(None, (sys.stdin, sys.stdout)):
        stream.reconfigure(errors="replace")
    ARGS = parse(sys.argv[1:])

try:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from ernie_vl import ErnieVL, InputError, Inputs, KVCache, generate, pieces, read_json, require, sampler
    from tokenizer import ReplyParser, Tokenizer, encode_chat, load_image, short_name
    from load_weights import find_folder, open_checkpoint, load
except ModuleNotFoundError as missing:
    print(f"error: the package {missing.name} is not installed: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)


def extra(name: str, room: str = "extras"):
    """The module extras/NAME.py. Raises InputError where it, or one that it needs, is not there."""
    try:
        return importlib.import_module(f"{room}.{name}")
    except ModuleNotFoundError as missing:
        raise InputError(f"this needs {room}/{name}.py, but {missing.name.replace('.', '/')} is not here") from None


def log(line: str = "", redraw: bool = False) -> None:
    with contextlib.suppress(OSError, AttributeError):        # nobody reads stderr: the answer still counts
        terminal = sys.stderr.isatty()
        if terminal or not redraw:      # elsewhere a line that the next one shall be drawn over is left out
            print("\r\033[K" * terminal + line, end="\n" * (not redraw), file=sys.stderr, flush=True)


def report(prompt_tokens: int, tokens: int, first: float, others: float, total: float) -> None:
    speed = f", then {(tokens - 1) / others:.1f} tokens/s" if tokens > 1 else ""
    log(f"{prompt_tokens:,} tokens read, first token after {first:.2f} s{speed}; {tokens:,} tokens in {total:.1f} s")


class Printer:
    """Shows a reply as it comes: the answer plain, the reasoning dim in a terminal, elsewhere only when asked for."""

    def __init__(self, show_thinking: bool):
        terminal = sys.stdout is not None and sys.stdout.isatty()
        self.last, self.styles = None, {"content": "{}"}
        if terminal or show_thinking:
            self.styles["reasoning"] = {True: "\033[2m{}\033[0m", False: "{}"}[terminal]

    def show(self, kind: str, text: str) -> None:
        if kind in self.styles:
            last, self.last = self.last, kind      # before the text, in case of an interrupt
            if last and kind != last:
                print({"reasoning": "\n\n"}.get(last, "\n"), end="")
            print(self.styles[kind].format(text), end="", flush=True)

    def end(self) -> None:
        print(flush=True)
        self.last = None


def check_output(path: Path | None) -> Path | None:
    """Checked before minutes of work. Only an ordinary file may be replaced, never a device or a folder."""
    path = path and Path(os.path.realpath(path))      # unlike Path's own, os.path's functions raise nothing
    if path:
        writable = os.path.isdir(path.parent) and os.access(path.parent, os.W_OK)
        require(writable and (os.path.isfile(path) or not os.path.exists(path)),
                f"{path} cannot be written: name a file in a folder that exists and is yours")
    return path


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
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


def pick_device(asked: str) -> str:
    found = torch.cuda.is_available() * ["cuda"] + torch.backends.mps.is_available() * ["mps"] + ["cpu"]
    require(asked in ("auto", *found), f"this machine or this build of torch has no {asked} device: use --device cpu")
    return {"auto": found[0]}.get(asked, asked)


def load_model(args: Namespace, folder: Path, device: str) -> ErnieVL:
    """Uses extras/ without a flag for quantised folders and under torchrun; check.py and cpu.py if there."""
    start, dtype = time.perf_counter(), getattr(torch, args.dtype, None)      # "auto" is none of torch's
    quantized = read_json(folder / "config.json").get("quantization_config")
    checkpoint = extra("quantize").open_quantized(folder) if quantized else open_checkpoint(folder)
    stages = [stage() for wanted, stage in (
        (WORLD_SIZE > 1, lambda: extra("parallel").stage(RANK, WORLD_SIZE)),
        (args.quantize, lambda: extra("quantize").stage(args.quantize)),
        (has_extra("check"), lambda: extra("check").memory(checkpoint, device, dtype, log, args.compile)),
    ) if wanted]
    model = load(checkpoint, device, dtype, stages)
    if device == "cpu" and has_extra("cpu"):
        extra("cpu").tune_for_cpu(model, compiled=args.compile)
    log(f"{folder.name} loaded on {device} in {time.perf_counter() - start:.1f} s")
    return extra("compiled").compile_model(model, log) if args.compile else model


def question(args: Namespace, folder: Path) -> list[dict]:
    """The conversation that the command line asks for; without a question only its system message, if there is one."""
    loaders = {"image": lambda file: load_image(file, folder, args.max_pixels), "video":
               lambda file: extra("video").load_video(file, folder, args.max_pixels, args.fps, args.max_frames)}
    media = [loaders[kind](file) for kind, file in args.media]
    for one in media:
        log(f"{short_name(one.source)} {one.summary}")
    usual = "Describe this video." if {one.kind for one in media} == {"video"} else "Describe this image."
    user = [usual if args.prompt is None else args.prompt, *media] * (bool(media) or args.prompt is not None)
    messages = {"system": [args.system] * (args.system is not None), "user": user}
    return [{"role": role, "content": content} for role, content in messages.items() if content]


def make_sampler(args: Namespace, tokenizer: Tokenizer, model: ErnieVL, prompt_ids: list[int]) -> Callable:
    return sampler(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed, prompt_ids,
                   tokenizer.suppressed_ids(model.cfg.text.vocab_size))


def run(args: Namespace) -> None:
    start, device, folder = time.perf_counter(), pick_device(args.device), find_folder(args.model)
    if WORLD_SIZE > 1:
        device = extra("parallel").join(device, args)
    require(args.save_logits or not args.stages, "--stages needs --save-logits FILE, where it writes them")
    args.save_logits, tokenizer = check_output(args.save_logits), Tokenizer(folder)
    if args.runner:
        return extra(args.runner).run(args, tokenizer, device)
    prompt = encode_chat(tokenizer, question(args, folder), args.think)
    model = load_model(args, folder, device)
    inputs = model.prepare(*prompt)
    if args.save_logits:
        return (extra("stages", "reference").save if args.stages else save_logits)(model, inputs, args.save_logits)
    parser, printer = ReplyParser(tokenizer.begins_thinking(prompt.ids)), Printer(args.show_thinking)
    choose, times = make_sampler(args, tokenizer, model, prompt.ids), [time.perf_counter()]
    def timed_ids() -> Iterator[int]:
        for token_id in generate(model, inputs, choose, tuple(tokenizer.stop), args.max_new_tokens):
            times.append(time.perf_counter())
            yield token_id
    try:
        for kind, text in parser.follow(tokenizer, timed_ids()):
            printer.show(kind, text)
    finally:        # after Ctrl-C, too: the text so far stands
        for kind, text in parser.push("", final=True):
            printer.show(kind, text)
        printer.end()
        begin, first, last = times[0], *(times[1:2] or times), times[-1]
        report(len(prompt.ids), len(times) - 1, first - begin, last - first, time.perf_counter() - start)


def save_logits(model: ErnieVL, inputs: Inputs, path: Path) -> None:
    cache = [KVCache() for _ in model.layers]
    with torch.inference_mode():
        logits = torch.cat([model(piece, cache).float().cpu() for piece in pieces(inputs, model.cfg)])
    tensors = {**inputs._asdict(), "grids": torch.tensor(inputs.grids, dtype=torch.long).view(-1, 3), "logits": logits}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda unfinished: save_file(tensors, unfinished))
    log(f"wrote {path}: " + ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()))


def main(argv: list[str] = sys.argv[1:], args: Namespace | None = None) -> int:
    args = args or parse(argv)
    try:
        run(args)
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                 # whoever read the answer has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (InputError, OSError) as error:
        log(f"error: {error}")
    except (MemoryError, RuntimeError) as error:      # of memory, or a mistake of the program
        if not has_extra("check"):
            raise
        log(extra("check").out_of_memory(error, args))
    return 2


if __name__ == "__main__":
    sys.exit(main(args=ARGS))
