"""A directory of video files, decoded on demand."""

import dataclasses
import os

import numpy as np
from absl import logging

from jaxvid.data import clips, source, video
from jaxvid.data.transforms import Window, cover
from jaxvid.errors import UserError

KEPT_BYTES = 2**29  # of decoded frames in each process


class Source(source.Source):
    """Windows of the videos below config.path.

    The directories directly below it are the classes. Files that cannot be decoded, or are shorter
    than the window, are left out at the start, counted and named: in `skipped` and in one warning.
    With config.fps, clips are resampled by their timestamps. A window lies within one part of a
    video that is cut at gaps in its times or at stills. If the scaled frames of a split fit into
    KEPT_BYTES, a clip is decoded at its first read and kept.
    """

    def __init__(self, config, split):
        self._root, self._window = config.path, Window.of(config)
        self.fps = config.get("fps", 0.0)
        names = clips.find(self._root)
        infos, self.skipped = clips.index(self._root, names)
        self._classes = clips.classes_of(infos)
        splits = clips.split_of(infos)
        for name, info in infos.items():
            most = max(map(len, info.pieces(self.fps)))
            if most < self._window.span:
                between = f" in a row, it {clips.cuts_in(info.parts)}" if info.parts else ""
                at = f" at {self.fps:g} per second" if self.fps else ""
                reason = f"has {most} frames{at}{between}, a window spans {self._window.span}"
                self.skipped.append((name, reason))
        short = {name for name, _ in self.skipped}
        self._clips = [
            (name, info)
            for name, info in infos.items()
            if splits[name] == split and name not in short
        ]
        if len(self.skipped) == len(names):
            raise UserError(
                f"path={self._root!r}: {clips.report(self.skipped, len(names))}; "
                "give readable videos or a shorter window (frames, stride)"
            )
        if self.skipped:
            logging.warning("%s: %s", self._root, clips.report(self.skipped, len(names)))
        cut = [(n, clips.cuts_in(info.parts)) for n, info in self._clips if info.parts]
        if cut:
            logging.warning("%s: %s", self._root, clips.report(cut, len(names), "cut"))
        self._pieces = [info.pieces(self.fps) for _, info in self._clips]
        self._kept = {} if self._bytes() <= KEPT_BYTES else None
        facts = {name: dataclasses.astuple(info) for name, info in infos.items()}
        self.digest = source.digest_of(facts)
        self.num_classes = len(self._classes)
        self.captions = bool(self._classes)

    def _bytes(self):
        """Bytes of all frames of the split after scaling."""
        infos = [info for _, info in self._clips]
        sides = [cover(info.height, info.width, self._window.size) for info in infos]
        return sum(3 * info.frames * H * W for info, (H, W) in zip(infos, sides))

    def __len__(self):
        return len(self._clips)

    def listing(self):
        return "\n".join(name for name, _ in self._clips)

    def name(self, index):
        return self._clips[index][0]

    def read(self, index, rng=None):
        """A window of clip `index`: its start drawn with `rng`, or the middle without."""
        name, info = self._clips[index]
        window = self._window.choose(self._pieces[index], rng)
        if self._kept is None:
            video_THWC = self._decode(index, window)
        else:
            if index not in self._kept:
                self._kept[index] = self._decode(index, range(info.frames))
            video_THWC = self._kept[index][np.array(window)]
        label = clips.class_of(name)
        return {
            "video": self._window.augment(video_THWC, rng),
            "label": self._classes.index(label) if self._classes else 0,
            "caption": label if self._classes else "",
        }

    def _decode(self, index, numbers):
        name, info = self._clips[index]
        try:
            with video.opened(os.path.join(self._root, name)) as file:
                return video.read(file, numbers, self._window.size, info)
        except (OSError, video.VideoError) as error:
            raise UserError(
                f"clip={name}: {error}, though it was readable at the start; restore or remove it"
            ) from error
