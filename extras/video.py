"""A video -> the frames that the model sees, each with its time written into the corner, and their patches.

A video is an animated image that pillow reads (GIF, WebP, APNG), a folder of numbered images, or a container or bare
stream that PyAV reads (MP4, WebM, ...). Frames are chosen before any is decoded, and only the chosen ones are kept.
"""
import contextlib
import io
import re
from pathlib import Path
from types import ModuleType
from typing import Callable, Iterator, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ernie_vl import TEMPORAL_MERGE, InputError, require
from tokenizer import Media, input_errors, make_media, read_image, to_rgb

LEAST_FRAMES = 16         # of a video that has them, however short it is
UNKNOWN_RATE = 24.0       # frames a second of a folder of images, which does not say: transformers' assumption too
SEEK_AFTER = 300          # so many frames on, seeking the key frame before it is faster than decoding all between
STAMP_HEIGHT = 0.1        # of the written time, in shorter sides of the frame; its outline is a tenth of that
STAMP_FONT = "Roboto-Regular.ttf"      # comes with the released checkpoints

Frames = Iterator[tuple[int, Image.Image]]      # (index, RGB); an index whose frame cannot be decoded is left out


class Video(NamedTuple):
    """The chosen frames of a video."""

    frames: list[Image.Image]     # RGB, as large as in the file
    times: list[float]            # seconds from the beginning, one a frame
    lost: int = 0                 # frames that were chosen and could not be decoded


def load_video(source: str | Path | io.BytesIO | Video, folder: Path, max_pixels: int | None = None, fps: float = 2.0,
               max_frames: int = 180) -> Media:
    """A video -> its patches, sized for the checkpoint in `folder`, whose budget of pixels a frame max_pixels may
    lower. Raises InputError when there are no frames in it."""
    video = source if isinstance(source, Video) else read_video(source, fps, max_frames)
    frames = [stamp(frame, seconds, folder) for frame, seconds in zip(video.frames, video.times)]
    frames += frames[-1:] * (len(frames) % TEMPORAL_MERGE)          # an even number: the last one may be there twice
    summary = f"{len(video.frames)} frame{'s' * (len(video.frames) != 1)} "
    summary += f"({video.lost} more could not be decoded) " if video.lost else ""
    return make_media("video", source, frames, folder, max_pixels, summary)


def choose_frames(count: int, rate: float, fps: float = 2.0, max_frames: int = 180) -> list[int]:
    """Which of `count` frames, `rate` a second, the model sees: `fps` a second, at least 16 and at most `max_frames`,
    each the first of its stretch. Numbers and rounding are those of the released checkpoints' own processor."""
    wanted = min(max(int(count / rate * fps), min(LEAST_FRAMES, max_frames)), max_frames, count)
    return np.linspace(0, count, wanted + 1).astype(int)[:-1].tolist()


def read_video(source: str | Path | io.BytesIO, fps: float = 2.0, max_frames: int = 180) -> Video:
    """A path, or the bytes of a file -> the chosen frames. Raises InputError when none can be decoded."""
    with input_errors(source, "video"):
        file = Path(source) if isinstance(source, str) else source
        for reader in (read_folder,) if isinstance(file, Path) and file.is_dir() else (read_animation, read_container):
            try:
                count, rate, frames = reader(file)
            except Image.UnidentifiedImageError:
                continue
            wanted = choose_frames(count, rate, fps, max_frames) if count else []
            if found := dict(frames(wanted)):      # pillow knows the names of some kinds that it cannot read, as MPEG-1
                return Video(list(found.values()), [index / rate for index in found], len(wanted) - len(found))
        raise InputError("no frame of it can be decoded: is it a video, or a folder of numbered images?")


