"""H.264 video as it comes: an encoder for frames in pieces, and whole files joined into one."""

import contextlib
import io
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from jaxvid import files
from jaxvid.data import video


class Encoder:
    """uint8 frames [T, H, W, 3], in pieces -> the bytes of an mp4 that every browser plays.

    Odd sides get one more pixel. The same frames always give the same bytes.
    """

    def __init__(self, fps: float, height: int, width: int):
        self._buffer, self._reformat = io.BytesIO(), video.Reformatter()
        self._container = av.open(self._buffer, "w", format="mp4")
        rate = Fraction(fps).limit_denominator(1001)
        # Without B-frames a file starts at time 0 in decoding order too, so `join` can append it.
        options = {"crf": "18", "threads": "1", "bf": "0", **video.REPEATABLE}
        self._stream = self._container.add_stream("libx264", rate=rate, options=options)
        self._stream.height, self._stream.width = height + height % 2, width + width % 2
        self._stream.pix_fmt = "yuv420p"

    def write(self, video_THWC: np.ndarray):
        """Append frames."""
        H, W = video_THWC.shape[1:3]
        even_THWC = np.pad(video_THWC, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), mode="edge")
        for picture_HWC in np.ascontiguousarray(even_THWC):
            frame = av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")
            frame = self._reformat(frame, self._stream.pix_fmt)
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> bytes:
        """The file. Nothing can be appended after this."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._buffer.getvalue()


def write(path: Path, video_THWC: np.ndarray, fps: float):
    """uint8 [T, H, W, 3] -> an mp4 file."""
    encoder = Encoder(fps, *video_THWC.shape[1:3])
    encoder.write(video_THWC)
    files.write(path, encoder.finish())


def join(path: Path, parts: list[Path]):
    """Files of `Encoder`, of one shape and rate, one after another in one file, without decoding.

    Takes no memory that grows with the parts. Raises OSError and av.FFmpegError.
    """
    unfinished = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with av.open(str(unfinished), "w", format="mp4") as output, contextlib.ExitStack() as stack:
            target, offset = None, 0
            for part in parts:
                source = stack.enter_context(av.open(str(part)))
                stream = source.streams.video[0]
                target = target or output.add_stream_from_template(stream)
                end = offset
                for packet in source.demux(stream):
                    if packet.dts is None:  # the flush at the end
                        continue
                    packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                    end = max(end, packet.pts + packet.duration)
                    packet.stream = target
                    output.mux(packet)
                offset = end
                stack.pop_all().close()
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
