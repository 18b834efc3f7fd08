"""A conversation -> token ids and patches; generated ids -> text.

What the model sees of a question about a picture, and where its answer begins (thinking off):

    <|begin_of_sentence|>User: What is this?Picture 1:<|IMAGE_START|>▒▒▒▒▒▒<|IMAGE_END|>\\nAssistant: <think>\\n\\n</think>\\n\\n

▒ is a placeholder: one for every 28 x 28 pixels, later overwritten by what the resampler makes of them. Only the template
writes control tokens. The same characters in a text that somebody typed are encoded as the characters they are.
"""
import codecs
import math
import re
import warnings
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ernie_vl import PATCH, SPATIAL_MERGE, InputError, merged
from load_weights import read_json

FACTOR = PATCH * SPATIAL_MERGE                           # 28: sides of a resized picture are multiples of this
MIN_PIXELS, MAX_PIXELS = 56 * 56, 6177 * FACTOR**2       # of the released checkpoints' own processor: 4 to 6,177 tokens
MAX_RATIO = 200                                          # of the sides of a picture
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)     # of CLIP's training pictures, which the ViT began with
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


# ------------------------------------------------------------------------------------------------ 1. vocabulary
class Tokenizer:
    """A SentencePiece model (BPE, byte fallback, digits one by one) and the control tokens listed beside it."""

    def __init__(self, folder: Path):
        """Raises InputError when the folder has no tokenizer.model, or files that cannot be read."""
        self.folder, file = Path(folder), Path(folder) / "tokenizer.model"
        if not file.is_file():
            raise InputError(f"{file} is missing: download it from the place the checkpoint came from")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes() or b"empty")
        except (RuntimeError, OSError) as error:
            raise InputError(f"{file} is not a SentencePiece model that can be read ({error}): download it again") from None
        self.settings = read_json(self.folder / "tokenizer_config.json", {})
        try:
            self.special = self.read_special()
            self.names = {range(10**7)[id]: name for name, id in self.special.items()}      # only whole numbers will do
            eos = read_json(self.folder / "generation_config.json", {}).get("eos_token_id") or []
            self.stop = {range(10**7)[id] for id in (eos if isinstance(eos, list) else [eos])}
        except (TypeError, AttributeError, LookupError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the JSON files beside {file} do not list tokens ({error}): download them again") from None
        self.stop |= {self.special[name] for name in ("</s>", "<|end_of_sentence|>", "<|im_end|>") if name in self.special}
        self.control = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))))

    def read_special(self) -> dict[str, int]:
        """Control tokens by name: those in the SentencePiece model, and those that the folder adds. Digits are pieces too,
        and some files list them here, but they are ordinary text."""
        names = {self.pieces.id_to_piece(i): i for i in range(len(self.pieces)) if self.pieces.is_control(i)}
        for key, value in [*read_json(self.folder / "special_tokens_map.json", {}).items(), *self.settings.items()]:
            for name in value if isinstance(value, list) else [value]:
                name = name.get("content") if isinstance(name, dict) else name
                id = self.pieces.piece_to_id(name) if isinstance(name, str) and key.endswith(("_token", "_tokens")) else 0
                names |= {name: id} if id != self.pieces.unk_id() else {}
        names |= read_json(self.folder / "added_tokens.json", {})
        names |= {token["content"]: int(id) for id, token in self.settings.get("added_tokens_decoder", {}).items()}
        if "<|IMAGE_PLACEHOLDER|>" not in names:
            added = read_json(self.folder / "tokenizer.json", {}).get("added_tokens", [])
            names |= {token["content"]: token["id"] for token in added}
        return {name: id for name, id in names.items() if len(name) > 1}

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Text -> ids, nothing added in front or behind. Control strings in it are characters like any others, unless
        `control` says that they are meant."""
        ids, done, text = [], 0, text.encode("utf-8", "replace").decode()
        for match in self.control.finditer(text):
            if control:
                ids += self.pieces.encode(text[done : match.start()]) + [self.special[match[0]]]
                done = match.end()
            else:       # SentencePiece knows some of them: cut behind the first character, and they are just letters
                ids += self.pieces.encode(text[done : match.start() + 1])
                done = match.start() + 1
        return ids + self.pieces.encode(text[done:])

    def decode(self, ids: list[int], keep: tuple[str, ...] = ()) -> str:
        stream = Stream(self, keep)
        return "".join(map(stream.push, ids)) + stream.flush()

    def forbidden(self, vocab_size: int) -> tuple[int, ...]:
        """Ids that no answer may contain: media and reserve tokens, and rows of the embedding that no token owns."""
        allowed = re.compile(r"</?(think|tool_call|response)>|<\|LOC_.*")
        return tuple(i for i in range(len(self.pieces), vocab_size)
                     if i not in self.stop and not allowed.fullmatch(self.names.get(i, "")))


codecs.register_error("one mark a byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))


class Stream:
    """Ids one by one -> text as soon as it is certain. A character may take up to four byte tokens: it comes out when it
    is whole, or as one � a byte when it will never be. `keep` names the control tokens to show; the rest are silent."""

    def __init__(self, tokenizer: Tokenizer, keep: tuple[str, ...] = ()):
        self.pieces, self.names, self.keep = tokenizer.pieces, tokenizer.names, keep
        self.bytes = codecs.getincrementaldecoder("utf-8")("one mark a byte")

    def push(self, id: int) -> str:
        name = self.names.get(id)
        if name is None and id < len(self.pieces) and self.pieces.is_byte(id):
            return self.bytes.decode(bytes([int(self.pieces.id_to_piece(id)[3:5], 16)]))     # "<0x0A>"
        if name is not None or id >= len(self.pieces) or self.pieces.is_unknown(id):
            return self.flush() + (name if name in self.keep else "")
        return self.flush() + self.pieces.id_to_piece(id).replace("▁", " ")

    def flush(self) -> str:
        text = self.bytes.decode(b"", final=True)
        self.bytes.reset()
        return text


# --------------------------------------------------------------------------------------------- 2. chat template
class Control(str):
    """A control token in a rendered prompt. Everything else there is plain text."""


class Style(NamedTuple):
    """How the checkpoints of a kind were taught to converse."""

    system: str           # system message when the caller gives none
    media: str            # before "Picture 1:"
    thinking: str         # what follows "Assistant: " when the model shall think first ...
    silent: str           # ... and when it shall not
    history: str          # reasoning in an earlier answer
    thinks: bool          # when the caller does not say


ERNIE = "You are a multimodal AI assistant called ERNIE developed by Baidu based on the PaddlePaddle framework."
STYLES = {
    "instruct": Style("", "", "<think>", "<think>\n\n</think>\n\n", "<think>\n{}\n</think>\n", False),
    # The space before "Picture" is in the prompts that were logged, though other ports leave it out.
    "thinking": Style(ERNIE, " ", "\n<think>\n", "\n<think>\n\n</think>\n\n", "\n<think>\n{}\n</think>\n\n", True),
    "text": Style("", "", "", "", "", False),
}


def chat_style(tokenizer: Tokenizer) -> Style:
    """Told by the folder's own template, which we do not run. A vocabulary without <think> is a text-only relative's."""
    template = tokenizer.folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8", errors="replace") if template.is_file() else str(tokenizer.settings.get("chat_template", ""))
    if "<|im_start|>" in text:
        raise InputError(f"{tokenizer.folder} converses in ChatML, which is not supported: take a -PT checkpoint")
    names = tokenizer.folder.absolute().parts[-3:]      # in the Hugging Face cache the model's name stands two levels up
    if "thinking_mode" in text or any("VL" in name and "Thinking" in name for name in names):
        return STYLES["thinking"]
    return STYLES["instruct" if "<think>" in tokenizer.special else "text"]


def literal(template: str) -> list[str]:
    """The template's own text, in which control tokens are meant."""
    return [Control(part) if i % 2 else part for i, part in enumerate(re.split(r"(</?think>|<\|\w+\|>)", template)) if part]


