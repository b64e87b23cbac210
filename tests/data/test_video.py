"""Video files: the right frames by seek and by scan, hostile input, and what we write."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from jaxvid.data import mp4, video
from jaxvid.errors import UserError
from tests.videos import frame_numbers, moving_bars, write_clip, write_hostile


def read(path, numbers, size=48):
    with open(path, "rb") as file:
        return video.read(file, numbers, size, video.probe(file))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi"])
def test_reads_the_frames_asked_for(tmp_path, suffix):
    path = tmp_path / f"bars{suffix}"
    truth = write_clip(path, 32)
    assert read(path, range(32)).shape == truth.shape
    assert np.abs(read(path, range(32)).astype(float) - truth).mean() < 12
    for wanted in ([0], [31], [9, 10, 11], [5, 12, 19, 26]):
        assert frame_numbers(read(path, wanted)) == [n % 16 for n in wanted]


def test_a_seek_shows_what_a_scan_shows(tmp_path):
    path = tmp_path / "bars.mp4"
    write_clip(path, 40, gop=10)
    whole = read(path, range(40))
    with open(path, "rb") as file:
        assert video.probe(file).step > 0
    for first in range(40):
        np.testing.assert_array_equal(read(path, [first])[0], whole[first])


def test_before_a_window_frames_that_none_needs_are_left_out(tmp_path):
    """B-frames between the keyframe of a seek and its aim."""
    write_clip(tmp_path / "moving.mp4", 40, gop=40, options={"bf": "2", "x264-params": "b-adapt=0"})
    with open(tmp_path / "moving.mp4", "rb") as file:
        info = video.probe(file)
        with video._opened(file) as (container, stream):
            numbers = [n for n, _ in video._from_frame(container, stream, 20, info)]
    assert 0 < len([n for n in numbers if n < 20]) < 20
    assert [n for n in numbers if n >= 20] == list(range(20, 40))


@pytest.mark.parametrize("encode", [video.encode_chunk, lambda clip: encoded(mp4.Encoder, clip)])
def test_the_same_pictures_give_the_same_bytes(encode):
    """Whatever lies in the memory that the encoder gets."""
    rng = np.random.default_rng(0)
    video_THWC = rng.integers(0, 256, (16, 6, 6, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    found = set()
    for _ in range(12):
        memory = [rng.bytes(int(size)) for size in rng.integers(10**3, 2 * 10**5, 20)]
        found.add(encode(video_THWC))
        del memory
    assert len(found) == 1


def encoded(encoder, video_THWC):
    encoder = encoder(8.0, *video_THWC.shape[1:3])
    encoder.write(video_THWC)
    return encoder.finish()


def test_small_frames_are_enlarged_for_eyes_in_whole_factors():
    small = np.random.default_rng(0).integers(0, 256, (2, 3, 24, 20, 3), dtype=np.uint8)
    large = video.enlarge(small)
    assert large.shape == (2, 3, 120, 100, 3)
    for row, column in ((0, 0), (4, 4), (2, 3)):
        np.testing.assert_array_equal(large[..., row::5, column::5, :], small)
    assert video.enlarge(np.zeros((1, 129, 8, 3), np.uint8)).shape == (1, 129, 8, 3)


def test_a_file_whose_seeks_lie_is_scanned(tmp_path, monkeypatch):
    path = tmp_path / "bars.mp4"
    write_clip(path, 24, gop=8)
    prints = iter(range(100))
    monkeypatch.setattr(video, "_fingerprint", lambda frame: next(prints))
    with open(path, "rb") as file:
        assert video.probe(file) == video.Info(24, 48, 64, 24.0, duration=pytest.approx(23 / 24))
    assert frame_numbers(read(path, [7, 13])) == [7, 13]


def test_uneven_times_are_scanned(tmp_path):
    truth = write_clip(tmp_path / "source.mp4", 12)
    path = tmp_path / "uneven.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(truth):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = 30 * number + 200 * (number > 6), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with open(path, "rb") as file:
        assert video.probe(file).step == 0
    assert frame_numbers(read(path, [3, 7, 11])) == [3, 7, 11]


def test_shorter_side_is_scaled_to_size(tmp_path):
    write_clip(tmp_path / "wide.mp4", 4, height=48, width=96)
    assert read(tmp_path / "wide.mp4", [1], size=24).shape == (1, 24, 48, 3)


def test_a_stream_that_changes_shape_keeps_the_first():
    scale = video._Scaler(24)
    for height, width in [(48, 96), (96, 48), (24, 24)]:
        picture = np.zeros((height, width, 3), np.uint8)
        assert scale(av.VideoFrame.from_ndarray(picture, format="rgb24")).shape == (24, 48, 3)


@pytest.mark.parametrize(
    "a, b, c, d", [m for s in (1, -1) for t in (1, -1) for m in ((s, 0, 0, t), (0, s, t, 0))]
)
def test_display_matrices_turn_and_mirror(tmp_path, a, b, c, d):
    """All 8 orientations, in both readers: the pixel (x, y) goes to (a x + c y, b x + d y)."""
    path = tmp_path / "bars.mp4"
    picture_HW = np.kron(np.arange(0, 240, 40).reshape(2, 3), np.ones((16, 16)))
    write_clip(path, pictures=np.stack([picture_HW.astype(np.uint8)] * 3, -1)[None].repeat(2, 0))
    plain = read(path, range(2))
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # version 0: nine fixed-point numbers follow
    sides = [n << 16 for n in (a, b, c, d)]
    struct.pack_into(">9i", data, matrix, *sides[:2], 0, *sides[2:], 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    y, x = np.mgrid[: plain.shape[1], : plain.shape[2]]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    expected = np.empty((2, to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    expected[:, to_y, to_x] = plain
    np.testing.assert_array_equal(read(path, range(2)), expected)
    with open(path, "rb") as file:
        np.testing.assert_array_equal(np.stack(list(video.resample(file, 48, 0))), expected)


def test_hostile_files_are_refused_in_one_line(tmp_path):
    write_hostile(tmp_path)
    for name, reason in (
        ("zero.mp4", "is empty"),
        ("text.mp4", "cannot be decoded"),
        ("truncated.mp4", "cannot be decoded"),
        ("sound.mp4", "has no video stream"),
    ):
        with pytest.raises(UserError, match=f"clip=.*{name}: {reason}.*; give a") as caught:
            video.read_clip(tmp_path / name, 4, 48)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value.__cause__, video.VideoError)
    # Tags that are not UTF-8 do no harm.
    assert video.read_clip(tmp_path / "tags.mp4", 4, 48)[0].shape == (4, 48, 48, 3)


def corners(picture_HWC):
    """Brightness of the corners, clockwise from the upper left."""
    ends = (2, 2), (2, -3), (-3, -3), (-3, 2)
    return [round(float(picture_HWC[end].mean())) for end in ends]


def test_an_image_is_read_upright_and_cropped(tmp_path):
    """Four quarters, 10, 80, 150 and 220, in all the ways that files hold pictures."""
    quarters_HW = np.array([[10, 80], [220, 150]], np.uint8).repeat(48, 0).repeat(48, 1)
    plain = Image.fromarray(quarters_HW).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # its display turns it clockwise
    plain.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    plain.save(tmp_path / "plain.png")
    plain.quantize(16).save(tmp_path / "palette.png")
    Image.fromarray(quarters_HW.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    wide_HW = np.pad(quarters_HW, ((0, 0), (40, 40)), constant_values=255)
    Image.fromarray(wide_HW).save(tmp_path / "wide.jpeg", quality=95)
    for path in tmp_path.iterdir():
        assert path.suffix in video.IMAGES
        clip_THWC = video.read_image(path, 24)
        assert clip_THWC.shape == (1, 24, 24, 3) and clip_THWC.dtype == np.uint8
        np.testing.assert_allclose(corners(clip_THWC[0]), [10, 80, 150, 220], atol=2, err_msg=path)
    clear = plain.copy()
    clear.putalpha(Image.fromarray(np.where(quarters_HW == 80, 0, 255).astype(np.uint8)))
    clear.save(tmp_path / "clear.png")
    assert corners(video.read_image(tmp_path / "clear.png", 24)[0]) == [10, 0, 150, 220]


def test_hostile_images_are_refused_in_one_line(tmp_path, monkeypatch):
    write_hostile(tmp_path)
    for name, size in {"large.png": (96, 48), "long.png": (99, 9), "picture.gif": (9, 9)}.items():
        Image.new("RGB", size).save(tmp_path / name)
    noise_HWC = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
    Image.fromarray(noise_HWC).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1500])
    monkeypatch.setattr(video, "MAX_PIXELS", 1000)
    for name, reason in (
        ("zero.mp4", "is no PNG or JPEG"),
        ("text.mp4", "is no PNG or JPEG"),
        ("picture.gif", "is no PNG or JPEG"),
        ("none.png", "No such file or directory"),
        ("", "Is a directory"),
        ("large.png", "has more than 1000 pixels"),
        ("long.png", "is too long and narrow"),
        ("cut.png", ".*truncated"),
    ):
        with pytest.raises(UserError, match=f"clip=.*{name}: {reason}.*; give a rea") as caught:
            video.read_image(tmp_path / name, 24)
        assert "\n" not in str(caught.value)


FORMATS = {
    ".mpg": ("mpeg2video", "yuv420p", 24),
    ".mpeg": ("mpeg1video", "yuv420p", 24),
    ".ts": ("libx264", "yuv420p", 24),
    ".3gp": ("libx264", "yuv420p", 24),
    ".wmv": ("msmpeg4v3", "yuv420p", 24),
    ".flv": ("flv", "yuv420p", 24),
    ".gif": ("gif", "gray", 20),
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_other_formats(tmp_path, suffix):
    path = tmp_path / f"bars{suffix}"
    codec, pixels, fps = FORMATS[suffix]
    write_clip(path, 12, codec=codec, pixels=pixels, fps=fps)
    assert suffix in video.SUFFIXES
    with open(path, "rb") as file:
        assert video.probe(file).fps == pytest.approx(fps)
    assert frame_numbers(read(path, [0, 5, 11])) == [0, 5, 11]
    assert shown(path, 0) == [list(range(12))]


def test_other_containers_are_refused(tmp_path):
    write_clip(tmp_path / "bars.nut", 4)
    with pytest.raises(video.VideoError, match="cannot be decoded"):
        read(tmp_path / "bars.nut", [0])


def test_caps_on_size(tmp_path, monkeypatch):
    path = tmp_path / "bars.mp4"
    write_clip(path, 8)
    monkeypatch.setattr(video, "MAX_FRAMES", 7)
    with pytest.raises(video.VideoError, match="more than 7 frames"):
        read(path, [0])
    monkeypatch.setattr(video, "MAX_FRAMES", 8)
    monkeypatch.setattr(video, "MAX_BYTES", 1000)
    with pytest.raises(video.VideoError, match="would fill"):
        read(path, [0])
    monkeypatch.setattr(video, "MAX_PIXELS", 1000)
    with pytest.raises(video.VideoError, match="more than 1000 pixels"):
        read(path, [0])
    with pytest.raises(video.VideoError, match="cannot be decoded"):
        video.decode_chunk(video.encode_chunk(np.zeros((2, 64, 64, 3), np.uint8)), [0], 64)


def test_a_missing_frame_is_an_error_never_padding(tmp_path):
    path = tmp_path / "bars.mp4"
    write_clip(path, 8)
    with pytest.raises(video.VideoError, match="gave 1 of the 2 frames"):
        read(path, [7, 8])


def test_resample_follows_the_clock(tmp_path):
    path = tmp_path / "bars.mp4"
    write_clip(path, 16, fps=24)

    assert shown(path, 0) == shown(path, 24) == [list(range(16))]
    assert shown(path, 8) == [[0, 3, 6, 9, 12, 15]]
    assert shown(path, 48) == [[n // 2 for n in range(31)]]
    assert shown(path, 10) == [[0, 2, 4, 7, 9, 12, 14]]  # floor(2.4 n)


@pytest.mark.parametrize("times", [None, [*range(10), *range(14, 28, 2)]])
def test_frames_by_number_follow_the_same_clock(tmp_path, times):
    """Of even and uneven times: what `resample` shows."""
    path = tmp_path / "bars.mp4"
    write_clip(path, 16, times=times, options={"bf": "0"})
    with open(path, "rb") as file:
        info = video.probe(file)
    for fps in (0, 8, 10, 48):
        assert [list(piece) for piece in info.pieces(fps)] == shown(path, fps)
    clip_THWC, fps = video.read_clip(path, 3, 48, fps=8, stride=2)
    assert (clip_THWC.shape, fps) == ((3, 48, 48, 3), 4)
    wanted = np.array(shown(path, 8)[0][:5:2])
    np.testing.assert_array_equal(clip_THWC, read(path, wanted.tolist())[:, :, 8:56])
    assert video.read_clip(path, 3, 48, stride=2)[1] == pytest.approx(info.fps / 2)
    with pytest.raises(
        UserError, match=r"gives \d frames at 8 per second, every 2th, 9 are needed"
    ):
        video.read_clip(path, 9, 48, fps=8, stride=2)


def test_resample_of_avi_uses_its_rate(tmp_path):
    path = tmp_path / "bars.avi"
    write_clip(path, 16, fps=24)
    with open(path, "rb") as file:
        assert frame_numbers(np.stack(list(video.resample(file, 48, 12)))) == list(range(0, 16, 2))


def shown(path, fps):
    """Numbers of the frames of each part."""
    parts = [[]]
    with open(path, "rb") as file:
        for picture_HWC in video.resample(file, 48, fps):
            if picture_HWC is None:
                parts.append([])
            else:
                parts[-1] += frame_numbers(picture_HWC[None])
    return parts


HOUR = 3600 * 24


def test_a_gap_in_the_times_cuts(tmp_path):
    path = tmp_path / "gap.mp4"
    write_clip(path, 12, times=[*range(6), *range(HOUR, HOUR + 6)], options={"bf": "0"})
    assert shown(path, 0) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert shown(path, 12) == [[0, 2, 4], [6, 8, 10]]
    with open(path, "rb") as file:
        assert video.probe(file).parts == ((0, 6), (6, 12))


def test_a_pause_or_a_slow_video_is_not_cut(tmp_path):
    write_clip(tmp_path / "pause.mp4", 4, times=[0, 1, 30, 31], options={"bf": "0"})
    assert shown(tmp_path / "pause.mp4", 4) == [[0, 1, 1, 1, 1, 2]]
    write_clip(tmp_path / "slow.mp4", 4, times=[0, 120, 240, 360], options={"bf": "0"})
    assert shown(tmp_path / "slow.mp4", 0) == [[0, 1, 2, 3]]


def test_a_still_cuts(tmp_path):
    """A picture of 60 frames, 2.5 seconds, comes once."""
    truth = moving_bars(10)
    path = tmp_path / "still.mp4"
    write_clip(path, pictures=truth[[0, 1, 2, 3, *[4] * 60, *range(5, 10)]], options={"qp": "0"})
    assert shown(path, 0) == shown(path, 24) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert shown(path, 12) == [[0, 2, 4], [5, 7, 9]]
    with open(path, "rb") as file:
        assert video.probe(file).parts == ((0, 5), (64, 69))
    write_clip(path, pictures=truth[[0] * 60], options={"qp": "0"})
    assert shown(path, 8) == [[0], []]


def test_interlaced_frames_give_one_field(tmp_path):
    path = tmp_path / "fields.mkv"
    picture_HWC = np.full((64, 64, 3), 40, np.uint8)
    picture_HWC[1::2] = 200  # the other field: another moment
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1"}
    write_clip(path, pictures=np.stack([picture_HWC] * 4), options=options)
    field_THWC = read(path, range(4), size=32)
    assert field_THWC.shape == (4, 32, 32, 3)
    assert np.abs(field_THWC.astype(int) - 40).max() < 12


def test_chunks_round_trip_closely_and_by_number(tmp_path):
    truth = write_clip(tmp_path / "bars.mp4", 16)[:, :, :48]
    data = video.encode_chunk(truth)
    decoded = video.decode_chunk(data, range(16), 48)
    assert np.abs(decoded.astype(float) - truth).mean() < 12
    np.testing.assert_array_equal(video.decode_chunk(data, [2, 7, 12], 48), decoded[[2, 7, 12]])
    assert video.decode_chunk(data, [0], 24).shape == (1, 24, 24, 3)


def test_lossless_chunks_keep_every_pixel():
    video_THWC = np.random.default_rng(0).integers(0, 256, (5, 13, 13, 3), dtype=np.uint8)
    writer = video.ChunkWriter(5, 13, 13, lossless=True)
    writer.write(video_THWC[:3])
    writer.write(video_THWC[3:])
    np.testing.assert_array_equal(video.decode_chunk(writer.finish(), range(5), 13), video_THWC)


def test_broken_chunks_are_errors():
    data = video.encode_chunk(np.zeros((4, 32, 32, 3), np.uint8))
    for broken in (b"", b"no video", data[: len(data) // 3]):
        with pytest.raises(video.VideoError):
            video.decode_chunk(broken, range(4), 32)


def test_written_mp4_reads_back_and_odd_sides_grow(tmp_path):
    truth = np.repeat(np.linspace(20, 230, 6).astype(np.uint8), 31 * 45 * 3)
    truth = truth.reshape(6, 31, 45, 3)
    mp4.write(tmp_path / "grey.mp4", truth, 8)
    back = read(tmp_path / "grey.mp4", range(6), size=32)
    assert back.shape == (6, 32, 46, 3)
    assert np.abs(back[:, :31, :45].astype(float) - truth).max() < 8
    with open(tmp_path / "grey.mp4", "rb") as file:
        assert video.probe(file).fps == 8


def test_gif_has_every_frame_and_loops(tmp_path):
    pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full(
        (1, 8, 8, 3), 50, np.uint8
    )
    video.write_gif(tmp_path / "grey.gif", pictures, 10)
    with Image.open(tmp_path / "grey.gif") as gif:
        assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (5, 100, 0)


def test_contact_sheet_has_a_row_per_clip_and_a_column_per_frame():
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 10, 3), dtype=np.uint8)
    sheet = np.asarray(Image.open(io.BytesIO(video.contact_sheet(clips))))
    assert sheet.shape == (2 * 9 - 1, 3 * 11 - 1, 3)
    np.testing.assert_array_equal(sheet[9:17, 22:32], clips[1, 2])
    assert not sheet[8].any()
    assert not sheet[:, 10].any()
    few = np.asarray(Image.open(io.BytesIO(video.contact_sheet(clips, columns=2))))
    np.testing.assert_array_equal(few[:8, 11:], clips[0, 2])


COLOURS = np.array([(128,) * 3, (0, 0, 0), (255, 255, 255), (200, 30, 30), (30, 30, 200)])


@pytest.mark.parametrize("size", [24, 31, 48])
def test_flat_colours_keep_their_value(tmp_path, size):
    """From a frame of 4:2:0 at any size, and on through a chunk."""
    for colour in COLOURS:
        source = np.full((4, 48, 48, 3), colour, np.uint8)
        decoded_THWC = video.decode_chunk(video.encode_chunk(source), range(4), size)
        assert np.abs(decoded_THWC.astype(int) - colour).max() <= 2
        mp4.write(tmp_path / "flat.mp4", source, 8)
        assert np.abs(read(tmp_path / "flat.mp4", range(4), size).astype(int) - colour).max() <= 2
    # Exactly one grey: Y 126, U and V 128.
    grey = av.VideoFrame(64, 48, "yuv420p")
    for plane, value in zip(grey.planes, (126, 128, 128)):
        plane.update(bytes([value]) * plane.buffer_size)
    assert (video._Scaler(size)(grey) == 128).all()
