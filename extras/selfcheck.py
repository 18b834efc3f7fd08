"""Vocabulary, chat template and settings of a checkpoint beside ours: the second half of `python -m extras.check`.
selfcheck.json holds conversations, and texts with the ids that they have in transformers' tests."""
import json
import os
import re
from pathlib import Path
from typing import Callable, Iterator

import run
from ernie_vl import PATCH, SPATIAL_MERGE, TEMPORAL_MERGE, Config, read_json, require
from extras.messages import plain_messages, read_messages
from extras.video import LEAST_FRAMES
from tokenizer import MEAN, STD, TEMPLATES, Media, Tokenizer, chat_template, pixel_budget, render

PIECES = 100_295      # of the vocabulary that all released checkpoints share
TAGS = "<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>"
MEDIA = {f"{kind}{part}_token_id": f"<|{kind}{part or '_placeholder'}|>".upper()      # key of config.json -> its token
         for kind in ("image", "video") for part in ("", "_start", "_end")}
OURS = {flag[2:].replace("-", "_"): options.get("default") for flag, *_, options, _ in run.CORE + run.EXTRAS} | {
    "do_sample": False, "patch_size": PATCH, "merge_size": SPATIAL_MERGE, "temporal_patch_size": TEMPORAL_MERGE,
    "temporal_conv_size": TEMPORAL_MERGE, "image_mean": MEAN.tolist(), "image_std": STD.tolist(),
    "rescale_factor": 1 / 255, "resample": 3, "min_frames": LEAST_FRAMES}      # 3 is bicubic


def self_check(folder: Path, cfg: Config) -> Iterator[str]:
    """Lines of the report. Raises InputError where the model could not be asked anything, or be shown an image."""
    yield from settings(folder, bool(cfg.vision))
    if not (folder / "tokenizer.model").is_file():
        yield "vocabulary  tokenizer.model is not here, so neither it nor the chat template is compared"
        return
    tokenizer, cases = Tokenizer(folder), read_json(Path(__file__).with_suffix(".json"))
    yield from template(tokenizer, cfg, cases["conversations"])
    yield from vocabulary(tokenizer, cfg, cases["encodings"])
    require_same_model(tokenizer, cfg)


# --------------------------------------------------------------------------------------------------- 1. vocabulary
def vocabulary(tokenizer: Tokenizer, cfg: Config, encodings: list) -> Iterator[str]:
    count, special, ends = len(tokenizer.pieces), tokenizer.special, ", ".join(map(str, sorted(tokenizer.stop)))
    ids = lambda names: ", ".join(f"{name} {special.get(name, 'none')}" for name in names)
    yield f"vocabulary  {count:,} pieces, {len(special):,} control tokens, ids up to " \
          f"{max(special.values(), default=0):,}, and {cfg.text.vocab_size:,} rows of the embedding"
    yield f"tags        {ids(TAGS)}; an answer ends at {ends}"
    if cfg.vision:
        yield f"media       {ids(MEDIA.values())}"
    if count != PIECES:
        yield f"encodings   not compared: the released vocabulary has {PIECES:,} pieces"
        return
    for text, expected in encodings:
        if special.keys() >= {*re.findall(r"<\|\w+\|>", text)}:      # text-only models have no image tokens
            yield f"encodings   {compare_ids(tokenizer, text, expected)}: {text!a:.70}"


def compare_ids(tokenizer: Tokenizer, text: str, expected: list[int]) -> str:
    ids = tokenizer.encode(text, control=True)
    at = len(os.path.commonprefix([ids, expected]))
    if ids != expected:
        return f"from token {at} ours {ids[at : at + 3]}, known {expected[at : at + 3]}"
    return "ok" if tokenizer.decode(ids, tuple(tokenizer.special)) == text else "decoded to another text"


def require_same_model(tokenizer: Tokenizer, cfg: Config) -> None:
    count, rows, special = len(tokenizer.pieces), cfg.text.vocab_size, tokenizer.special
    require(count <= rows, f"{count:,} pieces do not fit into {rows:,} rows: tokenizer.model is another model's")
    special = {MEDIA["video_token_id"]: special.get(MEDIA["image_token_id"]), **special}      # of released videos, too
    wrong = [f"{key} is {getattr(cfg, key)} in config.json, and {name} is {special.get(name, 'none')} in the vocabulary"
             for key, name in MEDIA.items() if getattr(cfg, key) != special.get(name)]
    require(not (cfg.vision and wrong), f"{''.join(wrong[:1])}: one of the two files is another model's")


