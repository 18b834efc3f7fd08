"""A conversation -> token ids and patches; generated ids -> a reply: reasoning, text, tool calls, boxes.

What the model sees of a question about a picture, and where its answer begins (thinking off):

    <|begin_of_sentence|>User: What is this?Picture 1:<|IMAGE_START|>▒▒▒▒▒▒<|IMAGE_END|>\\nAssistant: <think>\\n\\n</think>\\n\\n

▒ is a placeholder: one for every 28 x 28 pixels, later overwritten by what the resampler makes of them. Only the template
writes control tokens. The same characters in a text that somebody typed are encoded as the characters they are.
"""
import base64
import codecs
import contextlib
import io
import json
import math
import operator
import re
import urllib.parse
import uuid
import warnings
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ernie_vl import PATCH, SPATIAL_MERGE, TEMPORAL_MERGE, InputError, merged
from load_weights import read_json

FACTOR = PATCH * SPATIAL_MERGE                           # 28: sides of a resized picture are multiples of this
MIN_PIXELS, MAX_PIXELS = 56 * 56, 6177 * FACTOR**2       # of the released checkpoints' own processor: 4 to 6,177 tokens
MIN_FRAME, MAX_FRAME = 299 * FACTOR**2, 1196 * FACTOR**2 # the same for a frame of a clip, which may be enlarged
MAX_RATIO = 200                                          # of the sides of a picture
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)     # of CLIP's training pictures, which the ViT began with
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
IN_ANSWERS = re.compile(r"</?(think|tool_call|response)>|<\|LOC_.*")      # control tokens that an answer may hold, and shows


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
            self.names = {operator.index(id): name for name, id in self.special.items()}
            eos = read_json(self.folder / "generation_config.json", {}).get("eos_token_id") or []
            self.stop = {operator.index(id) for id in (eos if isinstance(eos, list) else [eos])}
        except (TypeError, AttributeError, LookupError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the JSON files beside {file} do not list tokens ({error}): download them again") from None
        self.stop |= {self.special[name] for name in ("</s>", "<|end_of_sentence|>", "<|im_end|>") if name in self.special}
        self.control = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))))
        self.shown = tuple(filter(IN_ANSWERS.fullmatch, self.special))

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
        return tuple(i for i in range(len(self.pieces), vocab_size)
                     if i not in self.stop and self.names.get(i) not in self.shown)

    def begins_thinking(self, ids: list[int]) -> bool:
        """Whether an answer to this prompt begins inside the reasoning. No tag says so: the prompt has opened it."""
        tags = [self.names[id] for id in ids if self.names.get(id) in ("<think>", "</think>")]
        return tags[-1:] == ["<think>"]


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
        return self.bytes.decode(b"", final=True)


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
    text = template.read_text(encoding="utf-8", errors="replace") if template.is_file() else str(tokenizer.settings.get("chat_template") or "")
    if "<|im_start|>" in text:
        raise InputError(f"{tokenizer.folder} converses in ChatML, which is not supported: take a -PT checkpoint")
    names = tokenizer.folder.absolute().parts[-3:]      # in the Hugging Face cache the model's name stands two levels up
    if "thinking_mode" in text or not text and any("VL" in name and "Thinking" in name for name in names):
        return STYLES["thinking"]
    return STYLES["instruct" if "<think>" in tokenizer.special else "text"]


def literal(template: str) -> list[str]:
    """The template's own text, in which control tokens are meant."""
    return [Control(part) if i % 2 else part for i, part in enumerate(re.split(r"(</?\w+>|<\|\w+\|>)", template)) if part]


