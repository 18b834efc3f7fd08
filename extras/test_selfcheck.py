"""Vocabulary, chat template and settings of a folder beside ours: what is right is called right, and what is wrong is shown.

The encodings are compared with the released vocabulary where ERNIE_VOCABULARY names a folder with its tokenizer.model."""
import json
import os
import re
import shutil
import sys
from pathlib import Path

import jinja2
import pytest

from ernie_vl import InputError, read_json
from extras import selfcheck
from extras.conftest import TINY
from extras.selfcheck import compare_ids, require_same_model, settings, vocabulary
from extras.test_check import run_check                                                       # noqa: F401
from load_weights import build_model
from tokenizer import Tokenizer

CASES = read_json(Path(selfcheck.__file__).with_suffix(".json"))
TEMPLATE = """{%- if not add_generation_prompt is defined -%}
    {%- set add_generation_prompt = true -%}
{%- endif -%}
{%- set counts = namespace(image=0, video=0) -%}
{%- macro write(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for item in content -%}
            {%- if item["type"] == "text" -%}
                {{- item["text"] -}}
            {%- elif item["type"] in ["image", "image_url"] -%}
                {%- set counts.image = counts.image + 1 -%}
                {{- "SPACEPicture " ~ counts.image ~ ":<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>" -}}
            {%- elif item["type"] in ["video", "video_url"] -%}
                {%- set counts.video = counts.video + 1 -%}
                {{- "SPACEVideo " ~ counts.video ~ ":<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>" -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set tool_list = "\\n<tool_list>\\n" + tools|tojson + "\\n</tool_list>\\n" if tools else "" -%}
{{- cls_token -}}
{%- if messages[0]["role"] != "system" and (tools or "SYSTEM") -%}
    {{- "SYSTEM" + tool_list + "\\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message["role"] == "system" -%}
        {{- write(message["content"]) + tool_list + "\\n" -}}
    {%- elif message["role"] == "user" -%}
        {{- "User: " + write(message["content"]) -}}
    {%- elif message["role"] == "tool" -%}
        {{- "User: <tool_output>\\n" + write(message["content"]) + "\\n</tool_output>\\n" -}}
    {%- elif message["role"] == "assistant" -%}
        {{- "\\nAssistant: " -}}
        {%- if message["reasoning_content"] -%}
            {{- "OPEN\\n" + message["reasoning_content"] + "\\n</think>CLOSED" -}}
        {%- endif -%}
        {{- write(message["content"]) -}}
        {%- for call in message["tool_calls"] -%}
            {{- "<tool_call>\\n" + call["function"]|tojson + "\\n</tool_call>\\n" -}}
        {%- endfor -%}
        {{- sep_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "\\nAssistant: " -}}
    THINK
{%- endif -%}
"""
PT = {"SPACE": "", "SYSTEM": "", "OPEN": "<think>", "CLOSED": "\\n", "THINK":
      '{{- "<think>" if enable_thinking is defined and enable_thinking else "<think>\\n\\n</think>\\n\\n" -}}'}
THINKING = {"SPACE": " ", "OPEN": "\\n<think>", "CLOSED": "\\n\\n",
            "SYSTEM": "You are a multimodal AI assistant called ERNIE developed by Baidu based on the PaddlePaddle framework.",
            "THINK": '{{- "\\n<think>\\n" + ("" if not options or options.thinking_mode == "open" else "\\n</think>\\n\\n") -}}'}
TEXT = """{{- cls_token -}}
{%- for message in messages -%}
    {%- if message["role"] == "user" -%}
        {{- "User: " + message["content"] + "\\n" -}}
    {%- elif message["role"] == "assistant" -%}
        {{- "Assistant: " + message["content"] + sep_token -}}
    {%- elif message["role"] == "system" -%}
        {{- message["content"] + "\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "Assistant: " -}}
{%- endif -%}
"""


def written(style: dict, *change: str) -> str:
    text = TEMPLATE
    for name, words in style.items():
        text = text.replace(name, words)
    assert not change or change[0] in text
    return text.replace(*change) if change else text


@pytest.fixture
def folder(tmp_path):
    """tiny/ with other or changed files beside its weights: a str, or values that are put into a JSON file."""
    def folder(**files) -> Path:
        shutil.copytree(TINY, tmp_path / "x", ignore=shutil.ignore_patterns("*.py", "*.png", "__pycache__"))
        for name, value in files.items():
            file = tmp_path / "x" / (name + (".jinja" if name == "chat_template" else ".json"))
            text = value if isinstance(value, str) else json.dumps(read_json(file, {}) | value)
            file.write_text(text, encoding="utf-8")
        return tmp_path / "x"
    return folder


