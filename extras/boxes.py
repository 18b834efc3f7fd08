"""Boxes in answers: finding them, drawing them on an image, and cropping an image to one, as the zoom tool does. Their
corners are numbers from 0 to 1000 of the image's width and height."""
import contextlib
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ernie_vl import require
from tokenizer import FACTOR, Media

BOX_KEYS, LABEL_KEYS = ("bbox_2d", "bbox", "box", "pos"), ("label", "name", "text", "ref")
LARGEST = 1100      # of a corner in an answer: models overshoot the edge a little, and larger numbers are no box
LOCATED = re.compile(r"(?:<ref>([^<]*)</ref>\s*)?(?:<box>(.*?)</box>|<\|LOC_BEGIN\|>(.*?)<\|LOC_END\|>)", re.S)
COLOURS = ("#ffd400", "#00e5ff", "#ff7ad9", "#7dff5a", "#ff9a3c", "#c3a6ff")
READABLE = 448      # pixels of the shorter side, below which an image is enlarged until labels can be read on it
CHINESE_FONTS = ("NotoSansCJK-Regular.ttc", "PingFang.ttc", "msyh.ttc", "wqy-microhei.ttc", "DroidSansFallback.ttf")
# Word for word what tiny/ was trained with: the model reads it, so a better sentence would be a worse one.
ZOOM_TOOL = {"type": "function", "function": {
    "name": "image_zoom_in_tool",
    "description":
        "Zoom in on a part of the picture: crops it to a bounding box, with an optional label of what is there.",
    "parameters": {"type": "object", "properties": {
        "bbox_2d": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4, "description":
                    "[x1, y1, x2, y2], the top left and bottom right corner, from 0 to 1000 of the original picture"},
        "label": {"type": "string", "description": "what is in the box"}}, "required": ["bbox_2d"]},
    "strict": False}}