def render(messages: list[dict], style: Style, think: bool | None = None, tools: list[dict] = (), ask: bool = True) -> list[str]:
    """A conversation -> the parts of its prompt; joined they are the string that the model was trained on.

    messages: as `read_messages` returns them. think: None leaves it to the checkpoint. tools: JSON schemas, as OpenAI's API
    takes them. ask=False leaves out the beginning of an answer. Pictures and clips are counted over the whole conversation.
    Raises InputError where the checkpoint cannot think.

    Training code of the Thinking checkpoint has the tool list in front of the system message in one place and behind it in
    another, and a tool's output on the line of "User: " or on the next; here it is behind, and on the line."""
    parts, counts, before = literal("<|begin_of_sentence|>"), {"Picture": 0, "Video": 0}, None
    if not any(message["role"] == "system" for message in messages) and (style.system or tools):
        messages = [{"role": "system", "content": [{"type": "text", "text": style.system}]}, *messages]
    for message in messages:
        role, thought = message["role"], message.get("reasoning_content")
        if role != "tool" or before != "tool":       # results of several calls share a turn
            parts += {"user": ["User: "], "tool": ["User: "], "assistant": ["\nAssistant: "], "system": []}[role]
        if thought and style.history:        # a checkpoint that was not taught to think has no place for it
            parts += around(style.history, thought)
        content = render_items(message["content"], style, counts)
        parts += around("<tool_output>\n{}\n</tool_output>\n", *content) if role == "tool" else content
        for call in message.get("tool_calls", ()):
            function = {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}
            parts += around("<tool_call>\n{}\n</tool_call>\n", json.dumps(function, ensure_ascii=False))
        if role == "system" and tools:
            parts += around("\n<tool_list>\n{}\n</tool_list>\n", json.dumps(tools, ensure_ascii=False))
            tools = ()
        parts += {"assistant": literal("<|end_of_sentence|>"), "system": ["\n"]}.get(role, [])
        before = role
    thinks = style.thinks if think is None else think
    if thinks and not style.thinking:
        raise InputError("this checkpoint was not taught to think before it answers: ask it without --think")
    return [*parts, "\nAssistant: ", *literal(style.thinking if thinks else style.silent)] if ask else parts


def around(template: str, *inside: str) -> list[str]:
    opening, closing = template.split("{}")
    return [*literal(opening), *inside, *literal(closing)]


def render_items(content: list[dict], style: Style, counts: dict[str, int]) -> list[str]:
    parts = []
    for item in content:
        if item["type"] == "text":
            parts.append(item["text"])
            continue
        name = {"image": "Picture", "video": "Video"}[item["type"]]
        counts[name] += 1
        kind = item["type"].upper()
        parts += [f"{style.media}{name} {counts[name]}:", *literal(f"<|{kind}_START|><|{kind}_PLACEHOLDER|><|{kind}_END|>")]
    return parts


# -------------------------------------------------------------------------------------------------- 3. pictures
def load_picture(source: str | Path) -> Image.Image:
    """A file or data URI -> RGB as a person sees it: turned as the camera says, on white where it is transparent, the first
    frame of an animation. Raises InputError when there is no picture in it."""
    with refusing(source, "picture"), Image.open(opened(source)) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def opened(source: str | Path) -> Path | io.BytesIO:
    """What pillow and PyAV open: a path, or the bytes of a data URI. Nothing is downloaded."""
    if not source:
        raise InputError("no file is named")
    if not isinstance(source, str) or not re.match(r"(data|https?|file):", source):
        return Path(source)
    scheme, _, rest = source.partition(":")
    if scheme.startswith("http"):
        raise InputError("nothing is downloaded here: save it in a file, and give the path")
    if scheme == "file":
        return Path(urllib.parse.unquote(rest.removeprefix("//")))
    head, _, data = rest.partition(",")
    if not head.endswith(";base64"):
        raise InputError("a data URI must begin like data:image/png;base64,")
    return io.BytesIO(base64.b64decode(data))


@contextlib.contextmanager
def refusing(source: str | Path, kind: str) -> Iterator[None]:
    """Turns what goes wrong while a picture or clip is read into one sentence."""
    name = short(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # large or slightly broken, but readable
            yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{name} does not exist: check the path of the {kind}") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name} unpacks to more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller first") from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{name} is not a picture that pillow can read: convert it to PNG or JPEG") from None
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{name} cannot be opened: {error.strerror}") from None
    except Exception as error:       # pillow's readers fail on damaged files in many ways
        raise InputError(f"{name} cannot be read as a {kind} ({error}): it may be cut off or damaged") from None


def short(source) -> str:
    """A path as it is, a data URI by its beginning."""
    if isinstance(source, (Image.Image, tuple)):
        return "a picture in memory" if isinstance(source, Image.Image) else "a clip in memory"
    return f"{source[:30]}..." if str(source).startswith("data:") else str(source)


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


