"""Draws images and videos and says what is true about them: the world of the tiny checkpoint.

    python tiny/scenes.py OUT.png     draws some of every skill, with questions and answers

A skill is a function of a random.Random and a Look that returns an Example; the same seed draws the same one. To teach
another skill, write it, list it in SKILLS, give it a share in train.py and a goal in evaluate.py. What is in PRACTICE
is trained on, and not measured. Questions and answers say picture and clip, because the checkpoint learned these words.
"""
import io
import itertools
import json
import math
import random
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.append(str(Path(__file__).resolve().parent.parent))

from extras.boxes import ZOOM_TOOL, crop                                               # noqa: E402
from extras.messages import media_loader, plain_messages, read_messages                # noqa: E402
from extras.video import Video                                                         # noqa: E402
from tokenizer import Prompt, Tokenizer, encode_chat                                   # noqa: E402

COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 210), "yellow": (240, 205, 40),
           "purple": (130, 50, 170), "black": (25, 25, 25)}
SHAPES = ("circle", "square", "triangle", "star")
PLACES = ("at the top left", "at the top", "at the top right", "on the left", "in the middle", "on the right",
          "at the bottom left", "at the bottom", "at the bottom right")      # the cells of a 3 x 3 grid, row by row
CLEAR = "ABCDEFGHJKLMNPQRSTUVWXYZ"
SMOOTH = 2      # drawn so many times larger and scaled down, for soft edges


class Look(NamedTuple):
    """What a camera and a file format do to an image."""

    turn: float = 0.0         # degrees, counter-clockwise
    noise: float = 0.0        # standard deviation of the pixels' error, of 255
    quality: int = 0          # of JPEG; 0: not compressed


class Example(NamedTuple):
    messages: list[dict]      # up to the answer, in the format that extras.messages.read_messages takes
    answer: str               # as the model writes it, thoughts included
    think: bool = False
    tools: tuple = ()
    more: tuple = ()          # (skill, question, answer) about the same image, asked in the same conversation
    truth: str = ""           # zoom: what the print says, and `answer` is the call


class Thing(NamedTuple):
    colour: str
    shape: str
    x: float                  # centre, in parts of the image's width and height
    y: float
    radius: float             # in parts of its shorter side
    cell: int = 0             # which of PLACES
    turn: float = 0.0         # radians

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def encode(tokenizer: Tokenizer, example: Example) -> Prompt:
    """The prompt of an example, its images and videos resized for the tokenizer's checkpoint."""
    messages = read_messages(example.messages, media_loader(tokenizer.folder))
    return encode_chat(tokenizer, plain_messages(messages, example.tools, tokenizer), example.think)


# ---------------------------------------------------------------------------------------------------- drawing
def any_look(rng: random.Random) -> Look:
    """Three in ten of what is trained on are clean, the others are not."""
    if rng.random() < 0.3:
        return Look()
    turn = rng.uniform(-7, 7) * (rng.random() < 0.85)
    return Look(turn, rng.choice([0, rng.uniform(2, 10)]), rng.choice([0, rng.randint(45, 90)]))


def spoil(image: Image.Image, look: Look, seed: int) -> Image.Image:
    if look.turn:
        image = image.rotate(look.turn, Image.BILINEAR, fillcolor=image.getpixel((1, 1)))
    if look.noise:
        noise = np.random.default_rng(seed).standard_normal((image.height, image.width, 3), np.float32)
        image = Image.fromarray((np.asarray(image) + look.noise * noise).round().clip(0, 255).astype(np.uint8))
    if look.quality:
        image.save(file := io.BytesIO(), "JPEG", quality=look.quality)
        image = Image.open(file).convert("RGB")
    return image


def outline(thing: Thing, width: int, height: int) -> list[tuple]:
    """Corners of a thing in pixels. All shapes look equally large."""
    corners, reach = {"square": (4, (1.15,)), "triangle": (3, (1.25,)), "star": (10, (1.3, 0.55)),
                      "circle": (48, (1.0,))}[thing.shape]
    start = math.pi / 4 if thing.shape == "square" else -math.pi / 2
    x, y, r = thing.x * width, thing.y * height, thing.radius * min(width, height)
    angles = [start + thing.turn + 2 * math.pi * i / corners for i in range(corners)]
    return [(x + r * reach[i % len(reach)] * math.cos(a), y + r * reach[i % len(reach)] * math.sin(a))
            for i, a in enumerate(angles)]


