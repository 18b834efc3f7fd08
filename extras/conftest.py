"""What tests of the extras share: the command line in this process, and a model that says what it is told to."""
import json
from pathlib import Path

import pytest
import torch

import run
from extras import session
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY, EXAMPLE = ROOT / "tiny", str(ROOT / "examples" / "shapes.png")

torch.set_num_threads(1)      # the bundled model is 30 times slower when two threads wait for each other


@pytest.fixture
def ask(capsys):
    """Runs a command line: (exit code, stdout, stderr)."""
    def ask(*args) -> tuple[int, str, str]:
        try:
            code = run.main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return ask


@pytest.fixture
def write_json(tmp_path):
    def write(name: str, value) -> str:
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return str(tmp_path / name)
    return write


@pytest.fixture
def script(monkeypatch):
    """script(text, ...) lets the model choose the tokens of these texts, one text an answer, whatever its logits say,
    and returns the list of prompts that it is asked from then on. A text that is a pair ends with a call of its second
    part, which may raise what it likes."""
    def play(*texts) -> list[str]:
        tokenizer = Tokenizer(TINY)
        stop = lambda: max(tokenizer.stop)
        prompts, pairs = [], iter([text if isinstance(text, tuple) else (text, stop) for text in texts])

        def make_sampler(args, theirs, model, prompt_ids):
            prompts.append(tokenizer.decode(prompt_ids, tuple(tokenizer.special)))
            text, end = next(pairs)
            ids = iter(tokenizer.encode(text, control=True))
            return lambda logits: next(ids, None) or end()
        monkeypatch.setattr(session, "make_sampler", make_sampler)
        return prompts
    return play


def interrupt():
    raise KeyboardInterrupt


def run_out_of_memory():
    torch.empty(10**13)
