"""Small videos, made on the spot with PyAV."""

import av
import numpy as np
import pytest


def moving_bars(frames, height=48, width=64):
    """uint8 [T, H, W, 3]: a bright bar whose place tells the frame's number."""
    video_THWC = np.full((frames, height, width, 3), 40, np.uint8)
    for number, picture_HWC in enumerate(video_THWC):
        left = number % (width // 4) * 4
        picture_HWC[:, left : left + 4] = (230, 200, 60 + 2 * (number % 64))
    return video_THWC


def write_clip(path, frames=24, *, height=48, width=64, fps=24, codec=None, gop=8, metadata=None):
    """Writes moving bars; the container is the path's suffix. Returns what was written."""
    codec = codec or {".webm": "libvpx", ".avi": "mpeg4"}.get(path.suffix, "libx264")
    video_THWC = moving_bars(frames, height, width)
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=fps, options={"g": str(gop)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 2_000_000
        for picture_HWC in video_THWC:
            frame = av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return video_THWC


def frame_numbers(video_THWC, period=16):
    """The number (modulo `period` bars across) that the bar of each frame shows."""
    columns = video_THWC.astype(float).mean((1, 3))
    return (columns.argmax(1) * period // columns.shape[1]).tolist()


@pytest.fixture
def clip():
    """The function (path, frames=24, ...) that writes a clip of moving bars."""
    return write_clip


@pytest.fixture
def numbers():
    """The function that reads frame numbers, modulo 16, off moving bars."""
    return frame_numbers


@pytest.fixture
def hostile(tmp_path):
    """A directory of files that are not what their names say, and one good clip."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    write_clip(folder / "good.mp4", frames=40)
    whole = (folder / "good.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("#EXTM3U\nfile:///etc/passwd\n")
    write_clip(folder / "tags.mp4", frames=40, metadata={"title": "Titel" * 3})
    tagged = (folder / "tags.mp4").read_bytes()
    assert tagged.count(b"Titel" * 3) == 1
    (folder / "tags.mp4").write_bytes(tagged.replace(b"Titel" * 3, b"\xff\xfe\xfdel" * 3))
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = np.zeros((1, 4096), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return folder
