"""Draws pictures and says what is true about them: the world of the tiny checkpoint.

    python tiny/scenes.py OUT.png     draws twelve of them with their questions and answers

A skill is a function of a random.Random that returns an Example. To teach another one, write it and list it in SKILLS.
"""
import math
import random
import sys
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageOps

COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 210), "yellow": (240, 205, 40),
           "purple": (130, 50, 170), "black": (25, 25, 25)}
SHAPES = ("circle", "square", "triangle", "star")
PLACES = {"on the left": (0.22, 0.5), "on the right": (0.78, 0.5), "at the top": (0.5, 0.22),
          "at the bottom": (0.5, 0.78), "in the middle": (0.5, 0.5)}
RELATIONS = {(1, 0): ("to the left of", "to the right of"), (0, 1): ("above", "below")}
SMOOTH = 3      # drawn so many times larger and scaled down, for soft edges


class Example(NamedTuple):
    question: str
    picture: Image.Image
    answer: str


class Thing(NamedTuple):
    colour: str
    shape: str
    x: float        # centre and radius, in parts of the picture's width, height and shorter side
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


# ---------------------------------------------------------------------------------------------------- drawing
def outline(shape: str, x: float, y: float, r: float, turn: float) -> list[tuple]:
    """Corners of a shape, scaled so that all shapes look equally large, and turned by `turn` radians."""
    corners, reach = {"square": (4, (1.15,)), "triangle": (3, (1.25,)), "star": (10, (1.3, 0.55)), "circle": (48, (1.0,))}[shape]
    start = math.pi / 4 if shape == "square" else -math.pi / 2
    angles = [start + turn + 2 * math.pi * i / corners for i in range(corners)]
    return [(x + r * reach[i % len(reach)] * math.cos(a), y + r * reach[i % len(reach)] * math.sin(a)) for i, a in enumerate(angles)]


def draw(things: list[Thing], rng: random.Random) -> Image.Image:
    """A picture of 90 to 260 pixels, wide or tall, on a pale background, every colour a little off its name."""
    width = rng.randint(90, 260)
    height = round(width * rng.uniform(0.7, 1.4))
    pale = tuple(rng.randint(205, 255) for _ in range(3))
    image = Image.new("RGB", (width * SMOOTH, height * SMOOTH), pale)
    for thing in things:
        colour = tuple(max(0, min(255, c + rng.randint(-22, 22))) for c in COLOURS[thing.colour])
        radius = thing.radius * min(image.size)
        corners = outline(thing.shape, thing.x * image.width, thing.y * image.height, radius, rng.uniform(-0.12, 0.12))
        ImageDraw.Draw(image).polygon(corners, fill=colour)
    return image.resize((width, height), Image.LANCZOS)


# ----------------------------------------------------------------------------------------------------- skills
def one_thing(rng: random.Random) -> tuple[list[Thing], str]:
    place = rng.choice(list(PLACES))
    x, y = (v + rng.uniform(-0.05, 0.05) for v in PLACES[place])
    thing = Thing(rng.choice(list(COLOURS)), rng.choice(SHAPES), x, y, rng.uniform(0.14, 0.24))
    return [thing], place


def two_things(rng: random.Random) -> tuple[list[Thing], tuple[str, str]]:
    """Two different things, apart along one axis, and the words for how the first stands to the second and back."""
    kinds = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], 2)
    axis = rng.choice(list(RELATIONS))
    ends = [0.5 - rng.uniform(0.2, 0.27), 0.5 + rng.uniform(0.2, 0.27)]
    aside = [0.5 + rng.uniform(-0.08, 0.08) for _ in kinds]
    spots = [(end, off) if axis[0] else (off, end) for end, off in zip(ends, aside)]
    return [Thing(*kind, *spot, rng.uniform(0.13, 0.17)) for kind, spot in zip(kinds, spots)], RELATIONS[axis]


def describe(rng: random.Random) -> Example:
    question = rng.choice(["Describe this image.", "Describe the picture.", "What is in this picture?", "What do you see?"])
    if rng.random() < 0.4:
        things, place = one_thing(rng)
        answer = f"A {things[0].name} {place}."
    else:
        things, (forth, _) = two_things(rng)
        answer = f"A {things[0].name} {forth} a {things[1].name}."
    return Example(question, draw(things, rng), answer)


def where(rng: random.Random) -> Example:
    things, relation = two_things(rng)
    asked = rng.randrange(2)
    it, other = things[asked], things[1 - asked]
    question = rng.choice(["Where is the {}?", "Where do you see the {}?"]).format(it.name)
    return Example(question, draw(things, rng), f"It is {relation[asked]} the {other.name}.")


SKILLS = {"describe": describe, "where": where}


def sheet(seed: int = 0, columns: int = 4, rows: int = 3) -> Image.Image:
    page, rng = Image.new("RGB", (columns * 300, rows * 330), "white"), random.Random(seed)
    for i in range(columns * rows):
        example = rng.choice(list(SKILLS.values()))(rng)
        x, y = i % columns * 300 + 10, i // columns * 330 + 10
        page.paste(ImageOps.contain(example.picture, (280, 280)), (x, y))
        ImageDraw.Draw(page).text((x, y + 284), f"{example.question}\n{example.answer}", fill="black")
    return page


if __name__ == "__main__":
    sheet().save(sys.argv[1] if len(sys.argv) > 1 else "scenes.png")