def render(messages: list[dict], style: Style, think: bool | None = None) -> list[str]:
    """A conversation -> the parts of its prompt; joined they are the string that the model was trained on.

    messages: {"role": "system" | "user" | "assistant", "content": text, or a list of {"type": "text", "text": ...} and
    {"type": "image", "image": ...} in any order}; an assistant may have "reasoning_content", or "</think>" behind it. think: None leaves it to the
    checkpoint. Raises InputError for other roles and types. Pictures are counted over the whole conversation."""
    parts, pictures = literal("<|begin_of_sentence|>"), 0
    if not any(message["role"] == "system" for message in messages) and style.system:
        messages = [{"role": "system", "content": style.system}, *messages]
    for message in messages:
        content, role, thought = message["content"], message["role"], message.get("reasoning_content", "")
        if role == "assistant" and isinstance(content, str):
            before, tag, after = content.partition("</think>")
            thought, content = (before.removeprefix("<think>"), after) if tag else (thought, content)
            content = content.lstrip("\n")
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if role not in ("system", "user", "assistant"):
            raise InputError(f"a message has the role {role!r}, and system, user and assistant are known")
        parts += {"user": ["User: "], "assistant": ["\nAssistant: "], "system": []}[role]
        if thought := thought.strip("\n"):
            before, after = style.history.split("{}")
            parts += [*literal(before), thought, *literal(after)]
        for item in content:
            if item["type"] == "text":
                parts.append(item["text"])
            elif item["type"] == "image":
                pictures += 1
                parts += [f"{style.media}Picture {pictures}:", *literal("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")]
            else:
                raise InputError(f"a message holds an item of type {item['type']!r}, and text and image are known")
        parts += {"user": [], "assistant": literal("<|end_of_sentence|>"), "system": ["\n"]}[role]
    thinks = style.thinks if think is None else think
    if thinks and not style.thinking:
        raise InputError("this checkpoint was not taught to think before it answers: ask it without --think")
    return [*parts, "\nAssistant: ", *literal(style.thinking if thinks else style.silent)]