def pale(rng: random.Random) -> tuple:
    return tuple(rng.randint(205, 255) for _ in range(3))


def off(colour: str, rng: random.Random) -> tuple:
    """A colour a little off its name."""
    return tuple(max(0, min(255, c + rng.randint(-22, 22))) for c in COLOURS[colour])


def size_of(rng: random.Random, low: int = 105, high: int = 200) -> tuple[int, int]:
    width = rng.randint(low, high)
    return width, round(width * rng.uniform(0.85, 1.18))


def frame_size(rng: random.Random) -> tuple[int, int]:
    """Three videos in four are square, so that the figures of their stamps mostly stand where they stood before."""
    side = 10 * rng.randint(14, 20)
    return (side, side) if rng.random() < 0.75 else size_of(rng, 130, 200)


def draw(things: list[Thing], rng: random.Random, look: Look, size: tuple, background: tuple) -> Image.Image:
    image = Image.new("RGB", (size[0] * SMOOTH, size[1] * SMOOTH), background)
    for thing in things:
        ImageDraw.Draw(image).polygon(outline(thing, *image.size), fill=off(thing.colour, rng))
    return spoil(image.reduce(SMOOTH), look, rng.getrandbits(32))


def box_in(corners: list[tuple], size: tuple, look: Look, margin: float = 0.0) -> list[int]:
    """[x1, y1, x2, y2] of what has these corners, 0 to 1000 and in tens, after the image was turned about its centre.
    margin: added on all sides, in parts of the image."""
    a, (cx, cy) = math.radians(-look.turn), (size[0] / 2, size[1] / 2)
    turned = [(cx + (x - cx) * math.cos(a) - (y - cy) * math.sin(a),
               cy + (x - cx) * math.sin(a) + (y - cy) * math.cos(a)) for x, y in corners]
    xs, ys = ([v[axis] / size[axis] for v in turned] for axis in (0, 1))
    ends = min(xs) - margin, min(ys) - margin, max(xs) + margin, max(ys) + margin
    return [min(1000, max(0, round(v * 100) * 10)) for v in ends]


def letters(text: str, bold: int, bitmap: bool) -> Image.Image:
    """White on black, cut to what was drawn."""
    font = ImageFont.load_default_imagefont() if bitmap else ImageFont.load_default(48)
    image = Image.new("L", (60 * len(text) + 20, 80))
    ImageDraw.Draw(image).text((10, 10), text, 255, font, stroke_width=0 if bitmap else bold)
    return image.crop(image.getbbox())


def lettering(text: str, rng: random.Random, height: int) -> Image.Image:
    """A word as a mask of about this height: one of two fonts, light or bold, upright or slanted, narrow or wide."""
    upright = letters(text, rng.choice([0, 0, 1, 2]), rng.random() < 0.25)
    slant = rng.choice([0, 0, rng.uniform(-0.1, 0.3)])
    width = max(4, round(upright.width / upright.height * height * rng.uniform(0.85, 1.25)))
    mask = upright.resize((width, height), rng.choice([Image.LANCZOS, Image.BILINEAR]))
    lean = round(abs(slant) * height)
    if lean:
        shear = (1, slant, -lean if slant > 0 else 0, 0, 1, 0)
        mask = mask.transform((width + lean, height), Image.AFFINE, shear, Image.BICUBIC)
    return mask