def config_of(path: Path):
    return build_model(read_json(path / "config.json")).cfg


TOKENS = {"cls_token": "<|begin_of_sentence|>", "sep_token": "<|end_of_sentence|>", "add_bos_token": False}


def conversations(path: Path) -> dict[str, str]:
    """Conversation -> what is said of it."""
    lines = list(selfcheck.template(Tokenizer(path), config_of(path), CASES["conversations"]))
    return {"": lines[0]} | {line[12:34].strip(): line[34:] for line in lines[1:]}


# ------------------------------------------------------------------------------------------------ chat template
@pytest.mark.parametrize("style, kind", [(PT, "instruct"), (THINKING, "thinking")])
def test_a_template_that_writes_what_we_write_is_equal(folder, style, kind):
    said = conversations(folder(chat_template=written(style), tokenizer_config=TOKENS))
    assert f"{kind}, beside" in said.pop("")
    assert said == dict.fromkeys(CASES["conversations"], "equal")


def test_a_template_may_stand_in_the_tokenizer_config(folder):
    """And its tokens as objects."""
    tokens = TOKENS | {"cls_token": {"__type": "AddedToken", "content": "<|begin_of_sentence|>"}}
    said = conversations(folder(tokenizer_config=tokens | {"chat_template": written(PT)}))
    assert "instruct, beside" in said.pop("") and {*said.values()} == {"equal"}


@pytest.mark.parametrize("style, change, wrong", [
    (PT, ('"<think>" if', '"<think>\\n" if'), ["thinking on"]),
    (PT, ('" ~ counts.image ~ ":', ':'), ["image", "image after text", "two images", "images in two turns", "video and image"]),
    (PT, ("counts.image + 1", "1"), ["two images", "images in two turns"]),
    (PT, ("<|video@placeholder|>", "<|IMAGE_PLACEHOLDER|>"), ["video", "video and image"]),
    (PT, ("{{- sep_token", '{{- "<|end_of_sentence |>"'), ["two turns", "images in two turns", "reasoning in history",
                                                          "call and result"]),
    (PT, ("+ tool_list", ""), ["tools", "system and tools", "call and result"]),
    (PT, ("<tool_output>\\n", "\\n<tool_output>\\n"), ["call and result"]),
    (PT, ('"\\n</think>\\n"', '"</think>\\n"'), ["reasoning in history"]),
    (PT, ("{%- if add_generation_prompt -%}", "{%- if true -%}"), ["no generation prompt"]),
    (PT, ('write(message["content"]) + tool_list + "\\n"', '"System: " + write(message["content"]) + tool_list + "\\n"'),
     ["system message", "system and tools"]),
    (THINKING, ('== "open"', '!= "close" or true'), ["thinking off"]),
    (THINKING, ('" Picture', '"Picture'), ["image", "image after text", "two images", "images in two turns", "video and image"]),
])
def test_what_a_template_writes_otherwise_is_quoted(folder, style, change, wrong):
    said = conversations(folder(chat_template=written(style, *change), tokenizer_config=TOKENS))
    said.pop("")
    assert [name for name, words in said.items() if words != "equal"] == wrong
    for words in (said[name] for name in wrong):
        assert re.match(r"from character \d+: ours '.*, theirs '", words) and len(words) <= 100 and words.isascii()


def test_the_quotes_show_the_first_difference(folder):
    text = written(PT, '"<think>" if', '"<think>\\n" if')
    words = conversations(folder(chat_template=text, tokenizer_config=TOKENS))["thinking on"]
    assert words == r"from character 40: ours ' <think>', theirs ' <think>\n'"


def test_a_template_of_plain_text_does_for_a_model_of_text(folder, monkeypatch):
    """It takes no items and has neither images nor tools nor reasoning."""
    monkeypatch.setattr(selfcheck, "chat_template", lambda tokenizer: selfcheck.TEMPLATES["text"])
    path = folder(chat_template=TEXT, tokenizer_config=TOKENS)
    cfg = config_of(path)
    said = [line.split(maxsplit=2) for line in selfcheck.template(
        Tokenizer(path), type(cfg)(cfg.text, None, *[-1] * 6), CASES["conversations"])]
    assert said[0][1] == "text," and not any("image" in line or "thinking" in line for line in said[1:])
    assert [line[0] for line in said if line[-1] == "equal"] == ["one", "two", "system"]
    assert said[-1][:2] == ["no", "generation"]