# -------------------------------------------------------------------------------------------------- 3. pictures
def load_picture(path: str | Path) -> Image.Image:
    """A file -> RGB as a person sees it: turned as the camera says, on white where it is transparent, the first frame of an
    animation. Raises InputError when there is no picture in the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # large or slightly broken, but readable
            with Image.open(path) as image:
                return to_rgb(ImageOps.exif_transpose(image))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: check the path of the picture") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path} unpacks to more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller first") from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{path} is not a picture that pillow can read: convert it to PNG or JPEG") from None
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{path} cannot be opened: {error.strerror}") from None
    except Exception as error:       # pillow's readers fail on damaged files in many ways
        raise InputError(f"{path} cannot be read as a picture ({error}): it may be cut off or damaged") from None


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise InputError("floating-point pixels have no agreed brightness: save the picture with 8 or 16 bits")
    if image.mode.startswith("I"):                       # 16 bits of grey, which pillow's own conversion would clip to white
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray((grey >> 8 if grey.max() > 255 else grey).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit_size(height: int, width: int, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) nearest to the given one with sides that are multiples of 28 and an area inside the budget."""
    if min(height, width) < 1 or max(height, width) > MAX_RATIO * min(height, width):
        raise InputError(f"a picture of {width} x {height} pixels is too narrow: crop it until the longer side is at most "
                         f"{MAX_RATIO} times the shorter")
    h, w = round(height / FACTOR) * FACTOR, round(width / FACTOR) * FACTOR       # a half goes to the even number
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (height, width))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / FACTOR) * FACTOR for side in (height, width))
    return h, w


