"""Ask ERNIE-4.5-VL about pictures.

    python run.py --image photo.jpg
    python run.py --image before.jpg --image after.jpg --prompt "What changed?"
    python run.py --model ERNIE-4.5-VL-28B-A3B-PT --image page.png --prompt "Read the table." --think
    python run.py --image photo.jpg --save-logits logits.safetensors

The answer goes to stdout as it is produced, everything else to stderr. Exit code 2: something given cannot be used.
"""
import os
import signal

if __name__ == "__main__":      # Ctrl-C ends the program at once, also while the libraries are loading
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

TINY = Path(__file__).resolve().parent / "tiny"


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
    add("--image", metavar="FILE", action="append", default=[], help="a picture; give it again for more of them")
    add("--prompt", metavar="TEXT", help="the question (default with a picture: Describe this image.)")
    add("--system", metavar="TEXT", help="a system message before the question")
    add("--think", action=argparse.BooleanOptionalAction, help="reason before answering, or not (default: what the checkpoint "
        "was made for)")
    add("--max-pixels", metavar="N", type=at_least(28 * 28, int, ": one token takes 28 x 28 pixels"),
        help="resize pictures to at most N pixels: fewer tokens, faster, less detail")
    add = parser.add_argument_group("which model").add_argument
    add("--model", metavar="FOLDER", default=str(TINY), help="a checkpoint folder, or a hub id in the local Hugging Face cache "
        "(default: the bundled tiny/, which knows coloured shapes)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto takes cuda, then mps, then cpu")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto keeps what the checkpoint stores")
    add = parser.add_argument_group("how to answer").add_argument
    add("--max-new-tokens", metavar="N", type=at_least(1, int), default=1024, help="longest answer (default: %(default)s)")
    add("--temperature", metavar="X", type=at_least(0, float), default=0.0, help="0, the default, takes the likeliest token")
    add("--top-k", metavar="N", type=at_least(0, int), default=0, help="draw among the N likeliest tokens (default: all)")
    add("--top-p", metavar="X", type=share, default=1.0, help="draw among the likeliest tokens that sum to X (default: 1)")
    add("--repetition-penalty", metavar="X", type=at_least(0.01, float), default=1.0, help="above 1, repeats become less likely")
    add("--seed", metavar="N", type=at_least(0, int), help="the same seed gives the same answer (default: another each time)")
    add = parser.add_argument_group("what to print").add_argument
    add("--json", action="store_true", help="one JSON object: answer, token counts, seconds by stage")
    add("--save-logits", metavar="FILE", type=Path, help="do not answer: run the prompt once and write its inputs and the logits "
        "of every token in fp32, to check other implementations against")
    args = parser.parse_args(argv)
    if args.prompt is None and not args.image:
        parser.error("nothing to answer: give --image FILE, --prompt TEXT, or both")
    return args


# ------------------------------------------------------------------------------------------------ running one turn
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
        self.seconds[stage], self.last = now - self.last, now
        return self.seconds[stage]


def pick_device(asked: str) -> str:
    import torch
    from ernie_vl import InputError
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in there if there[name]) if asked == "auto" else asked
    if not there[device]:
        raise InputError(f"this machine or this build of torch has no {device} device: use --device cpu, or leave it out")
    return device


def check_output(path: Path) -> None:
    """Before minutes of work, not after them. Only an ordinary file may be replaced, never a device or a folder."""
    from ernie_vl import InputError
    if path.exists() and not path.is_file() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: name a file in a folder that exists and is yours")


def run(args: argparse.Namespace) -> None:
    import torch
    from load_weights import find_folder, load
    from tokenizer import Tokenizer, encode_chat

    if args.save_logits:
        args.save_logits = args.save_logits.resolve()
        check_output(args.save_logits)
    clock, device, folder = Clock(), pick_device(args.device), find_folder(args.model)
    tokenizer, names = Tokenizer(folder), iter(args.image)
    prompt = encode_chat(tokenizer, messages(args), args.think, args.max_pixels, seen=lambda image, size, tokens: say(
        f"{next(names)} {image.width} x {image.height} -> {size[0]} x {size[1]} -> {tokens:,} tokens"))
    clock.lap("pictures")
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    model = load(folder, device, dtype, lambda done, all: say(f"loading {folder.name}: {100 * done // all} %", redraw=True))
    say(f"{folder.name} loaded on {device} in {clock.lap('load'):.1f} s")
    if sum(p.numel() for p in model.parameters()) < 1e7:
        torch.set_num_threads(1)        # so small a model is faster when threads need not wait for one another
    inputs = model.prepare(*prompt)
    if args.save_logits:
        save_logits(model, inputs, args.save_logits)
    else:
        answer(model, tokenizer, inputs, clock, args)