def patchify(frames: list[Image.Image], min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> tuple[Tensor, tuple]:
    """A picture, or the frames of a clip as large as the first -> patches (t*h*w, 588), each colour by colour and row by row,
    and the grid (t, h, w). The patches of a 2 x 2 block stand side by side, as `ernie_vl.patch_cells` draws."""
    height, width = fit_size(frames[0].height, frames[0].width, min(min_pixels, max_pixels), max_pixels)
    return torch.cat([cut(frame, height, width) for frame in frames]), (len(frames), height // PATCH, width // PATCH)


def cut(image: Image.Image, height: int, width: int) -> Tensor:                            # -> (h*w, 588)
    pixels = np.asarray(image.resize((width, height), Image.BICUBIC))
    x = torch.from_numpy(((pixels / 255).astype(np.float32) - MEAN) / STD)
    x = x.view(height // FACTOR, SPATIAL_MERGE, PATCH, width // FACTOR, SPATIAL_MERGE, PATCH, 3)
    return x.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * PATCH**2)


def pixel_budget(folder: Path, kind: str = "image") -> tuple[int, int]:
    """(fewest, most) pixels of a resized picture or frame, from `size` in the folder's preprocessor_config.json or
    video_preprocessor_config.json, as transformers writes them. The released folders have other keys there, min_pixels and
    max_pixels, which their own processor does not follow either: for them the numbers at the top of this file hold."""
    file = Path(folder) / ("preprocessor_config.json" if kind == "image" else "video_preprocessor_config.json")
    size = read_json(file, {}).get("size") or {}
    usual = (MIN_PIXELS, MAX_PIXELS) if kind == "image" else (MIN_FRAME, MAX_FRAME)
    edges = [size.get("shortest_edge", usual[0]), size.get("longest_edge", usual[1])] if isinstance(size, dict) else []
    if not edges or not all(isinstance(edge, int) and FACTOR**2 <= edge <= 10**9 for edge in edges):
        raise InputError(f"{file} has no numbers of pixels in size: download it again")
    return tuple(edges)


# ----------------------------------------------------------------------------------------------------- 4. clips
UNKNOWN_RATE = 24.0      # frames a second of a folder of frames, which does not say: transformers' assumption too
FAR = 300                # so many frames on, a jump to the key frame before it is faster than decoding all between


class Clip(NamedTuple):
    frames: list[Image.Image]     # RGB, as large as in the file
    times: list[float]            # seconds from the beginning, one a frame
    lost: int = 0                 # frames that were chosen and could not be decoded


def choose_frames(count: int, rate: float, fps: float = 2.0, most: int = 180) -> list[int]:
    """Which of `count` frames, `rate` a second, the model sees: `fps` a second, at least 16 and at most `most`, each the
    first of its stretch. Numbers and rounding are those of the released checkpoints' own processor."""
    wanted = min(max(int(count / rate * fps), min(16, most)), most, count)
    return np.linspace(0, count, wanted + 1).astype(int)[:-1].tolist()


def read_clip(source: str | Path, fps: float = 2.0, most: int = 180) -> Clip:
    """An animation that pillow reads, a folder of numbered pictures, or a film that PyAV reads -> its chosen frames. They
    are decoded one by one, the others are not kept. Raises InputError when there are no frames."""
    with refusing(source, "clip"):
        file = opened(source)
        for reader in (read_folder,) if isinstance(file, Path) and file.is_dir() else (read_animation, read_film):
            try:
                count, rate, frames = reader(file)
            except Image.UnidentifiedImageError:
                continue
            wanted = choose_frames(count, rate, fps, most) if count else []
            if found := dict(frames(wanted)):         # pillow knows the names of some kinds that it cannot read, as MPEG-1
                return Clip(list(found.values()), [index / rate for index in found], len(wanted) - len(found))
        raise InputError("no frame of it can be decoded: is it a clip, or a folder of numbered pictures?")


def read_folder(folder: Path) -> tuple[int, float, Callable]:
    """(number of frames, frames a second, indices -> pairs of index and frame), like the two readers below."""
    numbers = lambda file: [int(number) for number in re.findall(r"\d+", file.stem)]
    files = [file for file in folder.iterdir() if file.suffix.lower() in Image.registered_extensions()]
    files.sort(key=lambda file: (numbers(file), file.name))

    def frames(wanted: list[int]) -> Iterator[tuple[int, Image.Image]]:
        for index in wanted:
            with contextlib.suppress(InputError):
                yield index, load_picture(files[index])
    return len(files), UNKNOWN_RATE, frames


def read_animation(file: Path | io.BytesIO) -> tuple[int, float, Callable]:
    milliseconds = []
    with Image.open(file) as image:
        count = getattr(image, "n_frames", 1)
        with contextlib.suppress(Exception):     # a damaged frame: those before it tell the rate
            for index in range(count):
                image.seek(index)
                image.load()                     # WebP tells the duration only then
                milliseconds.append(image.info.get("duration") or 100)      # as browsers play what says 0

    def frames(wanted: list[int]) -> Iterator[tuple[int, Image.Image]]:
        with Image.open(file) as image:
            for index in wanted:
                with contextlib.suppress(Exception):
                    image.seek(index)
                    yield index, to_rgb(image)
    return count, 1000 * len(milliseconds) / max(sum(milliseconds), 1) or UNKNOWN_RATE, frames


def read_film(file: Path | io.BytesIO) -> tuple[int, float, Callable]:
    try:
        import av
    except ImportError:
        raise InputError("a clip of this kind is read by PyAV, which is not installed: pip install av") from None

    def open_film() -> tuple:
        if isinstance(file, io.BytesIO):
            file.seek(0)                         # others have looked at it
        container = av.open(file if isinstance(file, io.BytesIO) else str(file))
        if not container.streams.video:
            raise InputError("there are no pictures in it")
        return container, container.streams.video[0]

    container, stream = open_film()
    rate, start = float(stream.average_rate or UNKNOWN_RATE), stream.start_time or 0
    count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))      # WebM has to be counted

    def frames(wanted: list[int]) -> Iterator[tuple[int, Image.Image]]:
        container, stream = open_film()
        stream.thread_type = "AUTO"
        decoded, frame, number, errors = container.decode(stream), None, -1, 0
        for index in wanted:
            if index - number > FAR:
                with contextlib.suppress(av.FFmpegError):      # a stream without a container has no places to go to
                    container.seek(start + int(index / rate / stream.time_base), stream=stream)
                    decoded, frame, number = container.decode(stream), None, index - 1
            while frame is None or number < index:
                try:
                    frame = next(decoded)
                    number = number + 1 if frame.pts is None else round((frame.pts - start) * stream.time_base * rate)
                except StopIteration:
                    return
                except av.FFmpegError:           # a damaged stretch: go on behind it
                    errors, decoded = errors + 1, container.decode(stream)
                    if errors > count:
                        return
            yield index, frame.to_image().rotate(frame.rotation, expand=True)
    return count, rate, frames