class Box(NamedTuple):
    """A labelled place in an image."""

    label: str
    corners: tuple[float, float, float, float]      # x1, y1, x2, y2 from 0 to 1000

    def pixels(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """In an image of (width, height): int(v / 1000 * side), as Baidu's own code does it, and inside the image."""
        return tuple(int(min(max(v / 1000, 0), 1) * side) for v, side in zip(self.corners, size * 2))


def find_boxes(text: str) -> list[Box]:
    """What an answer locates: four numbers in JSON, under a key like bbox_2d or alone; points of
    <ref>...</ref><box>(x,y)(x,y)</box>; the same with <|LOC_x|> tokens."""
    boxes = boxes_in_json(text)
    for label, *places in LOCATED.findall(text):
        points = [re.findall(r"\d+(?:\.\d+)?", place) for place in "".join(places).split("<|LOC_SEP|>")]
        boxes += [bounding_box(label, list(map(float, numbers))) for numbers in points if len(numbers) >= 4]
    return boxes


def find_boxes_in(message: dict) -> list[Box]:
    """The same for an assistant's message as `messages.read_messages` returns it."""
    return find_boxes("".join(message["content"]))


def boxes_in_json(text: str) -> list[Box]:
    boxes, start, decoder, opening = [], 0, json.JSONDecoder(), re.compile(r"[\[{]")
    while match := opening.search(text, start):
        start = match.end()
        with contextlib.suppress(ValueError, RecursionError):
            value, end = decoder.raw_decode(text, match.start())
            boxes += boxes_in(value)
            start = end
    return boxes


def boxes_in(value, label: str = "") -> list[Box]:
    """Boxes anywhere in a JSON value. A label holds for all that lies deeper, until there is another."""
    if isinstance(value, dict):
        label = next((value[key] for key in LABEL_KEYS if isinstance(value.get(key), str)), label)
        # A list around each value, so that four counts in an object are not taken for corners.
        value = next(([value[key]] for key in BOX_KEYS if key in value), [[part] for part in value.values()])
    if are_corners(value, 0, LARGEST):
        return [bounding_box(label, value)]
    return [box for part in value for box in boxes_in(part, label)] if isinstance(value, list) else []


def are_corners(value, least: float, most: float) -> bool:
    numbers = isinstance(value, list | tuple) and all(type(v) in (int, float) and least <= v <= most for v in value)
    return numbers and len(value) == 4


def bounding_box(label: str, points: list[float]) -> Box:
    xs, ys = points[0::2], points[1::2]      # x, y, x, y, ...
    return Box(label, (min(xs), min(ys), max(xs), max(ys)))


def check_boxes_path(path: Path) -> None:
    """Raises InputError for a file that --boxes cannot write."""
    require(path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"), f"{path} must end in .png, .jpg or .webp")


def draw_boxes(image: Image.Image, boxes: list[Box]) -> Image.Image:
    """The image with its boxes, enlarged until labels can be read. Lines are coloured on black, labels black on that
    colour, so that both stand out on any background."""
    scale = max(1, math.ceil(READABLE / min(image.size)))
    image = image.resize((image.width * scale, image.height * scale), Image.LANCZOS)
    draw, size = ImageDraw.Draw(image), max(14, min(image.size) // 32)
    line = max(2, size // 6)
    for i, box in enumerate(boxes):
        colour, (x1, y1, x2, y2) = COLOURS[i % len(COLOURS)], box.pixels(image.size)
        for width, paint in ((2 * line, "black"), (line, colour)):
            draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=paint, width=width)
        if label := " ".join(box.label.split()):      # pillow measures one line only
            draw_label(draw, image.size, label, (x1, y1), size, colour)
    return image


def draw_label(draw: ImageDraw.ImageDraw, image_size: tuple, label: str, corner: tuple, size: int, colour: str) -> None:
    """Above the corner where there is room, else below it, and never over an edge of the image."""
    (image_width, image_height), (x, y), font = image_size, corner, label_font(label, size)
    while len(label) > 1 and draw.textlength(label, font) > image_width - size:
        label = f"{label[:-2]}…"
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    width, height = right - left + size // 2, bottom - top + size // 2
    x = max(0, min(x, image_width - width))
    y = y - height if y >= height else min(y, image_height - height)
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + size // 4 - left, y + size // 4 - top), label, fill="black", font=font)


def label_font(label: str, size: int) -> ImageFont.FreeTypeFont:
    """pillow's own font has no Chinese; the usual systems' fonts have."""
    for name in () if label.isascii() else CHINESE_FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def is_zoom(call: dict) -> bool:
    return call["function"]["name"] == ZOOM_TOOL["function"]["name"]


def last_image(messages: list[dict]) -> Media | None:
    """The image that a zoom or --boxes refers to, since neither says which: the last one that the user has shown."""
    items = [item for message in messages if message["role"] == "user" for item in message["content"]]
    return next((item for item in reversed(items) if isinstance(item, Media) and item.kind == "image"), None)


def crop(image: Image.Image, box) -> Image.Image:
    """What image_zoom_in_tool shows of an image. Corners outside are moved to its edge, and a box smaller than a token
    grows to 28 pixels. Raises InputError for what is no box, with the sentence that the model reads."""
    require(are_corners(box, -1e9, 1e9), "bbox_2d must be four numbers [x1, y1, x2, y2] from 0 to 1000.")
    x1, y1, x2, y2 = box
    require(x1 < x2 and y1 < y2, f"bbox_2d {box} is empty or reversed: x1 must be less than x2, and y1 less than y2.")
    outside = max(x1, y1) >= 1000 or min(x2, y2) <= 0
    require(not outside, f"bbox_2d {box} lies outside of the image, which reaches from 0 to 1000.")
    x1, y1, x2, y2 = Box("", tuple(box)).pixels(image.size)
    (x1, x2), (y1, y2) = expand_interval(x1, x2, image.width), expand_interval(y1, y2, image.height)
    return image.crop((x1, y1, x2, y2))


def expand_interval(begin: int, end: int, side: int) -> tuple[int, int]:
    """An interval of at least one token's 28 pixels around the given one, inside of 0 to side."""
    length = max(end - begin, min(FACTOR, side))
    begin = max(0, min(begin - (length - (end - begin)) // 2, side - length))
    return begin, begin + length
