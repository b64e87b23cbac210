"""Small videos, made with PyAV, and fields of config.data."""

import av
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxvid import prepare


def data_config(name, path="", /, **changes):
    """config.data of a source: windows of 4 frames of 48 pixels, without chance."""
    fields = dict(name=name, path=str(path), frames=4, size=48, stride=1, batch_size=2, flip=False)
    fields |= dict(crop="center", difficulty=0.0, num_clips=10, workers=0, threads=0)
    return ConfigDict(fields | dict(text_tokens=0, text_width=8) | changes)


def moving_bars(frames, height=48, width=64):
    """uint8 [T, H, W, 3]: a bright bar; its position is the number of the frame."""
    video_THWC = np.full((frames, height, width, 3), 40, np.uint8)
    for number, picture_HWC in enumerate(video_THWC):
        left = number % (width // 4) * 4
        picture_HWC[:, left : left + 4] = (230, 200, 60 + 2 * (number % 64))
    return video_THWC


def frame_numbers(video_THWC, period=16):
    """The numbers, modulo `period` bars across, of frames of moving bars."""
    columns = video_THWC.astype(float).mean((1, 3))
    return (columns.argmax(1) * period // columns.shape[1]).tolist()


def write_clip(
    path,
    frames=24,
    *,
    height=48,
    width=64,
    fps=24,
    codec=None,
    gop=8,
    metadata=None,
    pictures=None,
    times=None,
    options=None,
    pixels="yuv420p",
):
    """Write moving bars or `pictures`; the suffix of the path is the container. Returns the frames.

    times: of the frames, in units of 1 / fps. options: of the codec.
    """
    codec = codec or {".webm": "libvpx", ".avi": "mpeg4"}.get(path.suffix, "libx264")
    video_THWC = moving_bars(frames, height, width) if pictures is None else pictures
    height, width = video_THWC.shape[1:3]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=fps, options={"g": str(gop), **(options or {})})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.bit_rate = 2_000_000
        for number, picture_HWC in enumerate(video_THWC):
            frame = av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return video_THWC


def write_hostile(folder):
    """Fill a folder with one good clip, one with broken tags, and four files that are no videos."""
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


def prepare_here(src, out, *, size=48, frames=8, fps=0.0):
    """The manifest of a prepared set; decodes in this process, as others take a second to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "in_processes", lambda work, names, _: zip(names, map(work, names)))
        return prepare.prepare(src, out, prepare.Recipe(size, frames, fps), workers=1)
