"""Videos: which frames are chosen, the times that are written into them, and their patches, number by number.

    python -m pytest -q extras/test_video.py          with PyAV installed, containers too
"""
import io
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from ernie_vl import InputError
import extras.video
from extras.video import Video, choose_frames, load_video, read_video, stamp, timestamp
from tokenizer import Tokenizer, encode_chat, fit_size

ROOT = Path(__file__).resolve().parent.parent
BUDGET = {"size": {"shortest_edge": 3136, "longest_edge": 12544}}      # of pixels: videos of the tests are small
NEEDS_AV = "PyAV is not installed: pip install av to read containers"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint's folder, as far as a video needs it."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "video_preprocessor_config.json").write_text(json.dumps(BUDGET))
    return tmp_path / "checkpoint"


def moving(count: int, size=(120, 90)) -> list[Image.Image]:
    frames = [Image.new("RGB", size, (200, 220, 240)) for _ in range(count)]
    for i, frame in enumerate(frames):
        ImageDraw.Draw(frame).rectangle((5 * i, 40, 5 * i + 30, 70), fill=(200, 10 * i % 256, 40))
    return frames


def write_container(path: Path, frames: list[Image.Image], rate: int = 10, codec: str = "mpeg4") -> Path:
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *frames[0].size, "yuv420p", 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return path


def write_video(kind: str, folder: Path, count: int) -> tuple[Path, list[Image.Image], float]:
    """(path, all frames as a decoder gives them, frames a second)"""
    frames, path = moving(count), folder / f"video.{kind}"
    if kind in ("gif", "webp", "png"):
        lossless = {"lossless": True} if kind == "webp" else {}
        duration = [60, 100] * (count // 2) + [80] * (count % 2)
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, **lossless)
        with Image.open(path) as image:
            frames = [(image.seek(i), image.convert("RGB"))[1] for i in range(count)]
        return path, frames, 12.5
    if kind == "frames":
        path.mkdir()
        for i, frame in enumerate(frames):
            frame.save(path / f"f{i}.png")                       # f2 before f10
        (path / "notes.txt").write_text("not a frame")
        return path, frames, 24.0
    import av
    write_container(path, frames, codec="mpeg4" if kind == "mp4" else "libvpx-vp9")
    with av.open(str(path)) as container:
        return path, [frame.to_image() for frame in container.decode(video=0)], 10.0


def same(a: list[Image.Image], b: list[Image.Image]) -> bool:
    return len(a) == len(b) and all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b))


# ------------------------------------------------------------------------------------------- 1. frames and their times
@pytest.mark.parametrize("count, rate, expected", [      # what the released checkpoints' own processor chooses
    (10, 25, list(range(10))), (1, 25, [0]),
    (100, 25, [0, 6, 12, 18, 25, 31, 37, 43, 50, 56, 62, 68, 75, 81, 87, 93]), (300, 30, list(range(0, 300, 15))),
    (301, 30, [0, 15, 30, 45, 60, 75, 90, 105, 120, 135, 150, 165, 180, 195, 210, 225, 240, 255, 270, 285]),
    (299, 29.97, [0, 15, 31, 47, 62, 78, 94, 110, 125, 141, 157, 173, 188, 204, 220, 236, 251, 267, 283]),
    (250, 25, [0, 12, 25, 37, 50, 62, 75, 87, 100, 112, 125, 137, 150, 162, 175, 187, 200, 212, 225, 237])])
def test_frames_are_chosen_as_the_released_processor_does(count, rate, expected):
    assert choose_frames(count, rate) == expected


def test_long_videos_are_thinned_out():
    chosen = choose_frames(6000, 30)
    assert len(chosen) == 180 and chosen[:4] == [0, 33, 66, 100] and chosen[-1] == 5966
    assert len(choose_frames(10 * 3600 * 30, 30)) == 180


def test_fewer_frames_can_be_asked_for():
    assert len(choose_frames(600, 30, fps=1)) == 20 and choose_frames(600, 30, max_frames=4) == [0, 150, 300, 450]


@pytest.mark.parametrize("seconds, text", [
    (0, "time: 00:00:00.00"), (7.5, "time: 00:00:07.50"), (61.5, "time: 00:01:01.50"), (3661.25, "time: 01:01:01.25"),
    (59.996, "time: 00:00:60.00"), (360000, "time: 100:00:00.00")])
