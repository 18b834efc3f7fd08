"""A conversation -> token ids and patches; generated ids -> reasoning and answer.

What the model sees of a question about an image, and where its answer begins (thinking off):

    <|begin_of_sentence|>User: What is this?Picture 1:<|IMAGE_START|>▒▒▒▒▒▒<|IMAGE_END|>⏎Assistant: <think>⏎⏎</think>⏎⏎

⏎ is a line break, ▒ a placeholder: one for every 28 x 28 pixels, later replaced by image features. Only the template
writes control tokens. The same characters in a text that somebody typed are encoded as the characters they are.
"""
import codecs
import contextlib
import math
import operator
import re
import warnings
from pathlib import Path
from typing import BinaryIO, Iterable, Iterator, NamedTuple

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ernie_vl import PATCH, SPATIAL_MERGE, TEMPORAL_MERGE, InputError, read_json, require, token_grid

FACTOR = PATCH * SPATIAL_MERGE                           # 28: sides of a resized image are multiples of this
MIN_PIXELS, MAX_PIXELS = 56 * 56, 6177 * FACTOR**2       # of the released checkpoints' own processor: 4 to 6,177 tokens
MIN_FRAME, MAX_FRAME = 299 * FACTOR**2, 1196 * FACTOR**2 # the same for a frame of a video, which may be enlarged
MAX_RATIO = 200                                          # of the sides of an image
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)     # of CLIP's training images
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
IN_ANSWERS = re.compile(r"</?(think|tool_call|response)>|<\|LOC_.*")      # control tokens that an answer may show


# ------------------------------------------------------------------------------------------------ 1. vocabulary
class Tokenizer:
    """A SentencePiece model (BPE, byte fallback, digits one by one) and the control tokens listed beside it."""

    def __init__(self, folder: Path):
        """Raises InputError when the folder has no tokenizer.model, or files that cannot be read."""
        self.folder, file = Path(folder), Path(folder) / "tokenizer.model"
        require(file.is_file(), f"{file} is missing: download it from the place the checkpoint came from")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes() or b"empty")
        except (RuntimeError, OSError) as error:
            raise InputError(f"{file} is no readable SentencePiece model ({error}): download it again") from None
        self.settings = read_json(self.folder / "tokenizer_config.json", {})
        try:
            self.special = self.read_special()
            self.names = {operator.index(token_id): name for name, token_id in self.special.items()}
            eos = read_json(self.folder / "generation_config.json", {}).get("eos_token_id") or []
            self.stop = {operator.index(token_id) for token_id in (eos if isinstance(eos, list) else [eos])}
        except InputError:
            raise
        except (TypeError, AttributeError, LookupError, ValueError) as error:
            raise InputError(f"the JSON files beside {file} list no tokens ({error}): download them again") from None
        self.stop |= {i for name, i in self.special.items() if name in ("</s>", "<|end_of_sentence|>", "<|im_end|>")}
        self.control = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))))
        self.shown = tuple(filter(IN_ANSWERS.fullmatch, self.special))

    def read_special(self) -> dict[str, int]:
        """Control tokens by name: those in the SentencePiece model, and those that the folder adds. Digits are pieces
        too, and some files list them here, but they are ordinary text."""
        names = {self.pieces.id_to_piece(i): i for i in range(len(self.pieces)) if self.pieces.is_control(i)}
        for key, value in [*read_json(self.folder / "special_tokens_map.json", {}).items(), *self.settings.items()]:
            listed = (value if isinstance(value, list) else [value]) * key.endswith(("_token", "_tokens"))
            listed = [name.get("content") if isinstance(name, dict) else name for name in listed]
            ids = {name: self.pieces.piece_to_id(name) for name in listed if isinstance(name, str)}      # some are bool
            names |= {name: token_id for name, token_id in ids.items() if token_id != self.pieces.unk_id()}
        names |= read_json(self.folder / "added_tokens.json", {})
        decoder = self.settings.get("added_tokens_decoder", {})
        names |= {token["content"]: int(token_id) for token_id, token in decoder.items()}
        if "<|IMAGE_PLACEHOLDER|>" not in names:
            added = read_json(self.folder / "tokenizer.json", {}).get("added_tokens", [])
            names |= {token["content"]: token["id"] for token in added}
        return {name: token_id for name, token_id in names.items() if len(name) > 1}

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Text -> ids; adds no BOS or EOS. control=True parses control tokens; otherwise control strings in the text
        are characters like any others."""
        ids, done, text = [], 0, text.encode("utf-8", "replace").decode()
        for match in self.control.finditer(text):
            # SentencePiece knows some of them: cut behind the first character, they are just letters.
            end = match.start() if control else match.start() + 1
            ids += self.pieces.encode(text[done:end]) + [self.special[match[0]]] * control
            done = match.end() if control else end
        return ids + self.pieces.encode(text[done:])

    def decode(self, ids: list[int], keep: tuple[str, ...] = ()) -> str:
        stream = Stream(self, keep)
        return "".join(map(stream.push, ids)) + stream.flush()

    def suppressed_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Ids that no answer may contain: media and reserve tokens, and rows of the embedding that no token owns."""
        return tuple(i for i in range(len(self.pieces), vocab_size)
                     if i not in self.stop and self.names.get(i) not in self.shown)

    def begins_thinking(self, ids: list[int]) -> bool:
        """True if the prompt ends with an open <think>, so that its answer begins inside the reasoning."""
        tags = [self.names[token_id] for token_id in ids if self.names.get(token_id) in ("<think>", "</think>")]
        return tags[-1:] == ["<think>"]