def messages(args: argparse.Namespace) -> list[dict]:
    question = "Describe this image." if args.prompt is None else args.prompt
    content = [{"type": "text", "text": question}, *({"type": "image", "image": file} for file in args.image)]
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": content}]


def answer(model, tokenizer, inputs, clock: Clock, args: argparse.Namespace) -> None:
    """Prints the answer as it comes, or all of it in one JSON object. Ctrl-C ends it early, and what is there stands."""
    from ernie_vl import generate
    from tokenizer import Stream

    stream, text, tokens, ended = Stream(tokenizer, keep=("<think>", "</think>")), "", 0, "stop"
    most = min(args.max_new_tokens, model.cfg.text.max_position_embeddings - len(inputs.ids))
    at_once = signal.signal(signal.SIGINT, signal.default_int_handler)

    def show(piece: str) -> None:
        nonlocal text
        text += piece
        if not args.json:
            print(piece, end="", flush=True)

    try:
        for id in generate(model, inputs, most, tuple(tokenizer.stop), args.temperature, args.top_k, args.top_p,
                           args.repetition_penalty, args.seed, tokenizer.forbidden(model.cfg.text.vocab_size)):
            if not tokens:
                clock.lap("first_token")
            tokens += 1
            show(stream.push(id))
        ended = "length" if tokens == most else "stop"
    except KeyboardInterrupt:
        ended = "interrupted"
        raise
    finally:
        signal.signal(signal.SIGINT, at_once)
        show(stream.flush())
        clock.lap("other_tokens" if tokens else "first_token")
        report(text, tokens, ended, inputs, clock, args)


def report(text: str, tokens: int, ended: str, inputs, clock: Clock, args: argparse.Namespace) -> None:
    from ernie_vl import merged

    seconds, pictures = clock.seconds, sum(math.prod(merged(grid)) for grid in inputs.grids)
    if args.json:
        reply = {"answer": text, "finish_reason": ended, "prompt_tokens": len(inputs.ids), "picture_tokens": pictures,
                 "answer_tokens": tokens, "seconds": {stage: round(s, 4) for stage, s in seconds.items()}}
        print(json.dumps(reply, ensure_ascii=False), flush=True)
    else:
        print(flush=True)
    speed = f", then {(tokens - 1) / seconds['other_tokens']:.1f} tokens/s" if tokens > 1 else ""
    say(f"{len(inputs.ids):,} tokens read, first token after {seconds['first_token']:.2f} s{speed}; "
        f"{tokens:,} tokens in {sum(seconds.values()):.1f} s")


def save_logits(model, inputs, path: Path) -> None:
    """The file appears when it is complete; until then, and if that fails, whatever stood there stays."""
    import torch
    from ernie_vl import InputError
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with torch.inference_mode():
        logits = model(inputs).float()
    tensors = {**inputs._asdict(), "grids": torch.tensor(inputs.grids, dtype=torch.long).view(-1, 3), "logits": logits}
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as folder:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, Path(folder) / "logits")
            os.replace(Path(folder) / "logits", path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} could not be written ({error}): is there room on the disk?") from None
    say(f"wrote {path}: " + ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        from ernie_vl import InputError     # torch comes in here, so that --help and wrong options are answered at once
        if sys.stdout:
            sys.stdout.reconfigure(errors="replace")
        try:
            run(args)
        except InputError as error:
            say(f"error: {error}")
            return 2
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            say("error: there is not enough memory for this: try --max-pixels, --dtype bfloat16 or a shorter prompt")
            return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                 # whoever read the answer has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # nothing is left to interrupt
    sys.exit(code)