@pytest.mark.parametrize("text, words", [
    ('{{ raise_exception("Roles must alternate") }}', "fails: 'Roles must alternate"),
    ("{{ ''.__class__.__mro__ }}", "fails: 'access to attribute '__class__'"),
    ("{{ messages.append(1) }}", "fails: 'access to attribute 'append'"),
    ("{{ messages[0] + 1 }}", "fails: 'unsupported operand"),
    ("{{ 1 / 0 }}", "fails: 'division by zero"),
])
def test_a_template_that_fails_says_why(folder, text, words):
    said = conversations(folder(chat_template=text))
    said.pop("")
    assert all(line.replace('"', "'").startswith(words) and len(line) <= 100 for line in said.values())


def test_what_is_no_template_is_not_compared(folder):
    said = conversations(folder(chat_template="{% if %}"))
    assert list(said) == [""] and "not compared" in said[""] and "Expected an expression" in said[""]
    assert list(conversations(TINY)) == [""] and "there is none" in conversations(TINY)[""]


@pytest.mark.parametrize("missing", [True, False])
def test_without_a_jinja2_whose_sandbox_holds_nothing_is_rendered(folder, monkeypatch, missing):
    path = folder(chat_template=written(PT), tokenizer_config=TOKENS)
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None) if missing else monkeypatch.setattr(jinja2, "__version__", "3.1.5")
    said = conversations(path)
    assert list(said) == [""] and "pip install 'jinja2>=3.1.6'" in said[""]


# --------------------------------------------------------------------------------------------------- vocabulary
def encodings(tokenizer: Tokenizer, known: list) -> list[str]:
    return [line for line in vocabulary(tokenizer, config_of(TINY), known) if line.startswith("encodings")]


def test_pieces_tags_and_media_are_named():
    lines = "\n".join(vocabulary(Tokenizer(TINY), config_of(TINY), CASES["encodings"]))
    for fact in ("768 pieces, 14 control tokens, ids up to 779, and 780 rows", "<think> 776, </think> 777, <tool_call> 778",
                 "<response> none", "ends at 2, 768", "<|IMAGE_PLACEHOLDER|> 770", "<|VIDEO_END|> 774"):
        assert fact in lines


@pytest.mark.parametrize("change", [
    {"image_token_id": 771}, {"video_token_id": 770}, {"image_start_token_id": 2}, {"video_end_token_id": 773}])
def test_config_and_vocabulary_must_agree_about_media(folder, change):
    require_same_model(Tokenizer(TINY), config_of(TINY))
    path = folder(config=change)
    with pytest.raises(InputError, match=f"^{[*change][0]} is"):
        require_same_model(Tokenizer(path), config_of(path))


def test_a_vocabulary_larger_than_the_embedding_is_another_model_s(folder):
    path = folder(config={"text_config": read_json(TINY / "config.json")["text_config"] | {"vocab_size": 767}})
    with pytest.raises(InputError, match="768 pieces"):
        require_same_model(Tokenizer(path), config_of(path))


def test_released_videos_have_the_placeholder_of_images(folder):
    path = folder(config={"video_token_id": 770})
    added = read_json(path / "added_tokens.json")
    added.pop("<|VIDEO_PLACEHOLDER|>")
    (path / "added_tokens.json").write_text(json.dumps(added))
    require_same_model(Tokenizer(path), config_of(path))


def test_only_the_released_vocabulary_is_compared_with_known_encodings(monkeypatch):
    assert ["not compared" in line for line in encodings(Tokenizer(TINY), CASES["encodings"])] == [True]
    monkeypatch.setattr(selfcheck, "PIECES", 768)
    known = [["<s>", [1]], ["<s>", [1, 5]], ["<|NO_SUCH_TOKEN|>", [1]]]
    assert encodings(Tokenizer(TINY), known) == [
        "encodings   ok: '<s>'", "encodings   from token 1 ours [], known [5]: '<s>'"]


def test_what_is_decoded_to_another_text_is_not_ok(monkeypatch):
    tokenizer = Tokenizer(TINY)
    ids = tokenizer.encode("What is this?")
    assert compare_ids(tokenizer, "What is this?", ids) == "ok"
    assert compare_ids(tokenizer, "What is this?", ids[:-1]).startswith(f"from token {len(ids) - 1} ours [{ids[-1]}], known []")
    monkeypatch.setattr(tokenizer, "decode", lambda ids, keep: "What is that?")
    assert compare_ids(tokenizer, "What is this?", ids) == "decoded to another text"