# A reader: file -> (number of frames, frames a second, function from sorted indices to their frames).
def read_folder(folder: Path) -> tuple[int, float, Callable[[list[int]], Frames]]:
    numbers = lambda file: [int(number) for number in re.findall(r"\d+", file.stem)]      # frame 2 before frame 10
    files = [file for file in folder.iterdir() if file.suffix.lower() in Image.registered_extensions()]
    files.sort(key=lambda file: (numbers(file), file.name))

    def frames(wanted: list[int]) -> Frames:
        for index in wanted:
            with contextlib.suppress(InputError):
                yield index, read_image(files[index])
    return len(files), UNKNOWN_RATE, frames


def read_animation(file: Path | io.BytesIO) -> tuple[int, float, Callable[[list[int]], Frames]]:
    milliseconds = []
    with Image.open(file) as image:
        count = getattr(image, "n_frames", 1)
        with contextlib.suppress(Exception):     # a damaged frame: those before it tell the rate
            for index in range(count):
                image.seek(index)
                image.load()                     # WebP tells the duration only then
                milliseconds.append(image.info.get("duration") or 100)      # as browsers play what says 0

    def frames(wanted: list[int]) -> Frames:
        with Image.open(file) as image:
            for index in wanted:
                with contextlib.suppress(Exception):
                    image.seek(index)
                    yield index, to_rgb(image)
    return count, 1000 * len(milliseconds) / max(sum(milliseconds), 1) or UNKNOWN_RATE, frames


def read_container(file: Path | io.BytesIO) -> tuple[int, float, Callable[[list[int]], Frames]]:
    with open_container(file) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or UNKNOWN_RATE)
        count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))     # WebM has to be counted

    def frames(wanted: list[int]) -> Frames:
        with open_container(file) as container:
            yield from decode_frames(container, wanted, rate, most_errors=count)
    return count, rate, frames


def import_av() -> ModuleType:
    try:
        import av
    except ImportError:
        raise InputError("a video of this kind is read by PyAV, which is not installed: pip install av") from None
    return av


def open_container(file: Path | io.BytesIO):
    if isinstance(file, io.BytesIO):
        file.seek(0)                             # pillow has looked at it
    container = import_av().open(file if isinstance(file, io.BytesIO) else str(file))
    require(container.streams.video, "there are no images in it")
    return container


def decode_frames(container, wanted: list[int], rate: float, most_errors: int) -> Frames:
    """Decodes on from the frame before, or from a key frame where that is far; damaged stretches are passed over."""
    av, stream = import_av(), container.streams.video[0]
    stream.thread_type, start = "AUTO", stream.start_time or 0
    decoded, frame, number, errors = container.decode(stream), None, -1, 0
    for index in wanted:
        if index - number > SEEK_AFTER:
            with contextlib.suppress(av.FFmpegError):      # a stream without a container has no places to go to
                container.seek(start + int(index / rate / stream.time_base), stream=stream)
                decoded, frame, number = container.decode(stream), None, index - 1
        while frame is None or number < index:
            try:
                frame = next(decoded)
                number = number + 1 if frame.pts is None else round((frame.pts - start) * stream.time_base * rate)
            except StopIteration:
                return
            except av.FFmpegError:                         # go on behind the damage
                errors, decoded = errors + 1, container.decode(stream)
                if errors > most_errors:
                    return
        yield index, frame.to_image().rotate(frame.rotation, expand=True)


def stamp(frame: Image.Image, seconds: float, folder: Path) -> Image.Image:
    """The time in the upper left corner, by which the model knows when a frame was: drawn before resizing, so it
    shrinks and grows with the frame. In the font that comes with the checkpoints, or else in pillow's own."""
    size, font = int(min(frame.size) * STAMP_HEIGHT), Path(folder) / STAMP_FONT
    if size < 1:
        return frame
    font, frame = ImageFont.truetype(font, size) if font.is_file() else ImageFont.load_default(size), frame.copy()
    ImageDraw.Draw(frame).text((0, 0), timestamp(seconds), fill=(0, 0, 0), font=font, stroke_width=int(size * 0.1),
                               stroke_fill=(255, 255, 255))
    return frame


def timestamp(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"time: {hours:02d}:{minutes:02d}:{seconds % 60:05.2f}"      # 59.996 makes 60.00, as in training
