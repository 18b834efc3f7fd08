"""Boxes: found in answers of every form, drawn where they are, and cropped to by the zoom tool.

    python -m pytest -q extras/test_boxes.py
"""
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ernie_vl import InputError
from extras.boxes import (ZOOM_TOOL, Box, check_boxes_path, crop, draw_boxes, expand_interval, find_boxes, find_boxes_in, is_zoom,
                          last_image)
from tokenizer import Media


# ----------------------------------------------------------------------------------------------------- 1. in an answer
@pytest.mark.parametrize("text, expected", [
    ('{"bbox_2d": [285, 235, 999, 652]}', [("", (285, 235, 999, 652))]),
    ('Here:\n```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"label": "b", "bbox": [5, 6, 7.5, 8]}]\n```',
     [("a", (1, 2, 3, 4)), ("b", (5, 6, 7.5, 8))]),
    ('{"name": "cat", "box": [[1, 2, 3, 4], [5, 6, 7, 8]]}', [("cat", (1, 2, 3, 4)), ("cat", (5, 6, 7, 8))]),
    ('{"cars": [{"pos": [10, 20, 5, 40]}]}', [("", (5, 20, 10, 40))]),
    ("It is at [1, 2, 3, 4].", [("", (1, 2, 3, 4))]),
    ('{"bbox_2d": [10, 20, 1001, 40]}', [("", (10, 20, 1001, 40))]),
    ('{"label": "pets", "all": [{"bbox": [1, 2, 3, 4]}, {"label": "dog", "bbox": [5, 6, 7, 8]}]}',
     [("pets", (1, 2, 3, 4)), ("dog", (5, 6, 7, 8))]),
    ("<ref>a dog</ref><box>(1,2)(30,2)(30,40)(1,40)</box>", [("a dog", (1, 2, 30, 40))]),
    ("<ref>b</ref>text<ref>c</ref><box>(5,6)(7,8)</box>", [("c", (5, 6, 7, 8))]),
    ("<ref>dogs</ref><|LOC_BEGIN|><|LOC_1|><|LOC_2|><|LOC_30|><|LOC_2|><|LOC_30|><|LOC_40|><|LOC_1|><|LOC_40|><|LOC_SEP|>"
     "<|LOC_5|><|LOC_6|><|LOC_7|><|LOC_8|><|LOC_END|>", [("dogs", (1, 2, 30, 40)), ("dogs", (5, 6, 7, 8))]),
    ("[1, 2, 3] and [1, 2, 3, 4000] and [true, 1, 2, 3] and {", []),
    ('{"cars": 2, "bikes": 1, "dogs": 0, "people": 4}', []), ("none", []), ("<box>(5,6)</box>", []),
    ("[" * 1100, []), ("[" * 490 + "1, 2, 3, 4" + "]" * 490, [("", (1, 2, 3, 4))]),      # deeper than Python recurses
])
def test_boxes_are_found_in_every_form(text, expected):
    assert [(box.label, box.corners) for box in find_boxes(text)] == expected
    assert find_boxes_in({"role": "assistant", "content": [text]}) == find_boxes(text)


def test_boxes_in_pixels():
    assert Box("", (285, 235, 999, 652)).pixels((2000, 1000)) == (570, 235, 1998, 652)
    assert Box("", (0, 0, 1000, 1000)).pixels((56, 30)) == (0, 0, 56, 30) == Box("", (-5, 0, 1001, math.inf)).pixels((56, 30))


# ------------------------------------------------------------------------------------------------------- 2. on an image
GREY, YELLOW, CYAN = (128, 128, 128), (0xff, 0xd4, 0), (0, 0xe5, 0xff)


def test_boxes_are_drawn_where_they_are():
    """Of an image large enough to be drawn on as it is; each box in its own colour, and nothing else is touched."""
    original = Image.new("RGB", (1000, 500), GREY)
    image = draw_boxes(original, [Box("", (100, 200, 300, 600)), Box("", (500, 0, 1000, 1000))])
    at = lambda x, y: image.getpixel((x, y))
    assert image.size == (1000, 500) and original.getcolors() == [(500_000, GREY)]
    assert [at(100, 200), at(299, 200), at(200, 100), at(200, 299)] == [YELLOW] * 4
    assert [at(500, 250), at(999, 250), at(750, 0), at(750, 499)] == [CYAN] * 4
    beside = [at(90, 200), at(300, 250), at(310, 200), at(200, 90), at(250, 300), at(200, 310)]
    assert beside == [GREY] * 6 and [at(200, 200), at(750, 250)] == [GREY] * 2


def field(size: tuple[int, int], box: Box, background) -> tuple[Image.Image, int, int, int, int]:
    """The image with one box, and left, top, right, bottom of what its label adds to it."""
    plain, labelled = (draw_boxes(Image.new("RGB", size, background), [box._replace(label=label)]) for label in ("", box.label))
    rows, columns = np.nonzero((np.asarray(plain) != np.asarray(labelled)).any(-1))
    return labelled, columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("size", [(40, 30), (40, 300), (1920, 1080)])