codecs.register_error("replace each byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))


class Stream:
    """Ids one by one -> text as soon as it is certain. A character may take up to four byte tokens: it comes out when
    it is whole, or as one � a byte when it will never be. `keep` names the control tokens to show."""

    def __init__(self, tokenizer: Tokenizer, keep: tuple[str, ...] = ()):
        self.pieces, self.names, self.keep = tokenizer.pieces, tokenizer.names, keep
        self.bytes = codecs.getincrementaldecoder("utf-8")("replace each byte")

    def push(self, token_id: int) -> str:
        name = self.names.get(token_id)
        if name is None and token_id < len(self.pieces) and self.pieces.is_byte(token_id):
            return self.bytes.decode(bytes([int(self.pieces.id_to_piece(token_id)[3:5], 16)]))     # "<0x0A>"
        if name is not None or token_id >= len(self.pieces) or self.pieces.is_unknown(token_id):
            return self.flush() + (name if name in self.keep else "")
        return self.flush() + self.pieces.id_to_piece(token_id).replace("▁", " ")

    def flush(self) -> str:
        return self.bytes.decode(b"", final=True)


# --------------------------------------------------------------------------------------------------- 2. images
class Media(NamedTuple):
    """An image or video that has been read, as it stands in the content of a message."""
    kind: str                     # "image" or "video"
    source: object                # what was given: a path, a file object, an image in memory
    image: Image.Image            # RGB; of a video the first frame
    patches: Tensor               # (t*h*w, 588)
    grid: tuple                   # (t, h, w) in patches
    summary: str                  # one line for the log


def load_image(source: str | Path | BinaryIO | Image.Image, folder: Path, max_pixels: int | None = None) -> Media:
    """An image file, or an image in memory, resized to the pixel budget of the checkpoint in `folder`, which max_pixels
    may lower. Raises InputError when there is no image in it."""
    return make_media("image", source, [read_image(source)], folder, max_pixels)


def make_media(kind: str, source, frames: list[Image.Image], folder: Path, max_pixels: int | None = None,
               summary: str = "") -> Media:
    """Frames in RGB, one of an image and an even number of a video -> Media. All become as large as the first."""
    fewest, most = pixel_budget(folder, kind)
    with input_errors(source, kind):
        patches, grid = patchify(frames, fewest, min(most, max_pixels or most))
    image, (_, h, w) = frames[0], grid
    size = f"{image.width} x {image.height} -> {w * PATCH} x {h * PATCH} -> {math.prod(token_grid(grid)):,} tokens"
    return Media(kind, source, image, patches, grid, summary + size)


def read_image(source: str | Path | BinaryIO | Image.Image) -> Image.Image:
    """-> RGB as a person sees it: turned as the camera says, on white where it is transparent, the first frame of an
    animation. Raises InputError."""
    with input_errors(source, "image"):
        if isinstance(source, Image.Image):
            return to_rgb(source)
        require(source, "no file is named")
        with Image.open(source) as image:
            return to_rgb(ImageOps.exif_transpose(image))


def short_name(source) -> str:
    """How messages name a file: a path as it is, a data URI by its beginning."""
    if not isinstance(source, (str, Path)):
        return getattr(source, "name", "what is given in memory")
    return re.sub(r"(?s)^(data:.{25}).*", r"\1...", str(source))


@contextlib.contextmanager
def input_errors(source, kind: str) -> Iterator[None]:
    """Turns what goes wrong while an image or video is read into one sentence."""
    name = short_name(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # large or slightly broken, but readable
            yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{name} does not exist: give the path of a file (nothing is downloaded)") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name} unpacks to over {2 * Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller") from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{name} is not an image that pillow can read: convert it to PNG or JPEG") from None
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{name} cannot be opened: {error.strerror}") from None
    except Exception as error:       # pillow's readers fail on damaged files in many ways
        reason = getattr(error, "strerror", None) or error      # the whole text of an OSError has the path once more
        raise InputError(f"{name} cannot be read as {kind} ({reason}): it may be cut off or damaged") from None


def to_rgb(image: Image.Image) -> Image.Image:
    require(image.mode != "F", "floating-point pixels have no agreed brightness: save the image with 8 or 16 bits")
    if image.mode.startswith("I"):        # 16 bits of grey, which pillow's own conversion would clip to white
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray((grey >> 8 * int(grey.max() > 255)).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def pixel_budget(folder: Path, kind: str = "image") -> tuple[int, int]:
    """(fewest, most) pixels of a resized image or frame, from `size` in the folder's preprocessor_config.json or
    video_preprocessor_config.json, as transformers writes them. The released folders have other keys, min_pixels and
    max_pixels, which their own processor does not follow either: for them the numbers at the top of this file hold."""
    name, *usual = {"image": ("preprocessor_config.json", MIN_PIXELS, MAX_PIXELS),
                    "video": ("video_preprocessor_config.json", MIN_FRAME, MAX_FRAME)}[kind]
    size = read_json(Path(folder) / name, {}).get("size") or {}
    known = size if isinstance(size, dict) else {"shortest_edge": None, "longest_edge": None}
    edges = [known.get(key, pixels) for key, pixels in zip(("shortest_edge", "longest_edge"), usual)]
    require(all(isinstance(edge, int) and FACTOR**2 <= edge <= 10**9 for edge in edges),
            f"{Path(folder) / name} has no numbers of pixels in size: download it again")
    return tuple(edges)


def fit_size(height: int, width: int, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) nearest to the given one with sides that are multiples of 28 and an area inside the budget."""
    require(0 < max(height, width) <= MAX_RATIO * min(height, width), f"{width} x {height} pixels are too narrow: crop "
            f"it until the longer side is at most {MAX_RATIO} times the shorter")
    h, w = round(height / FACTOR) * FACTOR, round(width / FACTOR) * FACTOR       # a half goes to the even number
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (height, width))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / FACTOR) * FACTOR for side in (height, width))
    return h, w


def patchify(frames: list[Image.Image], min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> tuple:
    """Patches (t*h*w, 588), each colour by colour and row by row, and the grid (t, h, w). The patches of a 2 x 2 block
    stand side by side, as `ernie_vl.patch_coordinates` draws."""
    height, width = fit_size(frames[0].height, frames[0].width, min(min_pixels, max_pixels), max_pixels)
    patches = torch.cat([to_patches(frame, height, width) for frame in frames])
    return patches, (len(frames), height // PATCH, width // PATCH)


def to_patches(image: Image.Image, height: int, width: int) -> Tensor:                     # -> (h*w, 588)
    pixels = np.asarray(image.resize((width, height), Image.BICUBIC))
    x = torch.from_numpy(((pixels / 255).astype(np.float32) - MEAN) / STD)
    x = x.view(height // FACTOR, SPATIAL_MERGE, PATCH, width // FACTOR, SPATIAL_MERGE, PATCH, 3)
    return x.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * PATCH**2)


# --------------------------------------------------------------------------------- 3. conversation -> prompt
class Control(str):
    """A control token in a rendered prompt. Everything else there is plain text."""


class ChatTemplate(NamedTuple):
    """How the checkpoints of a kind were taught to converse."""
    system: str               # system message when the caller gives none
    media_prefix: str         # before "Picture 1:"
    think_prefix: str         # what follows "Assistant: " when the model shall think first ...
    no_think_prefix: str      # ... and when it shall not
    history: str              # reasoning in an earlier answer
    thinks_by_default: bool


ERNIE = "You are a multimodal AI assistant called ERNIE developed by Baidu based on the PaddlePaddle framework."
TEMPLATES = {
    "instruct": ChatTemplate("", "", "<think>", "<think>\n\n</think>\n\n", "<think>\n{}\n</think>\n", False),
    # The space before "Picture" is in the prompts that were logged, though other ports leave it out.
    "thinking": ChatTemplate(ERNIE, " ", "\n<think>\n", "\n<think>\n\n</think>\n\n", "\n<think>\n{}\n</think>\n\n",
                             True),
    "text": ChatTemplate("", "", "", "", "", False),
}


def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Detected from the checkpoint's own chat template, which is not executed. A vocabulary without <think> is that of
    a text-only model."""
    file = tokenizer.folder / "chat_template.jinja"
    text = str(tokenizer.settings.get("chat_template") or "")
    if file.is_file():
        text = file.read_text(encoding="utf-8", errors="replace")
    require("<|im_start|>" not in text, f"{tokenizer.folder} converses in ChatML: take a -PT checkpoint")
    names = tokenizer.folder.absolute().parts[-3:]      # in the Hugging Face cache the model's is two levels up
    if "thinking_mode" in text or not text and any("VL" in name and "Thinking" in name for name in names):
        return TEMPLATES["thinking"]
    return TEMPLATES["instruct" if "<think>" in tokenizer.special else "text"]


def literal(text: str) -> list[str]:
    """The template's own text, in which control tokens are meant."""
    return [Control(part) if i % 2 else part for i, part in enumerate(re.split(r"(</?\w+>|<\|\w+\|>)", text)) if part]


def wrap(template: str, *inside: str) -> list[str]:
    opening, closing = template.split("{}")
    return [*literal(opening), *inside, *literal(closing)]


def generation_prompt(template: ChatTemplate, think: bool | None) -> list[str]:
    """The end of the prompt, before the answer. think: None leaves it to the checkpoint. Raises InputError."""
    thinks = template.thinks_by_default if think is None else think
    require(template.think_prefix or not thinks, "this checkpoint was not taught to think first: think cannot be True")
    return ["\nAssistant: ", *literal(template.think_prefix if thinks else template.no_think_prefix)]


def render(messages: list[dict], template: ChatTemplate, think: bool | None = None,
           add_generation_prompt: bool = True) -> list[str]:
    """A conversation, as `encode_chat` takes it -> the parts of its prompt; joined they are the string that the model
    was trained on. Images and videos are counted over the whole conversation."""
    parts, counts = literal("<|begin_of_sentence|>"), {"image": 0, "video": 0}
    if template.system and not any(message["role"] == "system" for message in messages):
        messages = [{"role": "system", "content": [template.system]}, *messages]
    for message in messages:
        content = message["content"]
        known = message["role"] in ("system", "user", "assistant") and isinstance(content, (str, list, tuple))
        require(known and all(isinstance(item, (str, Media)) for item in content), "a message has a role (system, user "
                "or assistant) and a content: a text, or a list of texts and Media, which load_image makes")
        opening, closing = {"system": ("", "\n"), "user": ("User: ", ""),
                            "assistant": ("\nAssistant: ", "<|end_of_sentence|>")}[message["role"]]
        parts.append(opening)
        reasoning = message.get("reasoning_content")
        if reasoning and template.history:        # a checkpoint that was not taught to think has no place for it
            parts += wrap(template.history, reasoning)
        for item in content:
            parts += render_media(item.kind, template, counts) if isinstance(item, Media) else [item]
        parts += literal(closing)
    return parts + (generation_prompt(template, think) if add_generation_prompt else [])


def render_media(kind: str, template: ChatTemplate, counts: dict[str, int]) -> list[str]:
    counts[kind] += 1
    name = {"image": "Picture", "video": "Video"}[kind]
    tokens = literal("<|{0}_START|><|{0}_PLACEHOLDER|><|{0}_END|>".format(kind.upper()))
    return [f"{template.media_prefix}{name} {counts[kind]}:", *tokens]


class Prompt(NamedTuple):
    """What `ErnieVL.prepare` takes."""
    ids: list[int]
    patches: Tensor         # (N, 588)
    grids: list[tuple]      # one (t, h, w) an image or video


def encode_chat(tokenizer: Tokenizer, messages: list[dict], think: bool | None = None,
                add_generation_prompt: bool = True) -> Prompt:
    """A conversation -> the prompt. Opens no files.

    messages: {"role": "system", "user" or "assistant", "content": a text, or a list of texts and Media}; an assistant's
    may have "reasoning_content". think: reason before answering or not; None leaves it to the checkpoint.
    add_generation_prompt=False leaves out the beginning of an answer. Raises InputError."""
    parts = render(messages, chat_template(tokenizer), think, add_generation_prompt)
    media = [item for message in messages for item in message["content"] if isinstance(item, Media)]
    grids, patches = [one.grid for one in media], [one.patches for one in media]
    return Prompt(encode_parts(tokenizer, parts, grids), torch.cat([torch.empty(0, 3 * PATCH**2), *patches]), grids)


def encode_parts(tokenizer: Tokenizer, parts: list[str], grids: list[tuple]) -> list[int]:
    """Text between two control tokens is encoded in one go, however many parts it came in; a placeholder is repeated
    for every token of its image. Released prompts use the image's placeholder in videos too."""
    ids, text, counts, special = [], "", iter([math.prod(token_grid(grid)) for grid in grids]), tokenizer.special
    for part in parts:
        if not isinstance(part, Control):
            text += part
            continue
        name = part if part in special else part.replace("VIDEO_PLACEHOLDER", "IMAGE_PLACEHOLDER")
        require(name in special, f"the vocabulary of {tokenizer.folder} has no {name}: is it an ERNIE-4.5-VL folder?")
        repeat = next(counts) if name.endswith("_PLACEHOLDER|>") else 1
        ids, text = ids + tokenizer.encode(text) + [special[name]] * repeat, ""
    return ids + tokenizer.encode(text)


# ------------------------------------------------------------------------------------ 4. generated ids -> reply
class ReplyParser:
    """Text as it is generated -> reasoning and content, as soon as it is certain which. A tag may come in pieces, so
    what could be its beginning waits in the buffer, and so do newlines, which are dropped around the parts."""

    tags = ("<think>",)           # opening tags, which count only at the beginning of a part

    def __init__(self, thinking: bool):
        """thinking: the prompt has opened the reasoning, see `Tokenizer.begins_thinking`."""
        self.state, self.buffer = "reasoning" if thinking else "content", ""
        self.text = {"reasoning": "", "content": ""}

    def push(self, text: str, final: bool = False) -> Iterator[tuple[str, str]]:
        """Yields ("reasoning" or "content", text)."""
        self.buffer += text
        while event := getattr(self, f"_{self.state}")(final):
            kind, certain = event
            if certain:
                self.text[kind] += certain
                yield kind, certain

    def follow(self, tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[tuple[str, str]]:
        """The same for generated ids, until they end."""
        stream = Stream(tokenizer, tokenizer.shown)
        for token_id in ids:
            yield from self.push(stream.push(token_id))
        yield from self.push(stream.flush(), final=True)

    def _reasoning(self, final: bool) -> tuple[str, str] | None:
        if not self.text["reasoning"]:
            self.buffer = self.buffer.lstrip("\n").removeprefix("<think>").lstrip("\n")
        return self._split_at("</think>", "content", final)

    def _content(self, final: bool) -> tuple[str, str] | None:
        if not self.text["content"]:
            self.buffer = self.buffer.lstrip("\n")
            if not self.text["reasoning"] and self.buffer.startswith("<think>"):      # the prompt did not open it
                self.state = "reasoning"
                return "content", ""
        return self._split_at(None, "content", final)

    def _split_at(self, tag: str | None, next_state: str, final: bool) -> tuple[str, str] | None:
        """What is certainly before the tag (None: no tag ends this part); behind it the next state begins."""
        state, (before, found, behind) = self.state, self.buffer.partition(tag) if tag else (self.buffer, "", "")
        if found:
            self.state, self.buffer = next_state, behind
            return state, before.rstrip("\n")
        tags = [*self.tags * (not self.text[state]), *filter(None, [tag])] * (not final)
        maybe = next((i for i in range(len(before)) if any(tag.startswith(before[i:]) for tag in tags)), len(before))
        certain = before[:maybe]
        if state == "reasoning" or not final:
            certain = certain.rstrip("\n")
        self.buffer = before[len(certain) :] * (not final)
        return (state, certain) if certain else None