def sign(text: str, rng: random.Random, height: int) -> Image.Image:
    """Print of this height on a plate with a dark edge."""
    mask, (ink, ground) = lettering(text, rng, height), inks(rng)
    plate = Image.new("RGB", (mask.width + rng.randint(14, 34), mask.height + rng.randint(12, 26)), ground)
    ImageDraw.Draw(plate).rectangle((0, 0, plate.width - 1, plate.height - 1), None, off("black", rng), 2)
    plate.paste(ink, ((plate.width - mask.width) // 2, (plate.height - mask.height) // 2), mask)
    return plate


def inks(rng: random.Random) -> tuple[tuple, tuple]:
    """Dark on pale, or now and then pale on dark: (print, ground)."""
    dark = off(rng.choice(["red", "green", "blue", "purple", "black", "black"]), rng)
    return (dark, pale(rng)) if rng.random() < 0.75 else (pale(rng), tuple(c * 3 // 4 for c in dark))


def paste(image: Image.Image, print_: Image.Image | tuple, rng: random.Random, edge: int = 0,
          mask: Image.Image | None = None) -> None:
    """Puts an image, or a colour where the mask is white, anywhere on another, `edge` pixels or more from its edges."""
    width, height = (mask or print_).size
    x = rng.randint(edge, image.width - width - edge)
    image.paste(print_, (x, rng.randint(edge, image.height - height - edge)), mask)


# ------------------------------------------------------------------------------------------------- what is there
def scatter(rng: random.Random, kinds: list[tuple]) -> list[Thing]:
    """Things of these kinds in cells of the grid, in reading order; large ones if they are few, and none on another."""
    sizes = {1: (0.13, 0.24), 2: (0.12, 0.18), 3: (0.11, 0.15)}.get(len(kinds), (0.085, 0.11))
    off_by = 0.05 if len(kinds) <= 3 else 0.03
    while True:
        things = []
        for kind, cell in zip(kinds, sorted(rng.sample(range(9), len(kinds)))):
            radius = rng.uniform(*sizes)
            x, y = (0.2 + 0.3 * v + rng.uniform(-off_by, off_by) for v in (cell % 3, cell // 3))
            x, y = (min(max(v, 1.2 * radius), 1 - 1.2 * radius) for v in (x, y))
            things.append(Thing(*kind, x, y, radius, cell, rng.uniform(-0.12, 0.12)))
        if all(math.dist(a[2:4], b[2:4]) > 1.1 * (a.radius + b.radius) for a, b in itertools.combinations(things, 2)):
            return things


def some_kinds(rng: random.Random, count: int) -> list[tuple]:
    """Different kinds of things: (colour, shape)."""
    return rng.sample([*itertools.product(COLOURS, SHAPES)], count)


def joined(items: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


def listing(things: list[Thing]) -> str:
    return joined([f"a {thing.name} {PLACES[thing.cell]}" for thing in things])


def aloud(things: list[Thing], says, belongs=lambda thing: False) -> str:
    """From place to place what is there, as far as it matters, and after a thing that belongs how many there were so
    far: so it counts with its finger."""
    said, count = [], 0
    for thing in things:
        count += belongs(thing)
        said.append(f"{PLACES[thing.cell]} {says(thing)}" + f" ({count})" * belongs(thing))
    return ", ".join(said)


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "." * (text[-1] != "}")


def word(rng: random.Random, longest: int = 6) -> str:
    """Digits, or letters: any, or such as can be spoken."""
    length, kind = rng.randint(1, longest), rng.random()
    if kind < 0.4:
        return "".join(rng.choices("0123456789", k=length))
    if kind < 0.7:
        # I and O alone could be numbers
        return "".join([rng.choice(CLEAR), *rng.choices(CLEAR + "IO", k=length - 1)])
    return "".join(rng.choice("AEIOU" if i % 2 else "BCDFGHJKLMNPRSTVWZ") for i in range(length))


# ---------------------------------------------------- questions about a scene: (rng, things, box) -> question, answer
def ask_describe(rng, things, box):
    question = rng.choice(["Describe this image.", "Describe the picture.", "What is in this picture?",
                           "What do you see?", "What is in the image?"])
    return question, sentence(listing(things))


WHERE = ["Where is the {}?", "Where do you see the {}?"]


def seek(things: list[Thing], colour: str, shape: str = "", answer: str = "") -> str:
    """It looks at one thing after the other before it says where it is: to know at once is more than it learns."""
    _, says, belongs = groups(colour, shape)[0 if shape else 2]
    return sentence(f"{aloud(things, says, belongs)}: {answer or f'no {colour} {shape}'}")


def ask_part(rng, things, box):
    """One property of a thing by another."""
    thing, where = rng.choice(things), rng.choice(WHERE)
    colour, shape, cell = thing[0], thing[1], thing.cell
    asks = [(f"What is {PLACES[cell]}?", f"A {thing.name}."),
            (f"What colour is the thing {PLACES[cell]}?", sentence(colour))]
    unique = lambda *same: sum(set(same) <= set(other[:2]) for other in things) == 1
    if unique(colour, shape):
        asks += 2 * [(where.format(thing.name), seek(things, colour, shape, PLACES[cell]))]
    if unique(colour):
        asks += 2 * [(where.format(f"{colour} thing"), seek(things, colour, answer=PLACES[cell]))]
        asks += [(f"What shape is the {colour} thing?", f"The {colour} thing is a {shape}.")]
    if unique(shape):
        asks += 2 * [(where.format(shape), f"The {shape} is {PLACES[cell]}.")]
        asks += [(f"What colour is the {shape}?", f"The {shape} is {colour}.")]
    return rng.choice(asks)


COUNT = ["How many {} are there?", "How many {} do you see?", "Count the {}."]
COUNT_BY_COLOUR = ["How many things are {}?", "How many are {}?", "Count what is {}."]


def groups(colour: str, shape: str) -> list[tuple]:
    """What can be counted: (questions, what of a thing says whether it belongs, whether a thing or kind belongs)."""
    return [([q.format(f"{colour} {shape}s") for q in COUNT],
             lambda thing: thing.name if thing.colour == colour else thing.colour,
             lambda it: it[:2] == (colour, shape)),
            ([q.format(f"{shape}s") for q in COUNT], lambda thing: f"a {thing.shape}", lambda it: it[1] == shape),
            ([q.format(colour) for q in COUNT_BY_COLOUR], lambda thing: thing.colour, lambda it: it[0] == colour)]


def ask_number(rng, things, questions, says, belongs):
    return rng.choice(questions), sentence(f"{aloud(things, says, belongs)}: {sum(map(belongs, things))}")


def ask_count(rng, things, box):
    kind = rng.choice(things)[:2] if rng.random() < 0.7 else some_kinds(rng, 1)[0]
    return ask_number(rng, things, *rng.choice(groups(*kind)))


LOCATE = ["Locate the {}.", "Find the {} and give its box.", "Give the bounding box of the {}.",
          "Where is the {}? Answer with bbox_2d."]


def ask_locate(rng, things, box):
    thing = rng.choice([t for t in things if sum(t.name == other.name for other in things) == 1])
    answer = json.dumps({"bbox_2d": box(thing), "label": thing.name})
    return rng.choice(LOCATE).format(thing.name), seek(things, *thing[:2], answer=answer)


def ask_absent(rng, things, box):
    there = {thing[:2] for thing in things}
    colour, shape = rng.choice([kind for kind in itertools.product(COLOURS, SHAPES) if kind not in there])
    return rng.choice([*WHERE, *LOCATE] if box else WHERE).format(f"{colour} {shape}"), seek(things, colour, shape)


def ask_decline(rng, things, box):
    return ask_absent(rng, things, box) if rng.random() < 0.9 else (rng.choice(READ), "There is no text.")


def ask_think(rng, things, box):
    """Reasoning and answer, parted by </think>."""
    (colour, shape), dice = rng.choice(things)[:2], rng.random()
    _, by_shape, by_colour = groups(colour, shape)
    if dice < 0.75:
        questions, says, belongs = by_colour if dice < 0.25 else by_shape
        question, number, thought = rng.choice(questions), sum(map(belongs, things)), aloud(things, says, belongs)
        answer = f"{number}"
        if dice > 0.5:
            question, answer = f"Is there more than one {shape}?", "Yes." if number > 1 else "No."
    else:
        cell = rng.choice(things).cell if rng.random() < 0.9 else rng.randrange(9)
        question, thought = f"What is {PLACES[cell]}?", aloud(things, lambda thing: f"a {thing.name}")
        answer = next((f"A {thing.name}." for thing in things if thing.cell == cell), "Nothing.")
    return question, f"\n{sentence(thought)}\n</think>\n\n{answer}"


READ = ["Read the text.", "What does it say?", "What is written here?", "What does the sign say?", "Read this."]


# ------------------------------------------------------------------------------------------------------- skills
def user(rng: random.Random, question: str, *media) -> list[dict]:
    """Three times in four the question comes first, as the command line puts it."""
    items = [{"type": "video", "video": m} if isinstance(m, Video) else {"type": "image", "image": m} for m in media]
    text = [{"type": "text", "text": question}]
    return [{"role": "user", "content": [*text, *items] if rng.random() < 0.75 else [*items, *text]}]


def about(ask, rng: random.Random, look: Look, kinds: list[tuple], further: list[str], seen: bool = True) -> Example:
    """A scene that is seen, or told in words, a question about it, and up to six more."""
    things, size = scatter(rng, kinds), size_of(rng)
    images, box = [], None
    if seen:
        images = [draw(things, rng, look, size, pale(rng))]
        box = lambda thing: box_in(outline(thing, *size), size, look)
    question, answer = ask(rng, things, box)
    names = rng.choices(further, k=rng.randint(2, 6)) if further else []
    more = tuple((name, *ASK[name](rng, things, box)) for name in names)
    if not seen:
        question = f"There is {listing(things)}. {question}"
    return Example(user(rng, question, *images), answer, think=ask is ask_think, more=more)


ASK = {"ask": ask_part, "count": ask_count, "locate": ask_locate, "decline": ask_decline, "absent": ask_absent}
FURTHER = {"scene": [*6 * ["ask"], "count", "locate", "decline", "decline"],      # what else is asked
           "count": ["ask", "ask", "decline"], "told": ["ask", "ask", "count", "absent"], "think": []}


def describe(rng, look):
    return about(ask_describe, rng, look, some_kinds(rng, rng.randint(1, 3)), FURTHER["scene"])


def ask(rng, look):
    """Not a skill of the table, but a part of most: one property of a thing by another."""
    return about(ask_part, rng, look, some_kinds(rng, rng.randint(1, 3)), FURTHER["scene"])


def told(rng, look):
    """The same without an image: what is there is said in words."""
    things = [rng.choice(some_kinds(rng, 4)) for _ in range(rng.randint(1, 4))]
    return about(rng.choice([ask_part, ask_count, ask_absent]), rng, look, things, FURTHER["told"], seen=False)


def locate(rng, look):
    return about(ask_locate, rng, look, some_kinds(rng, rng.randint(1, 3)), FURTHER["scene"])


def decline(rng, look):
    if (dice := rng.random()) < 0.8:
        return about(ask_decline, rng, look, some_kinds(rng, rng.randint(1, 3)), FURTHER["scene"])
    if dice < 0.9:
        image, _, _ = small_print(rng, look)
        return Example(user(rng, rng.choice(READ), image), "The print is too small to read.")
    question = rng.choice([ask_describe(rng, scatter(rng, some_kinds(rng, 1)), None)[0], rng.choice(READ)])
    return Example(user(rng, question), "I see no picture.")


def think(rng, look):
    kinds = [rng.choice(some_kinds(rng, 3)) for _ in range(rng.randint(2, 3))]
    return about(ask_think, rng, look, kinds, FURTHER["think"])


def count(rng, look):
    """As often none as five, so that no number is a good guess."""
    questions, says, belongs = rng.choice(groups(*some_kinds(rng, 1)[0]))
    every = [*itertools.product(COLOURS, SHAPES)]
    n, rest = rng.randint(0, 5), rng.randint(0, 3)
    kinds = rng.choices([kind for kind in every if belongs(kind)], k=n)
    kinds += rng.choices([kind for kind in every if not belongs(kind)], k=rest or not n)
    rng.shuffle(kinds)
    ask_this = lambda rng, things, box: ask_number(rng, things, questions, says, belongs)
    return about(ask_this, rng, look, kinds, FURTHER["count"])


def read(rng, look):
    if rng.random() < 0.4:      # as in what a zoom gives
        text = word(rng, 4)
        plate = sign(text, rng, rng.randint(22, 30))
        size = max(105, plate.width + rng.randint(20, 90)), max(90, plate.height + rng.randint(20, 80))
        image = Image.new("RGB", size, pale(rng))
        paste(image, plate, rng)
    else:
        text, (ink, ground) = word(rng), inks(rng)
        mask = lettering(text, rng, rng.randint(18, 40))
        edge = 4 + mask.width // 16      # so that an image that is turned does not lose a corner of its word
        size = max(70, mask.width + 2 * edge + rng.randint(2, 30)), mask.height + 2 * edge + rng.randint(2, 30)
        image = Image.new("RGB", size, ground)
        paste(image, ink, rng, edge, mask)
    return Example(user(rng, rng.choice(READ), spoil(image, look, rng.getrandbits(32))), text)


def compare(rng, look):
    """Two images of one scene, and in the second one thing is another, elsewhere, gone or new."""
    things, size, background = scatter(rng, some_kinds(rng, rng.randint(2, 3))), size_of(rng, 105, 150), pale(rng)
    i = rng.randrange(len(things))
    thing = things[i]
    change = rng.choice(["colour", "shape", "gone", "new"])
    after = [*things]
    if change in ("gone", "new"):
        after.pop(i)
        answer = f"The {thing.name} is gone." if change == "gone" else f"A {thing.name} is new."
    else:
        colour = rng.choice([c for c in COLOURS if c != thing.colour]) if change == "colour" else thing.colour
        shape = rng.choice([s for s in SHAPES if s != thing.shape]) if change == "shape" else thing.shape
        after[i] = thing._replace(colour=colour, shape=shape)
        answer = f"The {thing.name} is now a {after[i].name}."
    scenes = (after, things) if change == "new" else (things, after)
    images = [draw(scene, rng, look, size, background) for scene in scenes]
    questions = ["What changed?", "What is different in the second picture?", "Compare the two pictures."]
    return Example(user(rng, rng.choice(questions), *images), answer)


def watch(rng, look):
    """A thing moves, or two come one after the other; what happens when is told by the time stamp on a frame."""
    frames, size, background = min(rng.randint(2, 8), rng.randint(2, 8)), frame_size(rng), pale(rng)
    step = rng.choice([0.5, 1, 10])
    a, b = (Thing(*kind, *spot, rng.uniform(0.1, 0.13)) for kind, spot in
            zip(some_kinds(rng, 2), rng.sample([(x, y) for x in (0.2, 0.5, 0.8) for y in (0.4, 0.75)], 2)))
    if rng.random() < 0.4:
        way, dx, dy = rng.choice([("to the left", -1, 0), ("to the right", 1, 0), ("up", 0, -1), ("down", 0, 1)])
        far, x, y = rng.uniform(0.2, 0.28), rng.uniform(0.4, 0.6), rng.uniform(0.5, 0.65)
        path = [2 * i / (frames - 1) - 1 for i in range(frames)]
        shown = [[a._replace(x=x + dx * far * p, y=y + dy * far * 0.8 * p)] for p in path]
        question = rng.choice(["Which way does the {} move?", "Where does the {} go?"]).format(a.name)
        answer = sentence(way)
    else:
        starts = sorted(rng.sample(range(frames), 2))
        shown = [[thing for thing, start in zip((a, b), starts) if i >= start] for i in range(frames)]
        late = rng.randrange(2)
        question, answer = rng.choice([
            (rng.choice(["What comes first?", "Which thing comes first?"]), f"The {a.name}."),
            (rng.choice(["When does the {} appear?", "At what time does the {} come?"]).format((a, b)[late].name),
             f"Frames are {step:.1f} seconds apart, and the {(a, b)[late].name} comes in frame {starts[late] + 1}: "
             f"at {starts[late] * step:.1f} seconds.")])
    images = [draw(scene, rng, look, size, background) for scene in shown]
    more = [("stamps", "How far apart are the frames?", f"{step:.1f} seconds."),
            ("stamps", "How long is the clip?", f"{(frames - 1) * step:.1f} seconds.")]
    video = Video(images, [i * step for i in range(frames)])
    return Example(user(rng, question, video), answer, more=tuple(rng.sample(more, 2)))


def clock(rng, look):
    """What time two frames show. For practice: *when* takes a glance at one figure of a stamp, by which alone none is
    learned, so most of these frames say their time in larger print, too, which the model reads before the stamps."""
    size, height = frame_size(rng), rng.randint(14, 36)
    times = sorted(rng.choice([1, 1, 2, 20]) * rng.randint(0, 159) / 2 % 80 for _ in range(2))
    frames = [draw([Thing(*kind, 0.6, 0.7, rng.uniform(0.1, 0.2))], rng, look, size, pale(rng))
              for kind in some_kinds(rng, 2)]
    for frame, seconds in zip(frames, times) if rng.random() < 0.75 else ():
        figures = letters(f"{seconds:.1f}", 0, False)
        figures = figures.resize((round(figures.width / figures.height * height), height), Image.LANCZOS)
        frame.paste(off("black", rng), (rng.randint(4, 30), rng.randint(24, 40)), figures)
    messages = user(rng, "What times do the frames show?", Video(frames, times))
    return Example(messages, f"{times[0]:.1f} and {times[1]:.1f} seconds.")


def small(rng, look):
    """Practice in print down to the height of a stamp's figures."""
    text, (wide, high), ground, height = word(rng, 3), size_of(rng, 130, 190), pale(rng), rng.randint(12, 26)
    if rng.random() < 0.3:
        print_, mask = sign(text, rng, height), None
    else:
        mask = lettering(text, rng, height)
        print_ = Image.new("RGB", mask.size, off(rng.choice(["red", "green", "blue", "purple", "black", "black"]), rng))
    image = Image.new("RGB", (max(wide, print_.width + 8), high), ground)
    paste(image, print_, rng, 4, mask)
    return Example(user(rng, rng.choice(READ), spoil(image, look, rng.getrandbits(32))), text)


ABOUT_ME = {
    ("Who are you?", "What is your name?", "What are you?"): "I am a tiny ERNIE-4.5-VL.",
    ("What can you do?", "How can you help me?", "What do you know?"):
        "I describe, read, count, locate and compare, watch clips, think and zoom.",
    ("Hello!", "Hi!", "Good morning!"): "Hello! Show me a picture.",
    ("Thank you.", "Thanks!"): "You are welcome.",
}


def talk(rng, look):
    if rng.random() < 0.4:
        questions, answer = rng.choice(list(ABOUT_ME.items()))
        return Example(user(rng, rng.choice(questions)), answer)
    a, b, silent = rng.randint(0, 9), rng.randint(0, 9), rng.random() < 0.8
    question = rng.choice(["What is {} + {}?", "How much is {} plus {}?", "{} + {} = ?"]).format(a, b)
    thought = "" if silent else f"\n{a} and {b} make {a + b}.\n</think>\n\n"
    return Example(user(rng, question), f"{thought}{a + b}", not silent)


def small_print(rng: random.Random, look: Look) -> tuple[Image.Image, list[int], str]:
    """A large image with a sign whose print is lost when the image is made as small as the model sees it."""
    text, size = word(rng, 3), size_of(rng, 640, 760)
    image = Image.new("RGB", size, pale(rng))
    plate = sign(text, rng, rng.randint(25, 30))
    cells = rng.sample(range(9), rng.randint(1, 3))
    for i, cell in enumerate(cells):
        x, y = (0.2 + 0.3 * v + rng.uniform(-0.04, 0.04) for v in (cell % 3, cell // 3))
        if i:
            thing = Thing(*some_kinds(rng, 1)[0], x, y, rng.uniform(0.08, 0.12), cell)
            ImageDraw.Draw(image).polygon(outline(thing, *size), fill=off(thing.colour, rng))
        else:
            x, y = round(x * size[0] - plate.width / 2), round(y * size[1] - plate.height / 2)
            image.paste(plate, (x, y))
            corners = [(x, y), (x + plate.width, y), (x, y + plate.height), (x + plate.width, y + plate.height)]
    x1, y1, x2, y2 = box_in(corners, size, look, 0.03)
    box = [x1 // 50 * 50, y1 // 50 * 50, -(-x2 // 50) * 50, -(-y2 // 50) * 50]      # rounded outwards to twentieths
    return spoil(image, look, rng.getrandbits(32)), box, text


ZOOM_THOUGHT = "The print is small. I zoom in."


def zoom(rng, look):
    """The call, or what follows it: the reading of the crop that the tool gave back."""
    image, box, text = small_print(rng, look)
    messages, thinks = user(rng, rng.choice(READ), image), rng.random() < 0.25
    call = {"name": ZOOM_TOOL["function"]["name"], "arguments": {"bbox_2d": box}}
    thought = f"\n{ZOOM_THOUGHT}\n</think>\n\n" if thinks else ""
    answer = f"{thought}<tool_call>\n{json.dumps(call)}\n</tool_call>\n"
    return Example(messages, answer, thinks, (ZOOM_TOOL,), truth=text)


def called_box(example: Example) -> list[int]:
    """The box in the answer of an example of *zoom*."""
    return json.loads(example.answer.split("\n")[-3])["arguments"]["bbox_2d"]


def after_zoom(example: Example, box: list[int]) -> Example:
    """The conversation goes on: the call, and the crop that it asked for."""
    image = next(item["image"] for item in example.messages[0]["content"] if item["type"] == "image")
    call = {"type": "function", "function": {"name": ZOOM_TOOL["function"]["name"], "arguments": {"bbox_2d": box}}}
    thought = f"\nIt says {example.truth}.\n</think>\n\n" if example.think else ""
    before = {"reasoning_content": ZOOM_THOUGHT} if example.think else {}
    messages = [*example.messages, {"role": "assistant", "content": "", "tool_calls": [call], **before},
                {"role": "tool", "content": [{"type": "image", "image": crop(image, box)}]}]
    return example._replace(messages=messages, answer=thought + example.truth)


SKILLS = {skill.__name__: skill for skill in (describe, read, count, locate, compare, watch, talk, think, zoom,
                                              decline)}
PRACTICE = {practice.__name__: practice for practice in (ask, told, clock, small)}


def example(skill: str, seed: int, look: Look | None = None) -> Example:
    """The same three arguments always give the same example. look None: the seed chooses that, too."""
    rng = random.Random(f"{skill} {seed}")
    chosen = any_look(rng)
    return (SKILLS | PRACTICE)[skill](rng, chosen if look is None else look)


# -------------------------------------------------------------------------------------------------- to look at
def question_of(example: Example) -> str:
    return next(item["text"] for item in example.messages[0]["content"] if item["type"] == "text")


def images_of(example: Example) -> list[Image.Image]:
    """Its images, and the frames of its videos."""
    items = [item for message in example.messages for item in message["content"]]
    frames = {"text": lambda text: [], "image": lambda image: [image], "video": lambda video: video.frames}
    return [frame for item in items for frame in frames[item["type"]](item[item["type"]])]


def sheet(columns: int = 5, seed: int = 10**6) -> Image.Image:
    page = Image.new("RGB", (columns * 300, len(SKILLS) * 290), "white")
    for row, skill in enumerate(SKILLS):
        for column in range(columns):
            it = example(skill, seed + column)
            if it.truth and column % 2:
                it = after_zoom(it, called_box(it))
            draw_cell(page, it, column * 300 + 10, row * 290 + 10)
    return page


def draw_cell(page: Image.Image, example: Example, x: int, y: int) -> None:
    images = images_of(example)
    for i, image in enumerate(images):
        wide = 280 // min(4, len(images))
        page.paste(ImageOps.contain(image, (wide - 4, 180)), (x + i % 4 * wide, y + i // 4 * 90))
    lines = f"{question_of(example)}\n{example.answer}".split("\n")
    text = "\n".join(line[i : i + 50] for line in lines for i in range(0, len(line), 50))
    ImageDraw.Draw(page).text((x, y + 190), text, fill="black", font=ImageFont.load_default(10))


if __name__ == "__main__":
    sheet().save(sys.argv[1] if len(sys.argv) > 1 else "scenes.png")