def patchify(image: Image.Image, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> tuple[Tensor, tuple]:
    """An RGB picture -> patches (h*w, 588), each colour by colour and row by row, and the grid (1, h, w). The patches of a
    2 x 2 block stand side by side, as `ernie_vl.patch_cells` draws."""
    height, width = fit_size(image.height, image.width, min(min_pixels, max_pixels), max_pixels)
    pixels = np.asarray(image.resize((width, height), Image.BICUBIC))
    x = torch.from_numpy(((pixels / 255).astype(np.float32) - MEAN) / STD)
    h, w = height // PATCH, width // PATCH
    x = x.view(h // SPATIAL_MERGE, SPATIAL_MERGE, PATCH, w // SPATIAL_MERGE, SPATIAL_MERGE, PATCH, 3)
    return x.permute(0, 3, 1, 4, 6, 2, 5).reshape(h * w, -1), (1, h, w)


def pixel_budget(folder: Path) -> tuple[int, int]:
    """(fewest, most) pixels of a resized picture, from `size` in the folder's preprocessor_config.json, as transformers
    writes it. The released folders have other keys there, min_pixels and max_pixels, which their own processor does not
    follow either: for them MIN_PIXELS and MAX_PIXELS hold."""
    file = Path(folder) / "preprocessor_config.json"
    size = read_json(file, {}).get("size") or {}
    edges = [size.get("shortest_edge", MIN_PIXELS), size.get("longest_edge", MAX_PIXELS)] if isinstance(size, dict) else []
    if not edges or not all(isinstance(edge, int) and FACTOR**2 <= edge <= 10**9 for edge in edges):
        raise InputError(f"{file} has no numbers of pixels in size: download it again")
    return tuple(edges)


# ---------------------------------------------------------------------------------------- 4. conversation -> prompt
class Prompt(NamedTuple):
    """What `ErnieVL.prepare` takes."""

    ids: list[int]
    patches: Tensor | None      # (N, 588)
    grids: list[tuple]          # one (1, h, w) a picture


def encode_chat(tokenizer: Tokenizer, messages: list[dict], think: bool | None = None, max_pixels: int | None = None,
                seen: Callable = lambda image, size, tokens: None) -> Prompt:
    """A conversation, as `render` takes it, with pictures as paths or PIL images -> the prompt. max_pixels lowers the
    checkpoint's own budget. seen(image, (width, height) after resizing, tokens) is called for every picture."""
    fewest, most = pixel_budget(tokenizer.folder)
    parts = render(messages, chat_style(tokenizer), think)
    pictures = [item["image"] for message in messages if not isinstance(message["content"], str)
                for item in message["content"] if item["type"] == "image"]
    patches, grids = [], []
    for picture in pictures:
        image = to_rgb(picture) if isinstance(picture, Image.Image) else load_picture(picture)
        try:
            x, grid = patchify(image, fewest, min(most, max_pixels or most))
        except InputError as error:
            raise InputError(f"{picture}: {error}") from None
        patches.append(x)
        grids.append(grid)
        seen(image, (grid[2] * PATCH, grid[1] * PATCH), math.prod(merged(grid)))
    return Prompt(encode_parts(tokenizer, parts, grids), torch.cat(patches) if patches else None, grids)


def encode_parts(tokenizer: Tokenizer, parts: list[str], grids: list[tuple]) -> list[int]:
    """Text between two control tokens is encoded in one go, however many parts it came in; a placeholder is repeated for
    every token of its picture."""
    ids, text, counts = [], "", iter([math.prod(merged(grid)) for grid in grids])
    for part in parts:
        if not isinstance(part, Control):
            text += part
            continue
        if part not in tokenizer.special:
            raise InputError(f"the vocabulary of {tokenizer.folder} has no {part}: is it an ERNIE-4.5-VL checkpoint?")
        ids += tokenizer.encode(text) + [tokenizer.special[part]] * (next(counts) if part == "<|IMAGE_PLACEHOLDER|>" else 1)
        text = ""
    return ids + tokenizer.encode(text)
