"""The source of encoded clips: its windows are starts of clips, mirrored or not."""

import functools

import jax
import numpy as np
import pytest

from jaxvid import data
from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError
from jaxvid.runs import open_tokenizer
from tests.tokenizer_runs import coded, encoded, gaussian, prepared
from tests.videos import data_config


def source(path, split="train", name="latents", **changes):
    return data.make_source(data_config(name, path, **dict(frames=5, size=12) | changes), split)


def by_name(clips):
    return {clips.name(index): clips[index] for index in range(len(clips))}


def test_validation_keeps_the_exact_frames():
    found = source(encoded(gaussian()), "validation")
    [clip] = by_name(found).values()
    [pixels] = by_name(source(prepared(), "validation", "array_record")).values()
    np.testing.assert_array_equal(clip["video"], pixels["video"])
    assert clip["latents"].shape == (3, 9, 8) and clip["latents"].dtype == np.float32
    assert clip["label"] == pixels["label"] and clip["caption"] == pixels["caption"] != ""
    assert (found.num_classes, found.captions) == (2, True)
    assert found.digest not in ("", source(encoded(coded()), "validation").digest)
    assert found.tokenizer == open_tokenizer(str(gaussian())).digest != ""


def test_a_shorter_window_is_the_start():
    whole, first = (by_name(source(encoded(coded()), frames=frames)) for frames in (5, 3))
    assert len(first) == 3
    for name, clip in first.items():
        assert clip["tokens"].shape == (2, 9) and clip["tokens"].dtype == np.int32
        assert "video" not in clip
        np.testing.assert_array_equal(clip["tokens"], whole[name]["tokens"][:2])


def test_mirrored_latents_are_those_of_mirrored_pixels():
    clips = source(encoded(gaussian(), mirrored=True), flip=True)
    frozen = open_tokenizer(str(gaussian()))
    encode = functools.partial(jax.jit(frozen.tokenizer.encode), frozen.params)
    video = normalize(source(prepared(), name="array_record")[0]["video"])[None]
    plain, mirrored = (encode(x)[0][0] for x in (video, video[:, :, :, ::-1]))
    seen = set()
    for seed in range(12):
        latents = clips.read(0, np.random.default_rng(seed))["latents"]
        is_mirrored = np.abs(latents - mirrored).max() < 1e-4
        np.testing.assert_allclose(latents, mirrored if is_mirrored else plain, atol=1e-4)
        seen.add(bool(is_mirrored))
    assert seen == {True, False}
    np.testing.assert_allclose(clips[0]["latents"], plain, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"frames": 7}, "^frames=7: the set stores 5 .* use 5"),
        ({"frames": 4}, "^frames=4: .* use 3"),
        ({"size": 8}, "^size=8: the set was encoded at 12"),
        ({"stride": 2}, "^stride=2: .* use 1"),
        ({"crop": "random"}, "^crop='random': .*use center"),
        ({"flip": True}, "^flip=True: the set has no mirrored clips"),
        ({"name": "array_record"}, "^path=.*: holds latents, not h264"),
    ],
)
def test_other_windows_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        source(encoded(coded()), **changes)
