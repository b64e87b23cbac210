"""Reading and writing of video files with PyAV: no ffmpeg binary, no paths or URLs for the decoder.

Reading is safe for files from anywhere: FFmpeg gets an open binary file (so it can use no network
protocol), only the listed containers, one thread, and limits on the size of pictures and clips. One
scaler serves all frames of a read, three times as fast as `frame.to_ndarray(format="rgb24")`.
"""

import contextlib
import dataclasses
import errno
import functools
import io
import itertools
import math
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxvid import files
from jaxvid.data import transforms
from jaxvid.data.transforms import MAX_FRAMES
from jaxvid.errors import UserError

SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".flv", ".wmv"),
    *(".mpg", ".mpeg", ".ts", ".gif"),
)
IMAGES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,asf,mpeg,mpegvideo,mpegts,gif"
MAX_PIXELS = 2**25  # in one picture: 8192 x 4096
MAX_BYTES = 2**32  # of pixels in one read
VISIBLE = 128  # pixels a side that are enough for eyes
STILL = 2.0  # seconds for which one picture may be shown within a clip, or four frames if longer
# Without these two flags swscale is up to 3 of 255 wrong in a flat colour, differently by size.
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# With its macroblock tree x264 reads memory that it did not write, and gives other bytes each time.
REPEATABLE = {"x264-params": "mbtree=0"}

# PyAV before 19 raises UnicodeDecodeError for tags that are not UTF-8 without this option.
_TOLERANT = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


class VideoError(ValueError):
    """A video that cannot be read; the message is one line."""


class ReadError(VideoError):
    """A file that could not be read this time, which says nothing about its content."""


@dataclasses.dataclass(frozen=True)
class Info:
    """The properties of a file, found by decoding all of it.

    Frame n is shown at start + n * step in units of the stream. The step is 0 if the times are not
    even or if a seek gives other pictures than a scan; such a file is read from its beginning.

    parts: [first, stop) frames of each part, if gaps in the times or stills cut the video; a clip
    lies within one part. duration: seconds from the first frame to the last. times: seconds from
    the first frame to each, unless they are even.
    """

    frames: int
    height: int
    width: int
    fps: float
    start: int = 0
    step: float = 0.0
    parts: Sequence[Sequence[int]] = ()
    duration: float = 0.0
    times: Sequence[float] = ()

    def pieces(self, fps: float = 0.0) -> list[Sequence[int]]:
        """The frames of each part, in order; with fps, those shown `fps` times per second."""
        parts = [range(*part) for part in self.parts or [(0, self.frames)]]
        return [self._shown(part, fps) for part in parts] if fps else parts

    def shown(self, fps: float) -> Sequence[int]:
        """The frames shown at 0, 1 / fps, 2 / fps ... seconds, without regard to parts."""
        return self._shown(range(self.frames), fps) if fps else range(self.frames)

    def _shown(self, part, fps):
        seconds = self.times or np.linspace(0, self.duration, self.frames)
        seconds = np.maximum.accumulate(np.asarray(seconds)[part.start : part.stop])
        due = seconds[0] + np.arange(int((seconds[-1] - seconds[0] + 1e-6) * fps) + 1) / fps
        return part.start + np.searchsorted(seconds, due + 1e-6, "right") - 1

    def number(self, frame: av.VideoFrame) -> int:
        """The number of a frame by its time; -1 if a seek has lost its time."""
        return -1 if frame.pts is None else round((frame.pts - self.start) / self.step)


def opened(path: str):
    """A file for reading. Raises OSError; VideoError for a pipe or device, which could block."""
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise VideoError("is not a file with content")


def _without_waiting(path, flags):
    return os.open(path, flags | os.O_NONBLOCK)


