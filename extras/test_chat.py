"""Conversations in the terminal."""
import copy
import io
import json
import os
import subprocess
import sys

import pytest
import torch

from extras import chat as chat_module
from extras import session
from extras.conftest import EXAMPLE, ROOT, TINY, interrupt, run_out_of_memory
from extras.test_session import CALLED, WEATHER, ZOOM_CALL, distance
from tokenizer import Tokenizer

BEGIN, END, EMPTY = "<|begin_of_sentence|>", "<|end_of_sentence|>", "<think>\n\n</think>\n\n"
STAR = str(ROOT / "examples" / "star.jpg")


@pytest.fixture
def chat(ask, monkeypatch):
    """Runs --chat with lines that a person types: (exit code, stdout, stderr)."""
    def chat(*lines: str, options: tuple = ()) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return ask("--chat", *options)
    return chat


def test_a_chat_is_the_conversation_that_messages_would_be(ask, chat, monkeypatch, tmp_path):
    """An image in each turn. The cache changes neither logits nor answers, and a turn computes its own tokens alone."""
    seen, saved = [], tmp_path / "talk.json"
    real, loaded, models = session.PrefixCache.reuse, session.load_model, []

    def load_in_double(*given):      # rounding would hide a small mistake
        models.append(loaded(*given).double())
        return models[-1]

    @torch.inference_mode()
    def watched(cache, inputs, cfg):
        rest = real(cache, inputs, cfg)
        alone = models[0](rest, copy.deepcopy(cache.layers))[-1:]
        seen.append((inputs.ids.tolist(), len(inputs.ids) - len(rest.ids), distance(alone, models[0](inputs)[-1:])))
        return rest
    monkeypatch.setattr(session, "load_model", load_in_double)
    monkeypatch.setattr(session.PrefixCache, "reuse", watched)
    code, out, err = chat("What is in this picture?", f"/image {STAR}", "Describe this image.", f"/save {saved}", "/quit",
                          options=("--image", EXAMPLE, "--prompt", "Describe this image."))
    assert code == 0 and len(out.splitlines()) == 3 and "error" not in err
    asked, history = seen[0::2], seen[1::2]
    assert len(asked) == len(history) == 3 and max(difference for *_, difference in seen) < 1e-5
    for (ids, done, _), (before, *_) in zip(asked[1:], history):
        assert ids[: len(before)] == before and done == len(before)        # only the new turn is computed
    again = json.loads(saved.read_text())
    assert [message["role"] for message in again] == ["user", "assistant"] * 3
    assert again[4]["content"][1] == {"type": "image", "image": STAR}
    (tmp_path / "again.json").write_text(json.dumps(again[:-1]))
    monkeypatch.undo()
    assert ask("--messages", tmp_path / "again.json")[:2] == (0, out.splitlines()[-1] + "\n")


def test_chat_commands(script, chat):
    prompts = script("one", "two", "three")
    lines = ("first", "/image no.png", "/image", "/frobnicate", f"/image {EXAMPLE}", "second", f"/image {EXAMPLE}", "/reset",
             "third", "/save /no/such/x", f"/save {'a' * 300}", "/quit", "never")
    code, out, err = chat(*lines, options=("--system", "Be brief."))
    assert (code, out) == (0, "one\ntwo\nthree\n") and len(prompts) == 3
    assert prompts[1].startswith(f"{BEGIN}Be brief.\nUser: first\nAssistant: one{END}User: secondPicture 1:<|IMAGE_START|>")
    assert prompts[2] == f"{BEGIN}Be brief.\nUser: third\nAssistant: {EMPTY}"      # the image that waited is gone, too
    found = [line for line in err.splitlines() if line.startswith("error: ")]
    for words, line in zip(("no.png", "/image", "/frobnicate", "written", "written"), found, strict=True):
        assert words in line