@pytest.mark.skipif("ERNIE_VOCABULARY" not in os.environ, reason="ERNIE_VOCABULARY names no folder")
def test_the_released_vocabulary_gives_the_known_encodings(tmp_path):
    shutil.copy(Path(os.environ["ERNIE_VOCABULARY"]) / "tokenizer.model", tmp_path)
    added = {"<|end_of_sentence|>": 100272, "<|begin_of_sentence|>": 100273, "<|IMAGE_PLACEHOLDER|>": 100295,
             "<|IMAGE_START|>": 101304}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = Tokenizer(tmp_path)
    lines = encodings(tokenizer, CASES["encodings"])
    assert len(lines) == len(CASES["encodings"]) == 20 and all(line.startswith("encodings   ok: ") for line in lines)
    wrong = [[text, [*ids, 5]] for text, ids in CASES["encodings"]]
    assert all(line.startswith("encodings   from token ") for line in encodings(tokenizer, wrong))


# ----------------------------------------------------------------------------------------------------- settings
def lines_of(path: Path) -> dict[str, dict[str, str]]:
    """File -> key -> what is said of it."""
    files = {}
    for line in settings(path, vision=True):
        if line.startswith("settings"):
            files[line[12:]] = found = {}
        else:
            found[line[12:34].strip()] = line[34:]
    return files


def test_settings_stand_beside_ours(folder):
    path = folder(
        generation_config={"do_sample": True, "temperature": 0.2, "top_p": 0.8, "repetition_penalty": 1.0, "eos_token_id": 2},
        preprocessor_config={"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.5, 0.5, 0.5], "patch_size": 16,
                             "rescale_factor": 0.00392156862745098, "min_pixels": 3136, "do_normalize": False},
        video_preprocessor_config={"fps": 2, "max_frames": 768})
    files = lines_of(path)
    assert files["generation_config.json"] == {
        "do_sample": "true (here false)", "temperature": "0.2 (here 0)", "top_p": "0.8 (here 1)",
        "repetition_penalty": "1 (here 1)", "eos_token_id": "2"}
    image, video = files["preprocessor_config.json"], files["video_preprocessor_config.json"]
    assert image["image_mean"] == "[0.48145, 0.45783, 0.40821] (here [0.48145, 0.45783, 0.40821])"
    assert image["image_std"] == "[0.5, 0.5, 0.5] (here [0.26863, 0.2613, 0.27578])" and image["do_normalize"] == "false"
    assert image["patch_size"] == "16 (here 14)" and image["rescale_factor"] == "0.0039216 (here 0.0039216)"
    assert image["min_pixels"] == "3136 (here 18816)" and video == {"size": video["size"], "fps": "2 (here 2)",
                                                                    "max_frames": "768 (here 180)"}
    assert image["size"].count('{"shortest_edge": 18816, "longest_edge": 25088}') == 2 and len(files) == 3


def test_files_that_are_not_here_are_named(folder):
    path = folder()
    (path / "video_preprocessor_config.json").unlink()
    assert lines_of(path)["video_preprocessor_config.json is not here"] == {}


# ---------------------------------------------------------------------------------------------------- the command
def test_differences_are_shown_and_are_no_error(run_check, folder):                            # noqa: F811
    text = written(PT, "counts.image + 1", "1")
    code, out, err = run_check(folder(chat_template=text, tokenizer_config=TOKENS, generation_config={"temperature": 0.2}))
    assert code == 0 and err == "" and "theirs '" in out and "0.2 (here 0)" in out and " equal\n" in out


@pytest.mark.parametrize("files, words", [
    (dict(config={"image_token_id": 771}), "image_token_id"), (dict(chat_template="<|im_start|>"), "ChatML"),
    (dict(added_tokens="{"), "JSON"), (dict(preprocessor_config={"size": "large"}), "size"),
    (dict(generation_config="[]"), "JSON object")])
def test_what_cannot_be_used_gets_one_sentence_and_exit_2(run_check, folder, files, words):        # noqa: F811
    code, out, err = run_check(folder(**files))
    assert code == 2 and "parameters" in out and err.startswith("error: ") and words in err and err.count("\n") == 1


def test_without_a_vocabulary_the_rest_is_said(run_check, folder):                                 # noqa: F811
    path = folder()
    (path / "tokenizer.model").unlink()
    code, out, err = run_check(path)
    assert code == 0 and err == "" and "tokenizer.model is not here" in out and "(here " in out and "template  " not in out