@contextlib.contextmanager
def _opened(file):
    """Binary file -> (container, video stream); errors inside become VideoError."""
    options = {"format_whitelist": CONTAINERS}
    try:
        file.seek(0)
        if not file.read(1):
            raise VideoError("is empty")
        file.seek(0)
        with av.open(file, options=options, **_TOLERANT) as container:
            if not container.streams.video:
                raise VideoError("has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise VideoError("has a codec that FFmpeg does not know")
            if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
                raise VideoError(f"has pictures of more than {MAX_PIXELS} pixels")
            stream.thread_type = "NONE"  # frame threads can deadlock when a read ends early
            stream.codec_context.thread_count = 1
            # The decoder checks again, because pictures may change their size within a stream.
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            yield container, stream
    except VideoError:
        raise
    except av.FFmpegError as error:
        raise VideoError(f"cannot be decoded ({error.strerror or error})") from error
    except (OSError, ValueError, OverflowError) as error:
        # A broken file can make FFmpeg seek to impossible positions of the Python file object.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise ReadError(f"cannot be read ({error.strerror or error})") from error
        raise VideoError(f"cannot be decoded ({error})") from error


def _decode(container, stream, wanted=-math.inf):
    """Frames in the order of presentation; VideoError after MAX_FRAMES.

    wanted: the time, in units of the stream, before which frames that no other frame needs are left
    out, as a seek ends at a keyframe far before its aim.
    """
    number, codec = 0, stream.codec_context
    for packet in container.demux(stream):
        is_early = packet.pts is not None and packet.pts < wanted
        codec.skip_frame = "NONREF" if is_early else "DEFAULT"
        for frame in packet.decode():
            if number >= MAX_FRAMES:
                raise VideoError(f"has more than {MAX_FRAMES} frames")
            number += 1
            yield frame


def _rate(stream):
    return float(stream.average_rate or stream.guessed_rate or 25)


def _is_untimed(container):
    """AVI stores no times, and the ones FFmpeg makes up are out of order with B-frames."""
    return container.format.name == "avi"


def probe(file) -> Info:
    """Decode all of a binary file. Raises VideoError if that fails or gives no frame."""
    with _opened(file) as (container, stream):
        times, seconds, prints, last = [], [], [], 0
        for second, frame in _timed(container, stream):
            last = len(times) if frame.key_frame else last
            times.append(frame.pts)
            seconds.append(second)
            prints.append(_fingerprint(frame))
        if not times:
            raise VideoError("has no frames")
        parts = _parts(seconds, prints, _longest_still(_rate(stream)))
        info = Info(len(times), frame.height, frame.width, _rate(stream), *_even_times(times))
        uneven = seconds if len(seconds) > 1 and not _even_times(seconds)[1] else ()
        info = dataclasses.replace(info, parts=parts, duration=seconds[-1], times=tuple(uneven))
    # The last keyframe and the three frames after it.
    shown = dict(list(enumerate(prints))[last : last + 4])
    if info.step and not _seek_shows(file, info, shown):
        return dataclasses.replace(info, start=0, step=0.0)
    return info


def _fingerprint(frame):
    """A number that differs between pictures, from 64 rows or more of the brightness."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[
        :: max(1, plane.height // 64)
    ]
    return zlib.crc32(rows[:, : plane.width].tobytes())


def _longest_still(rate):
    """Seconds for which one picture may be shown within a clip of `rate` frames per second."""
    return max(STILL, 4 / rate)


def _parts(seconds, prints, longest):
    """[first, stop) of each part of a video, of the times and fingerprints of its frames.

    A part ends at the first frame that is shown for longer than `longest`, because of a gap or of
    equal frames after it. The next begins with the next picture. () if there is one part.
    """
    changes = [n for n in range(1, len(prints)) if prints[n] != prints[n - 1]]
    parts, first = [], 0
    for begin, end in itertools.pairwise([0, *changes, len(prints)]):
        until = seconds[min(end, len(seconds) - 1)]
        if abs(until - seconds[begin]) > longest:
            parts.append((first, begin + 1))
            first = end
    if first < len(prints):
        parts.append((first, len(prints)))
    return tuple(parts) if parts != [(0, len(prints))] else ()


def _seek_shows(file, info, prints):
    """Whether a seek in the file, opened again, gives the {number: fingerprint} of the scan.

    Some files fail: x264 names itself in the first packet only, and without that name FFmpeg
    decodes some of its 4:4:4 streams wrongly.
    """
    for first in (min(prints), max(prints)):  # before the second, frames are left out
        wanted = {number: prints[number] for number in prints if number >= first}
        shown = {}
        with _opened(file) as (container, stream):
            for number, frame in _from_frame(container, stream, first, info):
                if number in wanted:
                    shown[number] = _fingerprint(frame)
                if number >= max(prints):
                    break
        if shown != wanted:
            return False
    return True


def _even_times(times):
    """(start, step) if the times are even to within a quarter of a step, otherwise (0, 0.0)."""
    if None in times or len(times) < 2:
        return 0, 0.0
    step = (times[-1] - times[0]) / (len(times) - 1)
    expected = times[0] + step * np.arange(len(times))
    if step <= 0 or np.abs(np.array(times) - expected).max() > step / 4:
        return 0, 0.0
    return times[0], step


class Reformatter:
    """Frames in other sizes and pixel formats, colours to within 1 of 255."""

    def __init__(self):
        self._reformatter = VideoReformatter()

    def __call__(self, frame, format, width=None, height=None):
        return self._reformatter.reformat(
            frame, width, height, format, interpolation=EXACT, threads=1
        )


class _Scaler:
    """Frames -> uint8 [H, W, 3], upright, with square pixels and a shorter side of `size`.

    The first frame fixes the shape, even if a later frame has another. Only the upper field of an
    interlaced frame is taken, as its lines show two moments in turn.
    """

    def __init__(self, size, pixel=1.0):
        self._size, self._pixel = size, pixel  # width / height of a pixel of the source
        self._reformat = Reformatter()
        self._shape, self._field = None, _UpperField()

    def __call__(self, frame):
        if self._shape is None:
            width = max(1, round(frame.width * self._pixel))
            self._shape = transforms.cover(frame.height, width, self._size)
            self._upright = _orientation(frame)
            if self._shape[0] * self._shape[1] > MAX_PIXELS:
                raise VideoError(f"is too long and narrow ({frame.width} x {frame.height})")
        height, width = self._shape
        frame = self._field(frame) if frame.interlaced_frame else frame
        scaled = self._reformat(frame, "rgb24", width, height)
        return self._upright(scaled.to_ndarray())


class _UpperField:
    """The upper field of a frame, a frame of half the height."""

    def __init__(self):
        self._graph, self._kind = None, None

    def __call__(self, frame):
        kind = frame.width, frame.height, frame.format.name
        if kind != self._kind:
            self._graph, self._kind = Graph(), kind
            source = self._graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1)
            )
            field, sink = self._graph.add("field", "type=top"), self._graph.add("buffersink")
            self._graph.link_nodes(source, field, sink).configure()
        self._graph.vpush(frame)
        return self._graph.vpull()


def _orientation(frame):
    """A function that turns and mirrors pictures [H, W, 3] as the frame's display matrix says.

    The matrix maps the pixel (x, y) to (a x + c y, b x + d y); of a matrix that is not one of the 8
    orientations, the larger entries count.
    """
    try:
        a, b, _, c, d = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32)[:5].tolist()
    except KeyError:
        return lambda picture_HWC: picture_HWC
    except ValueError:  # PyAV before 19 fails at side data of new kinds
        return functools.partial(np.rot90, k=frame.rotation // 90)
    is_transposed = abs(b) + abs(c) > abs(a) + abs(d)
    x, y = (c, b) if is_transposed else (a, d)
    flips = slice(None, None, -1 if y < 0 else 1), slice(None, None, -1 if x < 0 else 1)
    return lambda picture_HWC: (picture_HWC.swapaxes(0, 1) if is_transposed else picture_HWC)[flips]


def _pixel_shape(stream):
    return float(stream.codec_context.sample_aspect_ratio or 1)


def _from_frame(container, stream, first, info):
    """(number, frame) pairs from frame `first` or before: after a seek, or a scan if that fails."""
    if info.step and first:
        aim = info.start + first * info.step
        container.seek(round(aim), stream=stream)
        frames = _decode(container, stream, wanted=aim - info.step / 2)
        frame = next(frames, None)
        if frame is not None and info.number(frame) <= first:
            yield info.number(frame), frame
            for frame in frames:
                yield info.number(frame), frame
            return
        container.seek(info.start, stream=stream)
    yield from enumerate(_decode(container, stream))


def read(file, numbers: Sequence[int], size: int, info: Info) -> np.ndarray:
    """Frames `numbers` (ascending) of a binary file: uint8 [T, H, W, 3], shorter side `size`.

    A number may come several times in a row. Raises VideoError if a frame is missing.
    """
    with _opened(file) as (container, stream):
        scale, taken = _Scaler(size, _pixel_shape(stream)), 0
        for number, frame in _from_frame(container, stream, int(numbers[0]), info):
            if number < numbers[taken]:
                continue
            if number > numbers[taken]:
                break
            picture_HWC = scale(frame)
            if not taken:
                video_THWC = _allocate(len(numbers), picture_HWC.shape)
            while taken < len(numbers) and numbers[taken] == number:
                video_THWC[taken] = picture_HWC
                taken += 1
            if taken == len(numbers):
                return video_THWC
    raise VideoError(f"gave {taken} of the {len(numbers)} frames asked for")


def _allocate(frames, shape):
    if frames * int(np.prod(shape)) > MAX_BYTES:
        raise VideoError(f"would fill {frames * int(np.prod(shape))} bytes")
    return np.empty((frames, *shape), np.uint8)


def resample(file, size: int, fps: float) -> Iterator[np.ndarray | None]:
    """Yield the pictures that a binary file shows at 0, 1 / fps, 2 / fps ... seconds.

    uint8 [H, W, 3], shorter side `size`; the time starts at the first frame and ends at the last.
    An fps of 0 yields every frame. Where the times have a gap, or one picture is shown for long
    (STILL), the video is cut: the picture comes once, then None, and the time starts again.
    """
    with _opened(file) as (container, stream):
        rate = fps or _rate(stream)
        longest = _longest_still(rate)
        pictures = _by_clock(_timed(container, stream), fps, longest)
        scale = _Scaler(size, _pixel_shape(stream))
        scaled = (None if frame is None else scale(frame) for frame in pictures)
        yield from _without_stills(scaled, longest * rate)


def _by_clock(timed_frames, fps, longest):
    """Frames at the times of `resample`; None at gaps of more than `longest` seconds."""
    due, start, held, last = 0, 0.0, None, 0.0
    for time, frame in timed_frames:
        is_gap = held is not None and abs(time - last) > longest
        if fps and held is not None:
            until = last + 1e-6 if is_gap else time - 1e-6
            while due / fps < until - start:
                yield held
                due += 1
        if is_gap:
            yield None
            due, start = 0, time
        if not fps:
            yield frame
        held, last = frame, time
    while fps and held is not None and due / fps <= last - start + 1e-6:
        yield held
        due += 1


def _without_stills(pictures, most):
    """Pass pictures through; of more than `most` equal ones in a row, one, and then None."""
    held, count = None, 0
    for picture in pictures:
        if count and picture is not None and np.array_equal(picture, held):
            count += 1
            continue
        yield from _run(held, count, most)
        held, count = picture, int(picture is not None)
        if picture is None:
            yield None
    yield from _run(held, count, most)


def _run(picture, count, most):
    return [picture, None] if count > most else [picture] * count


def resize(video_THWC: np.ndarray, size: int) -> np.ndarray:
    """uint8 [T, H, W, 3] -> the same frames with a shorter side of `size`."""
    scale = _Scaler(size)
    pictures = (av.VideoFrame.from_ndarray(p, format="rgb24") for p in video_THWC)
    return np.stack([scale(picture) for picture in pictures])


def _timed(container, stream):
    """(seconds since the first frame, frame) pairs; without times, by the frame rate."""
    untimed, start = _is_untimed(container), None
    for number, frame in enumerate(_decode(container, stream)):
        untimed = untimed or frame.time is None
        start = frame.time if start is None else start
        yield (number / _rate(stream) if untimed else frame.time - start), frame


def read_clip(
    path: str, frames: int, size: int, fps: float = 0.0, stride: int = 1
) -> tuple[np.ndarray, float]:
    """(the first `frames` frames of a file, cropped to a square: uint8 [T, size, size, 3]; fps).

    Every `stride`-th of the frames shown `fps` times per second, or of all frames; the fps returned
    is that of the clip. Raises UserError.
    """
    try:
        with opened(path) as file:
            info = probe(file)
            numbers = info.shown(fps)[::stride][:frames]
            if len(numbers) < frames:
                at = f" at {fps:g} per second" if fps else ""
                every = f", every {stride}th" if stride > 1 else ""
                raise VideoError(f"gives {len(numbers)} frames{at}{every}, {frames} are needed")
            video_THWC = read(file, numbers, size, info)
    except (OSError, VideoError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        remedy = f"give a readable video of {frames} frames or more"
        raise UserError(f"clip={path}: {reason}; {remedy}") from error
    clip_THWC = transforms.Window(frames, size).augment(video_THWC, None)
    return clip_THWC, (fps or info.fps) / stride


def read_image(path: str, size: int) -> np.ndarray:
    """A PNG or JPEG file, cropped to a square: uint8 [1, size, size, 3], a clip of one frame.

    It is turned as its EXIF data say, and what is transparent is black. Raises UserError.
    """
    try:
        with opened(path) as file:
            picture = _upright_rgb(file)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        clip_THWC = _Scaler(size)(frame)[None]
    except UnidentifiedImageError as error:
        raise UserError(f"clip={path}: is no PNG or JPEG; give a readable one") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        remedy = "give a readable PNG or JPEG file"
        raise UserError(f"clip={path}: {reason}; {remedy}") from error
    return transforms.Window(1, size).augment(clip_THWC, None)


def _upright_rgb(file):
    """The uint8 [H, W, 3] of an image file; VideoError if it is too large."""
    with Image.open(file, formats=sorted(set(IMAGES.values()))) as image:
        if image.width * image.height > MAX_PIXELS:
            raise VideoError(f"has more than {MAX_PIXELS} pixels")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey, which convert would cut off
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        ground = Image.new("RGBA", image.size, "black")
        picture = Image.alpha_composite(ground, image.convert("RGBA"))
        return np.ascontiguousarray(np.asarray(picture)[..., :3])


def encode_chunk(video_THWC: np.ndarray) -> bytes:
    """uint8 [T, H, W, 3], even H and W -> one group of pictures as raw H.264 (crf 18) bytes."""
    writer = ChunkWriter(*video_THWC.shape[:3])
    writer.write(video_THWC)
    return writer.finish()


class ChunkWriter:
    """Encodes one group of `frames` pictures as raw H.264, given in one or more pieces.

    lossless: keeps the exact pixels, in many times the bytes; sides need not be even.
    """

    def __init__(self, frames, height, width, lossless=False):
        codec = av.CodecContext.create("libx264rgb" if lossless else "libx264", "w")
        codec.width, codec.height = width, height
        codec.pix_fmt = "rgb24" if lossless else "yuv420p"
        codec.time_base, codec.framerate = Fraction(1, 25), Fraction(25)  # not stored
        # fastdecode: no deblocking filter and no arithmetic coding halve the time to read a chunk.
        quality = {"qp": "0"} if lossless else {"crf": "18", "tune": "fastdecode", **REPEATABLE}
        codec.options = {"g": str(frames), "threads": "1", **quality}
        self._codec, self._packets, self._number = codec, [], 0
        self._reformat = Reformatter()

    def write(self, video_THWC: np.ndarray) -> None:
        """Encode the next frames, uint8 [t, H, W, 3]."""
        for picture_HWC in np.ascontiguousarray(video_THWC):
            frame = av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")
            frame = self._reformat(frame, self._codec.pix_fmt)
            frame.pts = self._number
            self._packets += map(bytes, self._codec.encode(frame))
            self._number += 1

    def finish(self) -> bytes:
        """The bytes of the whole group."""
        return b"".join([*self._packets, *map(bytes, self._codec.encode(None))])


def decode_chunk(data: bytes, numbers: Sequence[int], size: int) -> np.ndarray:
    """Frames `numbers` (ascending) of a chunk: uint8 [T, size, size, 3]. Raises VideoError."""
    codec = av.CodecContext.create("h264", "r")
    codec.thread_type, codec.thread_count = "NONE", 1
    codec.options = {"max_pixels": str(MAX_PIXELS)}
    reformat = Reformatter()
    video_THWC = np.empty((len(numbers), size, size, 3), np.uint8)
    taken = 0
    try:
        for number, frame in enumerate(_chunk_frames(codec, data)):
            if number == numbers[taken]:
                video_THWC[taken] = reformat(frame, "rgb24", size, size).to_ndarray()
                taken += 1
                if taken == len(numbers):
                    return video_THWC
    except av.FFmpegError as error:
        raise VideoError(f"cannot be decoded ({error.strerror})") from error
    raise VideoError(f"gave {taken} of the {len(numbers)} frames asked for")


def _chunk_frames(codec, data):
    for packet in [*codec.parse(data), *codec.parse(None), None]:
        yield from codec.decode(packet)


def gif_bytes(video_THWC: np.ndarray, fps: float) -> bytes:
    """uint8 [T, H, W, 3] -> an endlessly looping GIF."""
    first, *rest = [Image.fromarray(picture_HWC) for picture_HWC in video_THWC]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def write_gif(path, video_THWC: np.ndarray, fps: float) -> None:
    """uint8 [T, H, W, 3] -> a looping GIF file."""
    files.write(path, gif_bytes(video_THWC, fps))


def enlarge(video: np.ndarray) -> np.ndarray:
    """uint8 [..., H, W, 3], for eyes: small frames in whole factors up to VISIBLE a side."""
    factor = max(1, VISIBLE // max(video.shape[-3:-1]))
    return video.repeat(factor, axis=-3).repeat(factor, axis=-2)


def contact_sheet(video_BTHWC: np.ndarray, columns: int = 16) -> bytes:
    """uint8 [B, T, H, W, 3] -> PNG bytes: a row per clip, with `columns` frames of it at most."""
    T = video_BTHWC.shape[1]
    shown = np.linspace(0, T - 1, min(T, columns)).round().astype(int)
    line = ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0))  # a black line below and right of each frame
    tiles_BTHWC = np.pad(video_BTHWC[:, shown], line)
    rows_BHTWC = tiles_BTHWC.swapaxes(1, 2)
    B, H, T, W, C = rows_BHTWC.shape
    buffer = io.BytesIO()
    Image.fromarray(rows_BHTWC.reshape(B * H, T * W, C)[:-1, :-1]).save(buffer, "PNG")
    return buffer.getvalue()