def test_times_are_written_as_in_training(seconds, text):
    assert timestamp(seconds) == text


def test_frames_are_stamped_in_the_font_of_the_checkpoint_and_tiny_ones_not_at_all(tmp_path):
    """The stamp is a tenth of the shorter side high, in the upper left corner; the frame that was given stays as it is."""
    frame, tiny = Image.new("RGB", (640, 480), "grey"), Image.new("RGB", (9, 40))
    stamped = stamp(frame, 61.5, tmp_path)
    rows, columns = np.nonzero((np.asarray(stamped) != np.asarray(frame)).any(-1))
    assert stamp(tiny, 1.0, tmp_path) is tiny and frame.getcolors() == [(640 * 480, (128, 128, 128))]
    assert columns.min() < 10 and 200 < columns.max() < 640 and 30 < rows.max() < 75
    (tmp_path / "Roboto-Regular.ttf").write_bytes(b"no font")
    with pytest.raises(OSError):
        stamp(frame, 61.5, tmp_path)


# ----------------------------------------------------------------------------------------------- 2. patches, and tokens
def by_hand(frames: list[Image.Image], times: list[float], budget: tuple[int, int]) -> tuple[torch.Tensor, tuple]:
    """Stamped, padded, resized and cut as the facts of the released processor say, patch by patch and number by number."""
    stamped = []
    for frame, s in zip(frames, times):
        frame, size = frame.convert("RGB"), int(min(frame.size) * 0.1)
        if size:
            text = f"time: {int(s) // 3600:02d}:{int(s) // 60 % 60:02d}:{s % 60:05.2f}"
            font = ImageFont.load_default(size)
            ImageDraw.Draw(frame).text((0, 0), text, (0, 0, 0), font, stroke_width=int(size * 0.1), stroke_fill="white")
        stamped.append(frame)
    stamped += [stamped[-1]] * (len(stamped) % 2)
    height, width = fit_size(stamped[0].height, stamped[0].width, *budget)
    rows, mean, std = [], (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for frame in stamped:
        x = (np.asarray(frame.resize((width, height), Image.BICUBIC)) / 255 - mean) / std
        for y in range(0, height, 28):
            for left in range(0, width, 28):
                for dy, dx in ((0, 0), (0, 14), (14, 0), (14, 14)):
                    rows.append(x[y + dy : y + dy + 14, left + dx : left + dx + 14].transpose(2, 0, 1).ravel())
    return torch.from_numpy(np.array(rows)).float(), (len(stamped), height // 14, width // 14)


@pytest.mark.parametrize("kind, count", [("gif", 5), ("gif", 21), ("webp", 3), ("png", 4), ("frames", 12), ("frames", 1),
                                         ("mp4", 40), ("webm", 25)])
def test_videos_become_the_tensors_of_an_independent_computation(folder, tmp_path, kind, count):
    if kind in ("mp4", "webm"):
        pytest.importorskip("av", reason=NEEDS_AV)
    path, frames, rate = write_video(kind, tmp_path, count)
    chosen = [k * count // min(16, count) for k in range(min(16, count))]      # all of these last less than 8 seconds
    patches, grid = by_hand([frames[i] for i in chosen], [i / rate for i in chosen], (3136, 12544))
    media = load_video(path, folder)
    assert (media.kind, media.source, media.grid) == ("video", path, grid) and media.patches.shape == patches.shape
    assert (media.patches - patches).abs().max() < 1e-5 * patches.abs().max()
    assert media.summary.startswith(f"{len(chosen)} frame{'s' * (count > 1)} 120 x 90 -> ")


def test_an_odd_number_of_frames_ends_with_the_last_one_twice(folder):
    """5 frames of 120 x 90 pixels are 3 pairs of 3 x 4 tokens, and the time is in the sixth as it is in the fifth."""
    media = load_video(Video(moving(5), [0.0, 0.5, 1.0, 1.5, 2.0]), folder)
    assert media.grid == (6, 6, 8) and torch.equal(media.patches[-48:], media.patches[-96:-48])
    assert media.summary == "5 frames 120 x 90 -> 112 x 84 -> 36 tokens" and media.image.size == (120, 90)
    lost = load_video(Video(moving(1), [0.0], lost=3), folder)
    assert lost.summary.startswith("1 frame (3 more could not be decoded) 120 x 90 -> ")


@pytest.mark.parametrize("options, count", [({}, 16), ({"max_frames": 2}, 2), ({"fps": 4}, 16), ({"fps": 9.375}, 18),
                                            ({"fps": 9.375, "max_frames": 4}, 4)])
def test_the_number_of_frames_follows_the_options(folder, tmp_path, options, count):
    path, _, _ = write_video("gif", tmp_path, 24)                                       # 1.92 seconds
    media, found = load_video(path, folder, **options), read_video(path, **options)
    assert media.grid == (count, 6, 8) and media.summary.startswith(f"{count} frames ")
    assert found.times == [i / 12.5 for i in choose_frames(24, 12.5, **options)] and found.lost == 0


def test_frames_have_a_budget_of_pixels_of_their_own_that_can_only_be_lowered(folder, tmp_path):
    """Where the folder does not say, small frames are enlarged to 299 tokens; a limit above the folder's own does nothing."""
    video = Video(moving(1, (64, 64)), [0.0])
    assert load_video(video, tmp_path).grid == (2, 36, 36)                              # 504 x 504 pixels
    assert [load_video(video, folder, most).grid for most in (None, 10**6, 3136)] == [(2, 4, 4)] * 3
    assert load_video(Video(moving(1, (1920, 1080)), [0.0]), tmp_path).grid == (2, 50, 92)      # 1288 x 700 pixels
    large = Video(moving(1, (640, 480)), [0.0])
    assert [load_video(large, folder, most).grid for most in (None, 10**6, 3136)] == [(2, 6, 8), (2, 6, 8), (2, 2, 4)]


def test_a_video_in_the_prompt():
    """A pair of frames is one place in time, and has a placeholder for every 2 x 2 patches of it."""
    tokenizer = Tokenizer(ROOT / "tiny")
    media, special = load_video(ROOT / "examples" / "moving.gif", ROOT / "tiny"), tokenizer.special
    prompt = encode_chat(tokenizer, [{"role": "user", "content": [media, "Q"]}])
    start = prompt.ids.index(special["<|VIDEO_START|>"])
    assert media.summary == "6 frames 168 x 126 -> 196 x 140 -> 105 tokens" and prompt.grids == [(6, 10, 14)]
    assert prompt.ids[start + 1 : start + 107] == [special["<|VIDEO_PLACEHOLDER|>"]] * 105 + [special["<|VIDEO_END|>"]]
    assert torch.equal(prompt.patches, media.patches) and tokenizer.decode(prompt.ids).startswith("User: Video 1:Q")


@pytest.mark.parametrize("options, words", [
    ([], "6 frames 168 x 126 -> 196 x 140 -> 105 tokens"), (["--max-frames", 2], " 2 frames "),
    (["--max-pixels", 784], "168 x 126 -> 28 x 28 -> 3 tokens")])
def test_the_options_of_the_command_line_arrive(ask, options, words):
    code, out, err = ask("--video", ROOT / "examples" / "moving.gif", "--max-new-tokens", 5, *options)
    assert code == 0 and out.endswith("\n") and words in err


# --------------------------------------------------------------------------------------------- 3. files of every kind
def test_images_of_a_folder_are_sorted_by_their_numbers(tmp_path):
    frames = moving(3)
    for name, frame in zip(("take 2 frame 1", "take 2 frame 10", "take 10 frame 2"), frames):
        frame.save(tmp_path / f"{name}.png")
    video = read_video(tmp_path)
    assert same(video.frames, frames) and video.times == [0, 1 / 24, 2 / 24]


def test_a_duration_of_zero_is_played_as_a_tenth_of_a_second(tmp_path):
    frames = moving(3)
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], duration=0, lossless=True)
    assert read_video(str(tmp_path / "x.webp")).times == [0, 0.1, 0.2]


def test_a_stream_without_a_container_is_read(tmp_path):
    """It says neither when a frame is shown nor how to get there."""
    pytest.importorskip("av", reason=NEEDS_AV)
    frames = moving(12)
    found = read_video(write_container(tmp_path / "video.h264", frames, codec="libx264")).frames
    assert len(found) == 12 and all(np.abs(np.asarray(a, float) - np.asarray(b)).mean() < 4 for a, b in zip(found, frames))


def test_a_video_is_turned_as_the_camera_was(tmp_path):
    """The header of the track says so: here a quarter to the right."""
    pytest.importorskip("av", reason=NEEDS_AV)
    path = write_container(tmp_path / "video.mp4", moving(3))
    straight, data = read_video(path).frames, bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    assert same(read_video(path).frames, [frame.transpose(Image.Transpose.ROTATE_270) for frame in straight])


@pytest.mark.parametrize("kind", ["gif", "mp4"])
def test_bytes_are_read_like_the_file(tmp_path, kind):
    if kind == "mp4":
        pytest.importorskip("av", reason=NEEDS_AV)
    path, _, _ = write_video(kind, tmp_path, 9)
    assert same(read_video(io.BytesIO(path.read_bytes())).frames, read_video(path).frames)


@pytest.mark.parametrize("case", ["empty folder", "text", "missing", "no frame decodes", "sound"])
def test_what_is_no_video_is_refused_in_one_sentence(case, tmp_path, monkeypatch):
    path = tmp_path / "video.gif"
    if case == "text":
        path.write_text("hello")
    if case in ("empty folder", "no frame decodes"):
        path.mkdir()
    if case == "no frame decodes":
        (path / "1.png").write_bytes(b"broken")
    if case != "sound":
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(InputError, match="no frame of it|pip install av|does not exist"):
            read_video(path)
        return
    av = pytest.importorskip("av", reason=NEEDS_AV)
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(InputError, match="no images"):
        read_video(tmp_path / "a.wav")


def test_an_image_is_a_video_of_one_frame(tmp_path):
    moving(1)[0].save(tmp_path / "still.gif")
    video = read_video(tmp_path / "still.gif")
    assert len(video.frames) == 1 and video.times == [0] and video.lost == 0


def test_what_can_be_had_of_a_damaged_animation_is_read(tmp_path):
    frames = moving(8)
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "x.gif").write_bytes((tmp_path / "x.gif").read_bytes()[:-50])
    video = read_video(tmp_path / "x.gif")
    assert len(video.frames) == len(video.times) == 7 and video.lost == 1 and video.times == sorted(video.times)