def stamp(frame: Image.Image, seconds: float, folder: Path) -> Image.Image:
    """The time in the upper left corner, by which the model knows when a frame was: drawn before resizing, so it shrinks
    and grows with the frame. In the font that comes with the checkpoints where it is there, else in pillow's own."""
    size, font = int(min(frame.size) * 0.1), Path(folder) / "Roboto-Regular.ttf"
    if size < 1:
        return frame
    font, frame = ImageFont.truetype(font, size) if font.is_file() else ImageFont.load_default(size), frame.copy()
    ImageDraw.Draw(frame).text((0, 0), timestamp(seconds), fill=(0, 0, 0), font=font, stroke_width=int(size * 0.1),
                               stroke_fill=(255, 255, 255))
    return frame


def timestamp(seconds: float) -> str:
    return f"time: {int(seconds // 3600):02d}:{int(seconds % 3600 // 60):02d}:{seconds % 60:05.2f}"     # 59.996 makes 60.00


# ---------------------------------------------------------------------------------------- 5. conversation -> prompt
class Media(NamedTuple):
    """A picture or clip that has been read. It may stand in a message in place of its path."""

    source: str | Path | Image.Image | Clip      # what was given
    image: Image.Image                           # RGB; of a clip the first frame
    patches: Tensor                              # (t*h*w, 588)
    grid: tuple                                  # (t, h, w) in patches
    note: str                                    # what became of it, for the person who waits


class Prompt(NamedTuple):
    """What `ErnieVL.prepare` takes."""

    ids: list[int]
    patches: Tensor | None      # (N, 588)
    grids: list[tuple]          # one (t, h, w) a picture or clip


KINDS = "text", "image", "image_url", "video", "video_url"


def read_messages(messages: list[dict]) -> list[dict]:
    """A conversation in the format of OpenAI's and Hugging Face's chats -> the same, spelled in one way.

    Every message becomes {"role": "system" | "user" | "assistant" | "tool", "content": a list of {"type": "text", "text":
    ...}, {"type": "image", "image": ...} and {"type": "video", "video": ...}}; an assistant's may have "reasoning_content",
    also cut out of a content that holds it before </think>, and "tool_calls" with arguments as a JSON string. Raises
    InputError for everything else."""
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise InputError('a conversation is a list of messages, [{"role": "user", "content": "Hi"}] for example')
    return [read_message(message) for message in messages]


