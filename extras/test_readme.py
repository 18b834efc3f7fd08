"""What the two READMEs say of extras/ is so."""
import re
import shlex

import pytest

import run
from extras.conftest import ROOT

TABLE = (ROOT / "extras" / "README.md").read_text(encoding="utf-8")
COMMANDS = [(command, output) for name in ("README.md", "extras/README.md") for command, output in re.findall(
    r"^\$ python run.py (.*examples/.*)\n((?:(?!\$|```).*\n)+)", (ROOT / name).read_text(encoding="utf-8"), re.M)]


def test_every_file_has_its_row_with_its_lines():
    """To ten lines: nobody has to count again after a small change."""
    rows = dict(re.findall(r"^\| .* \| `(\w+\.py)` \| (\d+) \|", TABLE, re.M))
    files = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in (ROOT / "extras").glob("[!_]*.py")
             if not file.name.startswith(("test_", "conftest"))}
    assert rows.keys() == files.keys()
    assert [name for name, lines in files.items() if abs(int(rows[name]) - lines) > 10] == []


def test_every_flag_stands_in_the_row_of_its_file():
    for flag, name, *_ in run.EXTRAS:
        assert re.search(rf"^\| .*{flag}\b.* \| `{name}.py`", TABLE, re.M), flag


@pytest.mark.parametrize("command, output", dict(COMMANDS).items())
def test_the_commands_show_what_happens(ask, monkeypatch, tmp_path, command, output):
    monkeypatch.chdir(ROOT)
    assert ask(*shlex.split(command.replace("box.png", str(tmp_path / "box.png"))))[:2] == (0, output)
    assert (tmp_path / "box.png").exists() == ("box.png" in command)


def test_the_python_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(re.search(r"```python\n(.*?)```", TABLE, re.S)[1], "README.md", "exec"), {})
    assert int(capsys.readouterr().out.split()[0]) < 7_600_000