def test_the_person_answers_for_the_tools(script, chat, write_json, tmp_path):
    tools, saved = ("--tools", write_json("t.json", [WEATHER])), tmp_path / "talk.json"
    prompts = script(CALLED, "Sunny.")
    code, out, err = chat("Weather?", "sun", f"/save {saved}", options=tools)
    assert code == 0 and out.endswith("\nSunny.\n") and "<tool_output>\nsun\n" in prompts[1]
    _, reply, result, _ = json.loads(saved.read_text())
    assert result == {"role": "tool", "content": "sun", "tool_call_id": reply["tool_calls"][0]["id"]}
    prompts = script(CALLED)
    assert chat("Weather?", options=tools)[0] == 0 and len(prompts) == 1         # the input ends


def test_what_is_no_open_call_asks_for_no_result(script, chat):
    """An answer that was cut off behind a call; a zoom too many."""
    limit = len(Tokenizer(TINY).encode(CALLED, control=True)) + 1
    for text, options in ((CALLED + "And", ("--max-new-tokens", limit)),
                          (ZOOM_CALL % "[0, 0, 5, 5]", ("--zoom", "--max-zooms", 0))):
        prompts = script(text, text, "ok", "ok")
        assert chat("q1", "q2", options=options)[0] == 0
        assert "User: q2\n" in prompts[-1] and "<tool_output>\nq2" not in prompts[-1]


def test_every_turn_has_its_own_seconds(script, chat, monkeypatch):
    reports, real = [], session.Session.report
    monkeypatch.setattr(session.Session, "report", lambda talk: real(talk) or reports.append(talk.clock.seconds))
    script("one", "two")
    assert chat("q1", "q2")[0] == 0 and [set(seconds) for seconds in reports] == [{"first_token", "other_tokens"}] * 2
    assert reports[0] is not reports[1]


def test_ctrl_c_stops_an_answer_and_not_the_chat(script, chat):
    """What was said before it stands."""
    prompts = script(("Half an", interrupt), "Whole.")
    assert chat("q1", "q2")[:2] == (0, "Half an\nWhole.\n")
    assert prompts[1] == f"{BEGIN}User: q1\nAssistant: Half an{END}User: q2\nAssistant: {EMPTY}"


def test_ctrl_c_at_the_prompt_leaves_nothing(script, chat, monkeypatch):
    lines = iter([KeyboardInterrupt, "q1", EOFError])

    def typed(prompt):
        if isinstance(line := next(lines), str):
            return line
        raise line
    monkeypatch.setattr("builtins.input", typed)
    script("one")
    code, out, err = chat()
    assert (code, out) == (0, "one\n") and "/quit" in err.splitlines()[3]


@pytest.mark.parametrize("stop", [interrupt, run_out_of_memory])
def test_a_question_without_an_answer_is_forgotten_and_its_image_waits(script, chat, stop):
    prompts = script(("", stop), "seen", "and again")
    code, out, err = chat(f"/image {EXAMPLE}", "q1", "q2", "q3")
    assert code == 0 and out.endswith("seen\nand again\n") and ("enough memory" in err) == (stop is run_out_of_memory)
    assert prompts[1].startswith(f"{BEGIN}User: q2Picture 1:<") and "q1" not in prompts[1]
    assert prompts[2].count("Picture") == 1 and prompts[2].endswith(f"User: q3\nAssistant: {EMPTY}")


def test_a_result_that_fails_takes_the_whole_turn_back(script, chat, write_json):
    prompts = script(CALLED, ("", run_out_of_memory), "ok")
    assert chat("Weather?", "sun", "q2", options=("--tools", write_json("t.json", [WEATHER])))[0] == 0
    assert "sun" in prompts[1] and "Weather?" not in prompts[2] and "q2" in prompts[2]


def test_only_the_first_rank_reads_lines(monkeypatch):
    monkeypatch.setattr(chat_module, "RANK", 1)
    monkeypatch.setattr(chat_module, "broadcast", lambda line: "theirs" if line is None else "mine")
    assert chat_module.read_line("> ") == "theirs"


def test_a_line_that_is_no_utf8_ends_no_chat():
    out = subprocess.run([sys.executable, "run.py", "--chat"], cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
                         input=b"caf\xe9\n/reset\nHello!\n", capture_output=True)
    assert out.returncode == 0 and out.stdout.splitlines()[-1] == b"Hello! Show me a picture."