@pytest.mark.parametrize("background", [GREY, "white", "black"])
@pytest.mark.parametrize("corners", [(300, 300, 700, 700), (0, 0, 1000, 1000), (900, 990, 1000, 1000)])
def test_drawn_labels_can_be_read(size, background, corners):
    """Black letters on a bright field, whatever lies below, at least 14 pixels high, inside the image."""
    image, left, top, right, bottom = field(size, Box("a\ncat", corners), background)
    inside = np.asarray(image.crop((left, top, right, bottom))).reshape(-1, 3)
    assert min(image.size) >= 448 and bottom - top >= 14 and right - left >= 28
    assert (inside.max(-1) < 64).sum() > 40 and (inside == YELLOW).all(-1).sum() > 150


def test_a_label_stands_above_its_box_where_there_is_room():
    _, left, _, _, bottom = field((1000, 500), Box("cat", (300, 300, 700, 700)), GREY)
    assert 290 <= left <= 310 and 140 <= bottom <= 152
    _, _, top, _, _ = field((1000, 500), Box("cat", (300, 0, 700, 700)), GREY)
    assert 0 <= top <= 5                                                     # no room above it


def test_a_label_is_whole_at_the_edges_and_cut_where_it_is_wider_than_the_image():
    spans = [field((1000, 500), Box("cat", (x, 300, x + 20, 700)), GREY)[1:4:2] for x in (0, 500, 980)]
    widths = [right - left for left, right in spans]
    assert min(widths) >= 28 and max(widths) - min(widths) <= 1
    image, left, _, right, _ = field((500, 500), Box("long " * 50, (0, 100, 1000, 1000)), GREY)
    assert left >= 0 and 400 < right <= 495


def test_a_file_of_boxes_has_the_ending_of_an_image():
    for name in ("x.png", "x.JPG", "x.jpeg", "x.webp"):
        check_boxes_path(Path(name))
    for name in ("x.nonsense", "x", "png"):
        with pytest.raises(InputError, match=".png"):
            check_boxes_path(Path(name))


# -------------------------------------------------------------------------------------------------------- 3. the zoom
def places(width: int, height: int) -> Image.Image:
    """Every pixel tells where it is: its column and row, in units of 4."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns // 4, rows // 4, columns * 0], -1).astype(np.uint8))


@pytest.mark.parametrize("size, box, expected", [      # left, top, right, bottom in pixels
    ((1000, 500), [0, 0, 500, 500], (0, 0, 500, 250)),
    ((1000, 500), [250, 500, 750, 1000], (250, 250, 750, 500)),
    ((1000, 500), [-100, 0, 500, 2000], (0, 0, 500, 500)),
    ((1000, 500), [0.5, 0, 500.7, 1000], (0, 0, 500, 500)),
    ((1000, 500), [500, 500, 501, 501], (487, 236, 515, 264)),               # a token's 28 pixels around it
    ((1000, 500), [999, 999, 1000, 1000], (972, 472, 1000, 500)), ((1000, 500), [0, 0, 1, 1], (0, 0, 28, 28)),
    ((20, 500), [400, 500, 600, 600], (0, 250, 20, 300)),                    # narrower than a token
])
def test_the_zoom_shows_the_place_that_was_asked_for(size, box, expected):
    image = places(*size)
    shown = crop(image, box)
    assert np.array_equal(np.asarray(shown), np.asarray(image)[expected[1] : expected[3], expected[0] : expected[2]])


def test_a_short_interval_grows_around_its_middle_and_inside_the_image():
    for side in (10, 28, 29, 100):
        for begin in range(side + 1):
            for end in range(begin, side + 1):
                low, high = expand_interval(begin, end, side)
                assert 0 <= low <= begin <= end <= high <= side and high - low == max(end - begin, min(28, side))
                if low > 0 and high < side:
                    assert abs((low + high) - (begin + end)) <= 1


@pytest.mark.parametrize("box", [
    None, 5, [], [1, 2, 3], ["a", 1, 2, 3], [5, 5, 1, 9], [5, 9, 9, 5], [5, 5, 5, 5], [1000, 0, 1001, 5], [0, 1000, 5, 1001],
    [-5, 0, 0, 9], [0, -5, 9, 0], [math.nan] * 4, [0, 0, math.inf, 5], [True, 0, 5, 5], [0, 0, 1e300, 5]])
def test_the_zoom_refuses_what_is_no_box_in_a_sentence(box):
    with pytest.raises(InputError, match=r"^.*bbox_2d .*\.$"):
        crop(places(100, 50), box)


def test_the_zoom_and_the_boxes_refer_to_the_last_image_of_the_user():
    media = lambda kind, name: Media(kind, name, None, None, (1, 2, 2), "")
    turn = lambda role, *content: {"role": role, "content": list(content)}
    first, second, video, cropped = media("image", "a"), media("image", "b"), media("video", "v"), media("image", "crop")
    assert last_image([turn("user", first, "Q", second, video), turn("assistant", "A"), turn("tool", cropped)]) is second
    assert last_image([turn("user", first), turn("assistant", "A"), turn("user", second), turn("user", "Q")]) is second
    assert last_image([turn("system", first), turn("user", "Q", video)]) is None


def test_a_call_of_the_zoom_tool_is_known_by_its_name():
    name = ZOOM_TOOL["function"]["name"]
    assert name == "image_zoom_in_tool" and is_zoom({"function": {"name": name}}) and not is_zoom({"function": {"name": "f"}})
