"""--chat: a conversation in the terminal, or one question a line from a pipe."""
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Callable

from ernie_vl import InputError, require
from extras.check import out_of_memory
from extras.messages import to_json
from extras.parallel import broadcast
from run import RANK, log, write_atomically

COMMANDS = "/image FILE, /video FILE, /reset, /save FILE, /quit"


def chat(session, messages: list[dict]) -> None:
    """Answers questions until the input ends; first the one that `messages` ends with, if it does."""
    with contextlib.suppress(ImportError):
        import readline     # noqa: F401     line editing and history, where the system has it
    log(f"Ask, or {COMMANDS}. Ctrl-C stops an answer.")
    talk = Chat(session, messages)
    step = talk.take_turn if messages and messages[-1]["role"] in ("user", "tool") else talk.read_and_obey
    while talk.attempt(step):
        step = talk.read_and_obey


class Chat:
    """A conversation that goes on line by line. Images and videos wait in `media` for the next answered question."""

    def __init__(self, session, messages: list[dict]):
        self.session, self.messages, self.media = session, messages, []
        self.system = [message for message in messages if message["role"] == "system"]

    def attempt(self, step: Callable[[], None]) -> bool:
        """Whether the chat goes on after a step. What goes wrong in one ends only this step."""
        try:
            step()
        except InputError as error:
            log(f"error: {error}")
        except (MemoryError, RuntimeError) as error:
            log(out_of_memory(error, self.session.args))
        except KeyboardInterrupt:
            log("(/quit or Ctrl-D leaves)")
        except EOFError:
            return False
        return True

    def read_and_obey(self) -> None:
        line = read_line("> ").strip()
        command, _, file = line.partition(" ")
        if not line.startswith("/"):
            return self.ask(line)
        commands = {"/image": self.attach, "/video": self.attach, "/reset": self.reset, "/save": self.save,
                    "/quit": self.quit}
        require(command in commands, f"{command} is no command; these are: {COMMANDS}")
        commands[command](command, os.path.expanduser(file.strip().strip("'\"")))

    def attach(self, command: str, file: str) -> None:
        require(file != "", f"{command} needs a file behind it")
        self.media.append(self.session.load_media(command.removeprefix("/"), file))

    def save(self, command: str, file: str) -> None:
        require(file != "", f"{command} needs a file behind it")
        text = json.dumps([to_json(message) for message in self.messages], ensure_ascii=False, indent=1)
        write_atomically(Path(file), lambda path: path.write_text(text + "\n", encoding="utf-8", errors="replace"))
        log(f"wrote {file}: --messages reads it, --chat goes on with it")

    def reset(self, *_) -> None:
        self.messages[:], self.media = self.system, []

    def quit(self, *_) -> None:
        raise EOFError

    def ask(self, line: str) -> None:
        if not line:
            return
        before = len(self.messages)
        self.messages.append({"role": "user", "content": [line, *self.media]})
        self.take_turn()
        if len(self.messages) > before:
            self.media = []

    def take_turn(self) -> None:
        """Answers the last message; if that fails, or is stopped before a word, the conversation is as before it."""
        before = len(self.messages) - 1
        try:
            while calls := self.answer():
                self.messages += [ask_for_result(call) for call in calls]
        except BaseException:
            del self.messages[before:]
            raise
        if self.session.ended == "interrupted" and not "".join(self.messages[-1]["content"]):
            del self.messages[before:]
        with contextlib.suppress(InputError, KeyboardInterrupt):      # if the context is full, the next turn reports it
            self.session.prefill_next_turn(self.messages)

    def answer(self) -> list[dict]:
        """Appends the reply, and returns its calls of tools whose results are still wanted."""
        session, printer = self.session, self.session.printer()
        session.restart_clock()
        session.converse(self.messages, printer.show)
        printer.end()
        session.report()
        reply = self.messages[-1]
        return reply["tool_calls"] if session.ended == "tool_calls" and not session.zoom_calls(reply) else []


def ask_for_result(call: dict) -> dict:
    result = read_line(f"result of {call['function']['name']}> ")
    return {"role": "tool", "tool_call_id": call["id"], "content": [result]}


def read_line(prompt: str) -> str:
    """A line that the person has typed, or that a pipe holds, on all ranks. Raises EOFError."""
    line = None
    if sys.stdin and not RANK:
        terminal = sys.stdin.isatty()
        if terminal and not sys.stdout.isatty():      # input() would write its prompt into the file that stdout is
            print(prompt, end="", file=sys.stderr, flush=True)
            prompt = ""
        with contextlib.suppress(EOFError):
            line = input(prompt if terminal else "")
    if (line := broadcast(line)) is None:
        log()
        raise EOFError
    return line
