"""--batch: a request a line, {"messages": [...], "tools": [...]}, and a line of JSON for each, with its number."""
import argparse
import contextlib
import json
import sys

from ernie_vl import require
from extras.messages import read_messages, read_request, read_text
from run import RANK, log, write_atomically


def open_requests(args: argparse.Namespace) -> list[tuple[int, str]]:
    """The requests of --batch that --out has no line for yet, with their line numbers. Raises InputError."""
    done = read_done(args) if args.out and args.out.exists() else set()
    lines = read_text(args.batch).split("\n")        # not splitlines: JSON may hold other ends of lines
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip() and number not in done]


def read_done(args: argparse.Namespace) -> set[int]:
    """The numbers of the requests that --out has lines for. An unfinished last line is dropped from it; a file that
    --batch did not write is refused."""
    text = read_text(args.out, "replace")      # it may end within a character
    whole, unfinished = text[: text.rfind("\n") + 1], text[text.rfind("\n") + 1 :]
    try:
        done = {json.loads(line)["line"] for line in whole.split("\n")[:-1]}
        ours = '{"line": '.startswith(unfinished[:9]) and args.out != args.batch.resolve()
    except (ValueError, TypeError, KeyError):
        ours = False
    require(ours, f"{args.out} was not written by --batch: name another file")
    if unfinished:
        write_atomically(args.out, lambda path: path.write_text(whole, encoding="utf-8"))
    return done


def batch(session, requests: list[tuple[int, str]]) -> None:
    """Writes a line of JSON for every request, and an error in it where one cannot be answered: the others are."""
    failed, out, own_tools = 0, session.args.out, session.tools
    to_file = out and not RANK
    with open(out, "a", encoding="utf-8", errors="replace") if to_file else contextlib.nullcontext(sys.stdout) as file:
        for i, (number, line) in enumerate(requests, 1):
            try:
                reply = answer(session, line, number, own_tools)
            except Exception as error:      # whatever it is, the other requests are answered
                failed, reply = failed + 1, {"error": str(error) or type(error).__name__}
            print(json.dumps({"line": number, **reply}, ensure_ascii=False), file=file, flush=True)
            log(f"{i} of {len(requests)} requests, {failed} with an error", redraw=i < len(requests))


def answer(session, line: str, number: int, own_tools: list[dict]) -> dict:
    session.restart_clock()
    request = read_request(line, f"line {number}", "messages")
    messages = read_messages(request["messages"], session.load_media)
    session.tools = own_tools + request["tools"]
    session.clock.lap("pictures")
    session.converse(messages)
    if session.ended == "interrupted":
        raise KeyboardInterrupt
    return session.reply(messages)
