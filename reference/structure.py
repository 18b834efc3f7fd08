"""What the tests ask of the files of the project: that they are short, import what they may, run alone, and that the README
shows what happens."""
import ast
import graphlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable

NUMBERS = "lines", "branches per 100 lines of code", "characters of a line", "lines of a function", "of an average one"
BUDGETS = {  # what each file of the core may have of these; in a file of tests helpers and tables count, too
    "ernie_vl": (580, 8, 120, 40, 10), "load_weights": (420, 15, 120, 40, 10), "tokenizer": (440, 15, 120, 40, 10),
    "run": (300, 15, 120, 40, 10), "test_ernie_vl": (900, 15, 130, 40, 20),
}
README_LINES = 140
ARROWS = {"ernie_vl": set(), "load_weights": {"ernie_vl"}, "tokenizer": {"ernie_vl"},
          "run": {"ernie_vl", "load_weights", "tokenizer"},
          "test_ernie_vl": {"ernie_vl", "load_weights", "tokenizer", "run"}}      # what each file of the core imports
NEVER = re.compile(r"__class__ [=]|strict=Fals[e]|getattr\(cf[g]|[*]{2}kwarg[s]")


def read_sources(root: Path) -> dict[str, str]:
    """The project's Python files at the top and in extras/, by module name."""
    paths = [*root.glob("*.py"), *root.glob("extras/*.py")]
    return {".".join(path.relative_to(root).with_suffix("").parts): path.read_text(encoding="utf-8") for path in paths}


def figures(source: str) -> tuple[float, ...]:
    """The five NUMBERS of a file."""
    nodes, lines = list(ast.walk(ast.parse(source))), source.splitlines()
    documented = [node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    texts = [node.body[0] for node in documented if ast.get_docstring(node)]
    prose = {number for text in texts for number in range(text.lineno, text.end_lineno + 1)}
    code = [n for n, line in enumerate(lines, 1) if n not in prose and not re.match(r"\s*(#|$)", line)]
    branches = sum(isinstance(node, ast.If | ast.IfExp | ast.Try | ast.While) for node in nodes)
    lengths = [node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, ast.FunctionDef)]
    widest = max(map(len, lines))
    return len(lines), 100 * branches / len(code), widest, max(lengths), sum(lengths) / len(lengths)


def imported(source: str) -> set[str]:
    """Modules that a file imports, wherever in it; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return names


def finish_order(file: str, call: Callable) -> list[tuple[int, str]]:
    """(first line, name) of the functions of a file that a call runs, methods left out, in the order in which they
    first return or yield something."""
    finished, before = {}, sys.gettrace()

    def trace(frame, event, arg):
        code = frame.f_code
        if Path(code.co_filename) != Path(file) or code.co_name.startswith("<") or "self" in frame.f_locals:
            return None
        if event == "return":
            finished.setdefault((code.co_firstlineno, code.co_name))
        return trace
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return list(finished)


def check_files(root: Path) -> tuple[list[str], list[str]]:
    """(the figures of the core, a line a file; what is over its budget or imports what it must not, a line each)"""
    sources = read_sources(root)
    arrows = {name: imported(source) & sources.keys() for name, source in sources.items()}
    found, wrong = {name: figures(sources[name]) for name in BUDGETS}, []
    report = [f"{name:14s}" + ", ".join(f"{value:.4g} {what}" for value, what in zip(values, NUMBERS))
              + f"; imports {', '.join(sorted(arrows[name])) or 'none'}" for name, values in found.items()]
    for name, values in found.items():
        wrong += [f"{name}: {value:.4g} {what}, at most {most}"
                  for value, what, most in zip(values, NUMBERS, BUDGETS[name]) if value > most]
        wrong += [f"{name} imports {other}" for other in arrows[name] ^ ARROWS[name]]
        wrong += [f"{name}: {match}" for match in NEVER.findall(sources[name])]
    beyond = {name.split(".")[0] for name in imported(sources["ernie_vl"])} - {"torch", *sys.stdlib_module_names}
    lines = len((root / "README.md").read_text(encoding="utf-8").splitlines())
    wrong += [f"ernie_vl imports {name}" for name in beyond] + [f"README.md: {lines} lines"] * (lines > README_LINES)
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        wrong.append(f"a circle of imports: {error.args[1]}")
    return report, wrong


def readme_examples(root: Path, left_out: set[str]) -> list[tuple[list[str], str]]:
    """(arguments of run.py, the output that the README shows) of its commands about examples/, without those with a
    flag that is left out."""
    text = (root / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\$ .*\bpython run.py (.*examples/.*)\n((?:(?!\$|```).*\n)+)", text, re.M)
    return [(shlex.split(command), out) for command, out in shown if not left_out & {*shlex.split(command)}]


def readme_code(root: Path) -> list[str]:
    """The README's pieces of Python that need no extras."""
    return [code for code in re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.S)
            if "extras" not in code]


def run_core_alone(root: Path, folder: Path, calls: list[list[str]]) -> subprocess.CompletedProcess:
    """Runs run.py's main, in one process, with each of these arguments, in a folder that has the core's four files and
    nothing else, and prints what it returns."""
    for name in ("ernie_vl.py", "load_weights.py", "tokenizer.py", "run.py"):
        shutil.copy(root / name, folder)
    (folder / "calls.py").write_text("import json, run, sys\nfor args in json.loads(sys.argv[1]):\n    try:\n        "
                                     "print(run.main(args))\n    except SystemExit as end:\n        print(end)\n")
    return subprocess.run([sys.executable, "calls.py", json.dumps(calls)], cwd=folder, capture_output=True, text=True)