# ------------------------------------------------------------------------------------------------ 2. chat template
def template(tokenizer: Tokenizer, cfg: Config, conversations: dict) -> Iterator[str]:
    ours = chat_template(tokenizer)
    kind = next(kind for kind, one in TEMPLATES.items() if one is ours)
    try:
        theirs = folder_template(tokenizer)
    except ImportError:
        yield f"template    {kind}, not compared with the folder's: pip install 'jinja2>=3.1.6' is needed for that"
    except Exception as error:      # whatever jinja2 says of what somebody else wrote
        yield f"template    {kind}, not compared with the folder's: {str(error)!a:.90}"
    else:
        yield f"template    {kind}, beside the folder's own"
        for name, asked in conversations.items():
            if (cfg.vision or "_url" not in str(asked)) and (ours.think_prefix or "think" not in asked):
                yield f"            {name:21s} {compare_prompts(tokenizer, theirs, **asked)}"


def folder_template(tokenizer: Tokenizer) -> Callable[..., str]:
    """Compiled as transformers does it. Raises ImportError without jinja2, or where its sandbox has known holes."""
    import jinja2.sandbox
    if [int(number) for number in re.findall(r"\d+", jinja2.__version__)] < [3, 1, 6]:
        raise ImportError
    file, text = tokenizer.folder / "chat_template.jinja", tokenizer.settings.get("chat_template")
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else text
    require(isinstance(text, str), "there is none")
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
    tokens = {key: token["content"] if isinstance(token, dict) else token      # older files have them as objects
              for key, token in tokenizer.settings.items() if key.endswith("_token")}
    return sandbox.from_string(text, tokens | {"raise_exception": lambda words: require(False, words)}).render


def compare_prompts(tokenizer: Tokenizer, theirs: Callable, messages: list[dict], tools: list = (), think=None,
                    add_generation_prompt: bool = True, **names) -> str:
    """"equal", or where the form of the messages that comes closest begins to differ. names: of thinking on or off, in
    the -PT checkpoints and in 28B-A3B-Thinking."""
    read = read_messages(messages, lambda kind, source: Media(kind, source, None, None, None, ""))
    parts = render(plain_messages(read, tools, tokenizer), chat_template(tokenizer), think, add_generation_prompt)
    asked = {"tools": tools or None, "add_generation_prompt": add_generation_prompt, **names}
    return max(compare("".join(parts), theirs, messages=form, **asked) for form in forms(messages))[1]


def compare(ours: str, theirs: Callable, **asked) -> tuple[int, str]:
    """(how far they are equal, what to say about it). The quotes begin a little before the first difference."""
    try:
        text = theirs(**asked)
    except Exception as error:      # a template is a program, and may refuse a form in any way
        return -1, f"fails: {(str(error) or repr(error))!a:.90}"
    # Released templates have a marker where their processors put the placeholder.
    text = re.sub(r"(?<=<\|)(\w+)@placeholder", lambda marker: f"{marker[1].upper()}_PLACEHOLDER", text)
    if text == ours:
        return len(ours) + 1, "equal"
    at = len(os.path.commonprefix([ours, text]))
    start = max(at - 8, 0)
    return at, f"from character {start}: ours {ours[start:]!a:.32}, theirs {text[start:]!a:.32}"


def forms(messages: list[dict]) -> Iterator[list[dict]]:
    """Templates differ in what they take: text as such or as an item, "image_url" or "image"."""
    as_items = lambda content: [{"type": "text", "text": content}] if isinstance(content, str) else content
    for form in messages, [{**message, "content": as_items(message["content"])} for message in messages]:
        yield from (form, json.loads(json.dumps(form).replace('_url"', '"')))


# ----------------------------------------------------------------------------------------------------- 3. settings
def settings(folder: Path, vision: bool) -> Iterator[str]:
    """What the files say, and what is used here, where that is known."""
    files = {"generation_config.json": OURS}
    for kind, name in [("image", "preprocessor_config.json"), ("video", "video_preprocessor_config.json")] * vision:
        least, most = pixel_budget(folder, kind)
        size = {"shortest_edge": least, "longest_edge": most}
        files[name] = OURS | {"size": size, "min_pixels": least, "max_pixels": most}
    for name, ours in files.items():
        theirs = read_json(folder / name, {})
        yield f"settings    {name}" + " is not here" * (not theirs)
        for key, value in theirs.items():
            yield f"            {key:21s} {rounded(value):.70}" + f" (here {rounded(ours.get(key))})" * (key in ours)


def rounded(value) -> str:
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.5g}", json.dumps(value))