def read_message(message: dict) -> dict:
    role, content, thought = message.get("role"), message.get("content"), message.get("reasoning_content")
    role = "system" if role == "developer" else role          # OpenAI's newer word
    if role not in ("system", "user", "assistant", "tool"):
        raise InputError(f"a message has the role {role!r}, and system, user, assistant and tool are known")
    if role == "tool" and not isinstance(content, str | None) and not is_items(content):
        content = json.dumps(content, ensure_ascii=False)         # training data has lists of JSON results
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if content is None and role in ("assistant", "tool"):         # a call, or a tool that had nothing to say
        content = []
    if not isinstance(content, list):
        raise InputError(f"the content of a message is a text or a list of items, and this is {content!r}")
    out = {"role": role, "content": [read_item(item) for item in content]}
    if role == "assistant":
        if not all(item["type"] == "text" for item in out["content"]) or not isinstance(thought, str | None):
            raise InputError("an assistant's message holds text, as reasoning_content and as content, and nothing else")
        text = "".join(item["text"] for item in out["content"])
        if thought is None and "</think>" in text:
            thought, _, text = text.removeprefix("<think>").partition("</think>")
        out |= {"content": [{"type": "text", "text": text.lstrip("\n")}], "reasoning_content": (thought or "").strip("\n")}
        if calls := message.get("tool_calls"):
            out["tool_calls"] = [read_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    return out | {key: message[key] for key in ("tool_call_id",) if key in message}


def is_items(content) -> bool:
    return isinstance(content, list) and all(isinstance(item, dict) and item.get("type") in KINDS for item in content)


def read_item(item: dict) -> dict:
    kind, item = (item.get("type"), item) if isinstance(item, dict) else (item, {})
    if kind == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    if kind in KINDS[1:]:
        source = next((item[key] for key in (kind, "url", "path") if item.get(key) is not None), None)
        source = source.get("url") if isinstance(source, dict) else source
        if isinstance(source, (str, Path, Image.Image, Clip, Media)):
            return {"type": kind.removesuffix("_url"), kind.removesuffix("_url"): source}
    raise InputError(f"a message holds an item of type {kind!r} that is no text, image or video with its path or data URI")


def read_call(call: dict) -> dict:
    with contextlib.suppress(TypeError, AttributeError, KeyError, ValueError, RecursionError):
        return tool_call(call["function"], call.get("id"))
    raise InputError('a tool call looks like {"type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}')


def tool_call(function: dict, id: str | None = None) -> dict:
    """{"name": ..., "arguments": an object, or JSON of one} -> a call as OpenAI writes it. Raises ValueError and its like."""
    arguments = function.get("arguments") or {}
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(function["name"], str) or not isinstance(arguments, dict):
        raise ValueError("no call")
    return {"id": id or f"call_{uuid.uuid4().hex[:12]}", "type": "function",
            "function": {"name": function["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}}


def read_tools(tools: list[dict]) -> list[dict]:
    """Tools as OpenAI's API takes them; a bare function is wrapped. Raises InputError for one without a name."""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError('tools are a list, [{"type": "function", "function": {"name": "f", "parameters": {}}}] for example')
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for tool in tools:
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise InputError(f"a tool has no name: {json.dumps(tool, ensure_ascii=False)[:200]}")
    return tools


def load_media(messages: list[dict], folder: Path, max_pixels: int | None = None, fps: float = 2.0, max_frames: int = 180,
               seen: Callable = lambda media: None) -> list[dict]:
    """`read_messages`, with every picture and clip read from its file, resized to the budget of the checkpoint in `folder`,
    which max_pixels may lower. seen(media) is called for each. Raises InputError."""
    messages, options = read_messages(messages), (folder, max_pixels, fps, max_frames)
    for item in (item for message in messages for item in message["content"]):
        kind = item["type"]
        if kind != "text" and not isinstance(item[kind], Media):
            item[kind] = load_item(kind, item[kind], *options)
            seen(item[kind])
    return messages


def load_item(kind: str, source: str | Path | Image.Image | Clip, folder: Path, max_pixels: int | None, fps: float, max_frames: int) -> Media:
    (fewest, most), note = pixel_budget(folder, kind), ""
    if kind == "image":
        frames = [to_rgb(source) if isinstance(source, Image.Image) else load_picture(source)]
    else:
        clip = source if isinstance(source, Clip) else read_clip(source, fps, max_frames)
        frames = [stamp(frame, seconds, folder) for frame, seconds in zip(clip.frames, clip.times)]
        frames += frames[-1:] * (len(frames) % TEMPORAL_MERGE)          # an even number: the last one may be there twice
        note = f"{len(clip.frames)} frame{'s' * (len(clip.frames) != 1)}" + (f" ({clip.lost} more could not be decoded) " if clip.lost else " ")
    with refusing(source, "picture" if kind == "image" else "clip"):
        patches, grid = patchify(frames, fewest, min(most, max_pixels or most))
    image, (_, h, w) = frames[0], grid
    note += f"{image.width} x {image.height} -> {w * PATCH} x {h * PATCH} -> {math.prod(merged(grid)):,} tokens"
    return Media(source, image, patches, grid, note)


def encode_chat(tokenizer: Tokenizer, messages: list[dict], think: bool | None = None, tools: list[dict] = (),
                max_pixels: int | None = None, ask: bool = True) -> Prompt:
    """A conversation, as `read_messages` and `render` take it, -> the prompt. Pictures are paths, data URIs, PIL images or
    what `load_media` made of them. Raises InputError."""
    messages = load_media(messages, tokenizer.folder, max_pixels)
    parts = render(messages, chat_style(tokenizer), think, tools, ask)
    media = [item[item["type"]] for message in messages for item in message["content"] if item["type"] != "text"]
    grids = [m.grid for m in media]
    return Prompt(encode_parts(tokenizer, parts, grids), torch.cat([m.patches for m in media]) if media else None, grids)


def encode_parts(tokenizer: Tokenizer, parts: list[str], grids: list[tuple]) -> list[int]:
    """Text between two control tokens is encoded in one go, however many parts it came in; a placeholder is repeated for
    every token of its picture. Released prompts use the picture's placeholder in clips too. Tags of tools are control
    tokens in some vocabularies and plain text in others."""
    ids, text, counts, special = [], "", iter([math.prod(merged(grid)) for grid in grids]), tokenizer.special
    for part in parts:
        if not isinstance(part, Control) or part not in special and "tool_" in part:
            text += part
            continue
        repeat = next(counts) if part.endswith("_PLACEHOLDER|>") else 1
        part = "<|IMAGE_PLACEHOLDER|>" if part == "<|VIDEO_PLACEHOLDER|>" and part not in special else part
        if part not in special:
            raise InputError(f"the vocabulary of {tokenizer.folder} has no {part}: is it an ERNIE-4.5-VL checkpoint?")
        ids += tokenizer.encode(text) + [special[part]] * repeat
        text = ""
    return ids + tokenizer.encode(text)


# ------------------------------------------------------------------------------------------- 6. generated ids -> reply
class Reply:
    """Text as it is generated -> reasoning, content and tool calls, as soon as it is certain which. A tag may come in
    several pieces, so what could be its beginning waits, and so do newlines, which are dropped around the parts.

    Where the official parsers differ: text before a tool call is kept as content, and <response> is text, since the
    vision-language models do not use it."""

    def __init__(self, thinking: bool):
        self.state, self.waiting, self.newlines = "reasoning" if thinking else "content", "", ""
        self.said, self.tool_calls = {"reasoning": "", "content": ""}, []

    def push(self, text: str, final: bool = False) -> Iterator[tuple[str, str]]:
        """Yields ("reasoning" | "content", text) and ("tool_call", JSON of the call)."""
        self.waiting += text
        while event := {"reasoning": self.think, "content": self.speak, "tool_call": self.call}[self.state](final):
            kind, said = event
            if kind == "tool_call":
                self.tool_calls.append(said)
                yield kind, json.dumps(said, ensure_ascii=False)
            elif said:
                self.said[kind] += said
                yield kind, said

    def follow(self, tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[tuple[str, str]]:
        """The same for generated ids, until they end."""
        stream = Stream(tokenizer, tokenizer.shown)
        for id in ids:
            yield from self.push(stream.push(id))
        yield from self.push(stream.flush(), final=True)

    def think(self, final: bool) -> tuple | None:
        if not self.said["reasoning"]:
            self.waiting = self.waiting.lstrip("\n").removeprefix("<think>").lstrip("\n")
            if self.waiting.startswith("<tool_call>"):       # the model called without closing a thought
                self.state = "content"
                return "reasoning", ""
        return self.until("</think>", "content", final)

    def speak(self, final: bool) -> tuple | None:
        if not self.said["content"]:
            self.waiting = self.waiting.lstrip("\n")
            if not self.said["reasoning"] and self.waiting.startswith("<think>"):      # the prompt did not open it
                self.state = "reasoning"
                return "content", ""
        return self.until("<tool_call>", "tool_call", final)

    def until(self, tag: str, then: str, final: bool) -> tuple | None:
        """What is certainly before the tag; when the tag is there, the state behind it begins."""
        state, (before, found, behind) = self.state, self.waiting.partition(tag)
        if found:
            self.state, self.waiting, self.newlines = then, behind, before[len(before.rstrip("\n")) :]
            return state, before.rstrip("\n")
        tags = (tag,) if self.said[state] else (tag, "<think>", "<tool_call>")        # opening tags count only at the beginning
        maybe = next((i for i in range(len(before)) if any(t.startswith(before[i:]) for t in tags)), len(before))
        certain = before if final else before[:maybe].rstrip("\n")
        self.waiting = before[len(certain) :]
        if final and (state == "reasoning" or self.tool_calls):
            certain = certain.rstrip("\n")
        return (state, certain) if certain else None

    def call(self, final: bool) -> tuple | None:
        """A call ends at </tool_call>, unless that stands in a string of its JSON. One that is no call is text after all."""
        text, ends = f"{self.newlines}<tool_call>", [match.span() for match in re.finditer("</tool_call>", self.waiting)]
        if self.waiting.strip() and self.waiting.lstrip()[0] not in '{"':
            self.state = "content"
            return "content", text
        for begin, end in ends:
            found, unfinished = parse_call(self.waiting[:begin])
            if found:
                self.state, self.waiting = "content", self.waiting[end:]
                return "tool_call", found
            if not unfinished:
                break
        else:
            if not final:
                return None
        begin, end = ends[0] if ends else (len(self.waiting),) * 2
        found, _ = parse_call(self.waiting[:begin], whole=bool(ends))
        text, self.state, self.waiting = text + self.waiting[:end], "content", self.waiting[end:]
        return ("tool_call", found) if found else ("content", text)

    def message(self) -> dict:
        """The reply as a message of OpenAI's format."""
        out = {"role": "assistant", "content": self.said["content"], "reasoning_content": self.said["reasoning"]}
        return out | ({"tool_calls": self.tool_calls} if self.tool_calls else {})


def parse_call(text: str, whole: bool = True) -> tuple[dict | None, bool]:
    """JSON of a call -> the call, or None and whether it breaks off inside a string. An outer brace that a model forgot is
    put back, if the call was closed."""
    unfinished = False
    for front, back in (("", ""), ("{", ""), ("", "}"), ("{", "}"))[: 4 if whole else 1]:
        try:
            call = json.loads(front + text.strip() + back, strict=False)        # models write newlines into strings
            return tool_call({"name": call["name"], "arguments": call["arguments"]}), False
        except json.JSONDecodeError as error:
            unfinished |= error.msg.startswith("Unterminated string")
        except (TypeError, KeyError, ValueError, RecursionError):
            return None, False
    return None, unfinished


# -------------------------------------------------------------------------------------------- 7. boxes, and the zoom
BOX_KEYS = ("bbox_2d", "bbox", "box", "pos")
LABEL_KEYS = ("label", "name", "text", "ref")
CHINESE_FONTS = "NotoSansCJK-Regular.ttc", "PingFang.ttc", "msyh.ttc", "wqy-microhei.ttc", "DroidSansFallback.ttf"
LOCATED = re.compile(r"(?:<ref>([^<]*)</ref>\s*)?(?:<box>(.*?)</box>|<\|LOC_BEGIN\|>(.*?)<\|LOC_END\|>)", re.S)
ZOOM_TOOL = {"type": "function", "function": {
    "name": "image_zoom_in_tool",
    "description": "Zoom in on a part of the picture: crops it to a bounding box, with an optional label of what is there.",
    "parameters": {"type": "object", "properties": {
        "bbox_2d": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4,
                    "description": "[x1, y1, x2, y2], the top left and bottom right corner, from 0 to 1000 of the original picture"},
        "label": {"type": "string", "description": "what is in the box"}}, "required": ["bbox_2d"]},
    "strict": False}}


class Box(NamedTuple):
    label: str
    corners: tuple[float, float, float, float]      # x1, y1, x2, y2 from 0 to 1000 of the picture

    def pixels(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """In a picture of (width, height): int(v / 1000 * side), as Baidu restores them, and inside the picture."""
        return tuple(int(min(max(v / 1000, 0), 1) * side) for v, side in zip(self.corners, size * 2))


def find_boxes(text: str) -> list[Box]:
    """What an answer locates: four numbers in JSON under a key like bbox_2d, or alone; <ref>...</ref><box>(x,y)(x,y)</box>;
    the same with <|LOC_x|> tokens."""
    boxes, at, decoder, opening = [], 0, json.JSONDecoder(), re.compile(r"[\[{]")
    while match := opening.search(text, at):
        try:
            value, at = decoder.raw_decode(text, match.start())
            boxes += boxes_in(value)
        except (ValueError, RecursionError):
            at = match.end()
    for label, *places in LOCATED.findall(text):
        for place in "".join(places).split("<|LOC_SEP|>"):
            numbers = list(map(float, re.findall(r"\d+(?:\.\d+)?", place)))
            if len(numbers) >= 4:
                xs, ys = numbers[0::2], numbers[1::2]
                boxes.append(Box(label, (min(xs), min(ys), max(xs), max(ys))))
    return boxes


def boxes_in(value, label: str = "") -> list[Box]:
    if isinstance(value, dict):
        label = next((value[key] for key in LABEL_KEYS if isinstance(value.get(key), str)), label)
        value = next(([value[key]] for key in BOX_KEYS if key in value), [[part] for part in value.values()])
    if not isinstance(value, list):
        return []
    if len(value) == 4 and all(type(v) in (int, float) and 0 <= v <= 1100 for v in value):      # models overshoot the edge
        x1, y1, x2, y2 = value
        return [Box(label, (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))]
    return [box for part in value for box in boxes_in(part, label)]


def draw_boxes(image: Image.Image, boxes: list[Box]) -> Image.Image:
    """The picture with its boxes, enlarged until labels can be read on it. Lines are coloured on black, labels black on
    that colour, so that both stand out on any background."""
    scale = max(1, math.ceil(448 / min(image.size)))
    image = image.resize((image.width * scale, image.height * scale), Image.LANCZOS)
    draw, size = ImageDraw.Draw(image), max(14, min(image.size) // 32)
    line = max(2, size // 6)
    for i, box in enumerate(boxes):
        colour = ("#ffd400", "#00e5ff", "#ff7ad9", "#7dff5a", "#ff9a3c", "#c3a6ff")[i % 6]
        x1, y1, x2, y2 = box.pixels(image.size)
        for width, paint in ((2 * line, "black"), (line, colour)):
            draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=paint, width=width)
        if label := " ".join(box.label.split()):      # pillow measures one line
            font = label_font(label, size)
            while len(label) > 1 and draw.textlength(label, font) > image.width - size:
                label = f"{label[:-2]}…"
            left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
            width, height = right - left + size // 2, bottom - top + size // 2
            x = max(0, min(x1, image.width - width))
            y = y1 - height if y1 >= height else min(y1, image.height - height)
            draw.rectangle((x, y, x + width, y + height), fill=colour)
            draw.text((x + size // 4 - left, y + size // 4 - top), label, fill="black", font=font)
    return image


def label_font(label: str, size: int) -> ImageFont.FreeTypeFont:
    """pillow's own font has no Chinese; the usual systems' fonts have."""
    for name in CHINESE_FONTS if not label.isascii() else ():
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def crop(image: Image.Image, box) -> Image.Image:
    """What image_zoom_in_tool shows of a picture. Corners outside are moved to its edge, and a box smaller than a token
    grows to 28 pixels. Raises InputError for what is no box, with the sentence that the model reads."""
    if not (isinstance(box, list | tuple) and len(box) == 4 and all(type(v) in (int, float) and abs(v) < 1e9 for v in box)):
        raise InputError("bbox_2d must be four numbers [x1, y1, x2, y2] from 0 to 1000.")
    if box[0] >= box[2] or box[1] >= box[3]:
        raise InputError(f"bbox_2d {box} is empty or reversed: x1 must be less than x2, and y1 less than y2.")
    if box[0] >= 1000 or box[1] >= 1000 or box[2] <= 0 or box[3] <= 0:
        raise InputError(f"bbox_2d {box} lies outside of the picture, which reaches from 0 to 1000.")
    x1, y1, x2, y2 = Box("", tuple(box)).pixels(image.size)
    (x1, x2), (y1, y2) = grown(x1, x2, image.width), grown(y1, y2, image.height)
    return image.crop((x1, y1, x2, y2))


def grown(begin: int, end: int, side: int) -> tuple[int, int]:
    missing = max(0, min(FACTOR, side) - (end - begin))
    begin = min(max(0, begin - missing // 2), side - (end - begin) - missing)
    return begin, max(end, begin + min(FACTOR, side))
