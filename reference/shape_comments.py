"""Shape comments, executed: a trace function compares `# (T, D)` in ernie_vl.py with the live tensors."""
import ast
import re
import sys

from torch import Tensor

from ernie_vl import PATCH, Config, ErnieVL
from mistakes import FILE, like

SHAPE = r"\([^()]*,[^()]*\)"                 # (T, D) or (T,)
SHAPES = rf"{SHAPE}(?:,? (?:or )?{SHAPE})*"  # several tensors, or other shapes of one
COMMENT = re.compile(rf"#\s*({SHAPES})?\s*(?:->\s*({SHAPES}))?")
ALSO_KEYS = {"rotate_pairs": "H"}            # it turns queries, (T, H, d), and keys, (T, G, d)


class ShapeComments:
    """A trace function that compares `x = ...  # (T, D)`, `return ...  # (T, V)` and `def f(x):  # (T, D) -> (T, K)`
    with the tensors of a run. A letter that the config gives has its value everywhere; any other gets its value where
    it first stands in a call. What is found: `checked`, the lines that were compared, and `lies`, a sentence each."""

    def __init__(self, source: str, cfg: Config):
        self.letters, self.vit_letters = config_letters(cfg)
        self.functions, self.statements, self.checked, self.lies = {}, {}, set(), []
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                self.read_comment(self.functions, node, lines[node.lineno - 1 : node.body[0].lineno - 1])
            if isinstance(node, ast.Assign | ast.Return):
                self.read_comment(self.statements, node, lines[node.lineno - 1 : node.end_lineno])

    def read_comment(self, found: dict, node: ast.AST, lines: list[str]) -> None:
        """found[first line] = (shapes before the arrow, shapes behind it, what the statement assigns)"""
        matches = [match.groups() for match in map(COMMENT.search, lines) if match and any(match.groups())]
        if matches:
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            parts = target.elts if isinstance(target, ast.Tuple) else [target] * (target is not None)
            found[node.lineno] = *matches[-1], [ast.unparse(part) for part in parts], node.end_lineno

    def commented(self) -> set[int]:
        return {*self.functions, *self.statements}

    def __call__(self, frame, event, arg):
        code = frame.f_code
        if code.co_filename != FILE or code.co_name.startswith("<"):      # comprehensions and lambdas
            return None
        letters = self.letters | (self.vit_letters if in_vit(frame) else {})
        letters.pop(ALSO_KEYS.get(code.co_name), None)
        takes, gives, *_ = self.functions.get(code.co_firstlineno, (None, None))
        arguments = [frame.f_locals[name] for name in code.co_varnames[: code.co_argcount]]
        self.compare(code.co_firstlineno, takes, arguments, letters, frame)
        running = 0                                                       # the statement that runs, by its first line

        def step(frame, event, arg):
            nonlocal running
            end = self.statements[running][3] if running in self.statements else running
            if event == "return" or not running <= frame.f_lineno <= end:
                self.finish(running, frame, arg if event == "return" else None, letters)
                running = frame.f_lineno
            if event == "return":
                self.compare(code.co_firstlineno, gives, values_of(arg), letters, frame)
            return step
        return step

    def finish(self, line: int, frame, returned, letters: dict) -> None:
        """Compares what the statement that begins at `line` has assigned or returned."""
        shapes, _, targets, _ = self.statements.get(line, (None,) * 4)
        if shapes:
            values = [eval(target, frame.f_globals, frame.f_locals) for target in targets]
            self.compare(line, shapes, values or values_of(returned), letters, frame)

    def compare(self, line: int, shapes: str | None, values: list, letters: dict, frame) -> None:
        parts = [part for value in values for part in (value if isinstance(value, tuple | list) else [value])]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if not shapes or not tensors:
            return
        self.checked.add(line)
        known = local_sizes(frame) | letters
        for alternative in re.split(r",? or ", shapes):
            learned = dict(known)
            if all(fits(shape, tensor, learned) for shape, tensor in zip(re.findall(SHAPE, alternative), tensors)):
                letters |= {name: size for name, size in learned.items() if name not in known}
                return
        self.lies.append(f"line {line}: {shapes} is {[tuple(tensor.shape) for tensor in tensors]}")


def config_letters(cfg: Config) -> tuple[dict, dict]:
    """Sizes by their letters, and those that mean something else inside the ViT."""
    text, vision = cfg.text, cfg.vision
    letters = dict(V=text.vocab_size, D=text.hidden_size, H=text.num_attention_heads, G=text.num_key_value_heads,
                   d=text.head_dim, E=text.moe_num_experts, K=text.moe_k, C=vision.hidden_size, P=3 * PATCH**2)
    return letters, dict(H=vision.num_heads, d=vision.hidden_size // vision.num_heads)


def in_vit(frame) -> bool:
    """Whether a call is one of the ViT's own methods, or was made by one."""
    while frame and frame.f_code.co_filename == FILE:
        if "self" in frame.f_locals:
            return type(frame.f_locals["self"]).__name__.startswith("Vision")
        frame = frame.f_back
    return False


def local_sizes(frame) -> dict[str, int]:
    """Whole numbers among the local variables, and t, h, w of a local `grid`."""
    grid = frame.f_locals.get("grid")
    sizes = dict(zip("thw", grid)) if isinstance(grid, tuple) else {}
    return sizes | {name: value for name, value in frame.f_locals.items() if type(value) is int}


def values_of(returned) -> list:
    return list(returned) if isinstance(returned, tuple) else [returned]


def fits(shape: str, tensor: Tensor, sizes: dict) -> bool:
    """Whether (T, d/2) is the shape of the tensor. A name without a size gets the one that is found."""
    dims = [dim.strip() for dim in shape[1:-1].split(",") if dim.strip()]
    if len(dims) != tensor.ndim:
        return False
    return all(size_of(dim, found, sizes) == found for dim, found in zip(dims, tensor.shape))


def size_of(dim: str, found: int, sizes: dict) -> float:
    if dim.isidentifier():
        return sizes.setdefault(dim, found)
    if not sizes.keys() >= set(re.findall(r"[A-Za-z]\w*", dim)):      # h*w where frames of several sizes come together
        return found
    return eval(re.sub(r"(\d)([A-Za-z])", r"\1*\2", dim), {"__builtins__": {}}, sizes)      # 4C is 4*C


def check_shape_comments(model: ErnieVL, source: str, ids: list[int], patches: Tensor, grids: list) -> ShapeComments:
    """Runs a copy of ernie_vl.py on a prompt, from `prepare` to the third token drawn and to a greedy one."""
    edited, comments, before = like(model, source), ShapeComments(source, model.cfg), sys.gettrace()
    module = sys.modules[type(edited).__module__]
    sys.settrace(comments)
    try:
        choose = module.sampler(temperature=1.0, repetition_penalty=1.2, seed=0, seen=ids)
        list(module.generate(edited, edited.prepare(ids, patches, grids), choose, (), 3))
        list(module.generate(edited, edited.prepare(ids, patches, grids), max_new_tokens=1))
    finally:
        sys.settrace(before)
    return comments


LIES = {  # a comment that is true, and what must not pass in its place
    "# (T, E)": "# (T, K)", "# (N/4, 4C)": "# (N/2, 4C)", "# -> (h*w, 2)": "# -> (2, h*w)",
    "# (T, V), or (1, V)": "# (V, T)",
    "# (2, G, T, d) -> (2, G, S, d)": "# (2, G, T, d) -> (2, G, T, d)",
    "# (T, D) -> (T, K), (T, K)": "# (T, D) -> (T, K), (T, E)",
}