def test_what_lies_behind_the_damage_in_a_container_is_read(tmp_path):
    pytest.importorskip("av", reason=NEEDS_AV)
    path = write_container(tmp_path / "video.mp4", moving(60), 30)
    data = bytearray(path.read_bytes())
    begin, end = len(data) // 3, len(data) * 2 // 3
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    video = read_video(path)
    assert len(video.frames) == len(video.times) and len(video.frames) + video.lost == 16
    assert video.times[-1] > 1.8 and video.times == sorted(video.times)


def test_frames_found_by_seeking_are_those_found_by_decoding_all(tmp_path, monkeypatch):
    """40 minutes at a frame a second, each a little brighter than the one before; 20 of them are chosen."""
    av = pytest.importorskip("av", reason=NEEDS_AV)
    with av.open(str(tmp_path / "long.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 32, 32, "yuv420p", 12
        planes = np.full((48, 32), 128, np.uint8)                                       # 32 rows of brightness, then colours
        for i in range(2400):
            planes[:32] = 16 + i // 12
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    every = read_video(tmp_path / "long.mkv", max_frames=20)
    assert every.times == [120.0 * k for k in range(20)] and every.lost == 0
    assert all(abs(np.asarray(frame).mean() * 219 / 255 - 10 * k) < 1.5 for k, frame in enumerate(every.frames))
    for frames_to_decode in (1, 50):
        monkeypatch.setattr(extras.video, "SEEK_AFTER", frames_to_decode)
        found = read_video(tmp_path / "long.mkv", max_frames=20)
        assert found.times == every.times and found.lost == 0
        assert all(np.abs(np.asarray(a, int) - np.asarray(b)).max() <= 2 for a, b in zip(found.frames, every.frames))
