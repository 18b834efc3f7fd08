"""A file of requests."""
import json

from extras import batch
from extras.conftest import interrupt, run_out_of_memory

GOOD = {"messages": [{"role": "user", "content": "Q"}]}
MISSING = {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]}


def write_requests(tmp_path, *lines):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (tmp_path / "in.jsonl").write_text(text, encoding="utf-8")
    return tmp_path / "in.jsonl"


def test_a_batch_answers_every_line_and_goes_on_where_it_stopped(script, ask, tmp_path):
    lines = write_requests(tmp_path, GOOD, "{", "", MISSING, {"messages": "x"}, GOOD, {"tools": [{}], **GOOD}, GOOD)
    out = tmp_path / "out.jsonl"
    script("a", "b", "c")
    code, text, err = ask("--batch", lines, "--out", out)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0 and text == "" and [reply["line"] for reply in found] == [1, 2, 4, 5, 6, 7, 8]
    assert [reply.get("content") for reply in found] == ["a", None, None, None, "b", None, "c"]
    assert "4 with an error" in err.splitlines()[-1]
    assert "JSON" in found[1]["error"] and "x.png" in found[2]["error"]
    whole = out.read_bytes()
    within = whole[: whole.index(b'{"line": 6') + 20]
    for cut, redone in ((within, 2), (within + "\u4f60".encode()[:2], 2), (whole, 0)):      # also within a character
        out.write_bytes(cut)
        script(*"xyz"[:redone])
        assert ask("--batch", lines, "--out", out)[0] == 0
        assert [json.loads(line)["line"] for line in out.read_text().splitlines()] == [1, 2, 4, 5, 6, 7, 8]
    script("a", "b", "c")
    assert len(ask("--batch", lines)[1].splitlines()) == 7                 # to stdout


def test_requests_do_not_see_one_another(script, ask, tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    lines = write_requests(tmp_path, {"tools": [tool], **GOOD}, {"messages": [{"role": "user", "content": "Other"}]})
    prompts = script("a", "b")
    assert ask("--batch", lines)[0] == 0 and '"f"' in prompts[0] and "tool_list" not in prompts[1] and "Q" not in prompts[1]


def test_a_batch_destroys_nothing(ask, tmp_path):
    lines, notes, replies = write_requests(tmp_path, GOOD), tmp_path / "notes.txt", tmp_path / "replies.jsonl"
    notes.write_text("precious")
    replies.write_text('{"line": 1, "messages": [{"role": "user", "content": "Q"}]}\n')
    for given, out in ((lines, notes), (lines, lines), (replies, replies)):
        before = out.read_text()
        code, _, err = ask("--batch", given, "--out", out)
        assert code == 2 and "another file" in err and out.read_text() == before


def test_a_batch_takes_any_text(script, ask, tmp_path):
    """Characters that end lines elsewhere, and halves of characters."""
    broken = json.dumps(MISSING).replace("x.png", "\\ud800\u2028.png")
    lines, out = write_requests(tmp_path, '{"messages": [{"role": "user", "content": "a\u2028b"}]}', broken), tmp_path / "out"
    for turn in range(2):
        script("ok\u2028")
        assert ask("--batch", lines, "--out", out)[0] == 0
        found = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]
        assert [reply["line"] for reply in found] == [1, 2] and found[0]["content"] == "ok\u2028" and "read" in found[1]["error"]


def test_memory_that_runs_out_ends_one_request(script, ask, tmp_path):
    lines = write_requests(tmp_path, GOOD, GOOD)
    script(("", run_out_of_memory), "b")
    code, out, err = ask("--batch", lines)
    first, second = map(json.loads, out.splitlines())
    assert code == 0 and "memory" in first["error"] and second["content"] == "b"


def test_an_interrupt_ends_the_batch_without_a_line(script, ask, tmp_path):
    lines, out = write_requests(tmp_path, GOOD, GOOD), tmp_path / "out"
    script("a", ("b", interrupt))
    assert ask("--batch", lines, "--out", out)[0] == 130
    assert [json.loads(line)["content"] for line in out.read_text().splitlines()] == ["a"]


def test_only_the_first_rank_writes(script, ask, tmp_path, monkeypatch):
    lines, out = write_requests(tmp_path, GOOD), tmp_path / "out"
    monkeypatch.setattr(batch, "RANK", 1)
    script("a")
    assert ask("--batch", lines, "--out", out)[0] == 0 and not out.exists()
