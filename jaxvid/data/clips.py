"""A directory of clips: its files, their classes and splits, and the results of decoding them."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Sequence

import numpy as np
from absl import logging

from jaxvid import checks, files, memory, schema
from jaxvid.data import progress, video
from jaxvid.data.transforms import MAX_FRAMES, MAX_SIZE, Window
from jaxvid.errors import UserError, printable

VALIDATION_SHARE = 0.1


def find(root: str, field: str = "path") -> list[str]:
    """Names of the video files below a directory, relative to it and sorted; no hidden files.

    Links to directories are followed, each directory once. Other files, and links that are not
    followed, are counted in one warning. Raises UserError, which names `field`, if there is no
    directory or no video in it.
    """
    if not root or not os.path.isdir(root):
        raise UserError(f"{field}={str(root)!r}: no such directory; name a directory of videos")
    names, others = _walk(str(root))
    counts = collections.Counter(others)
    left_out = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    if not names:
        found = f" (only {printable(left_out)})" if others else ""
        suffixes = " ".join(video.SUFFIXES)
        raise UserError(f"{field}={str(root)!r}: holds no {suffixes} file{found}; add some")
    if others:
        logging.warning("%s: left out, as no videos: %s", root, printable(left_out))
    return sorted(names)


def _walk(root):
    """(names of video files, the kind of each other file) below a directory."""
    names, others, seen = [], [], set()
    waiting = collections.deque([root])
    links = []  # followed last, so that a directory has its own name and not that of a link
    while waiting or links:
        folder = waiting.popleft() if waiting else links.pop(0)
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            others.append("links to a directory that is read already")
            continue
        seen.add((stat.st_dev, stat.st_ino))
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else waiting).append(entry.path)
            elif entry.name.lower().endswith(video.SUFFIXES):
                names.append(pathlib.Path(entry.path).relative_to(root).as_posix())
            else:
                others.append(pathlib.Path(entry.name).suffix.lower() or "without a suffix")
    return names, others


def class_of(name: str) -> str:
    """The class of a clip: the first directory of its name, or "" if there is none."""
    return name.split("/")[0] if "/" in name else ""


def classes_of(names) -> list[str]:
    """The classes of a set of clips in order of their labels; [] if there is only one class."""
    classes = sorted(set(map(class_of, names)))
    return classes if len(classes) > 1 else []


def scenes_of(names) -> list[list[str]]:
    """The clips of each scene. Hashes of the names decide the order of the scenes.

    Clips whose names differ only in a final _c<number> (UCF-101) show the same scene.
    """
    scenes = {}
    for name in sorted(names):
        scenes.setdefault(re.sub(r"_c\d+$", "", name.rsplit(".", 1)[0]), []).append(name)
    return [scenes[key] for key in sorted(scenes, key=lambda key: _hash(os.fsencode(key)))]


def held_out(scenes: int) -> int:
    """The number of scenes for validation: a tenth, at least one if there are several."""
    return round(VALIDATION_SHARE * scenes) or min(1, scenes - 1)


class Splits:
    """Assigns clips to "train" or "validation", one after another.

    The first scenes with a usable clip are held out, as a whole. So two sets of one directory with
    the same rate and clip length hold out the same clips, and `split_of` all readable files holds
    out no others. With shorter clips more files are usable, so such a set may train on a clip that
    a set of longer clips holds out.

    order: the names in the order for `assign`. count: the number of scenes to hold out.
    """

    order: list[str]
    count: int

    def __init__(self, names):
        scenes = scenes_of(names)
        self.order = [name for scene in scenes for name in scene]
        self.count = held_out(len(scenes))
        self._scene_of = {name: number for number, scene in enumerate(scenes) for name in scene}
        self._held_out = set()

    def assign(self, name: str) -> str:
        """The split of the next usable clip in `order`, or of the last one again."""
        if len(self._held_out) < self.count:
            self._held_out.add(self._scene_of[name])
        return "validation" if self._scene_of[name] in self._held_out else "train"


def split_of(names) -> dict[str, str]:
    """{name: "train" or "validation"}. A scene has one split; a new scene changes few others."""
    splits = Splits(names)
    return {name: splits.assign(name) for name in splits.order}


def _hash(data):
    return hashlib.sha256(data).hexdigest()


def report(skipped: list[tuple[str, str]], total: int, done: str = "skipped") -> str:
    """One line with the number of skipped files, and the names and reasons of the first eight."""
    shown = "; ".join(printable(f"{name} {reason}") for name, reason in skipped[:8])
    more = f"; and {len(skipped) - 8} more" if len(skipped) > 8 else ""
    return f"{done} {len(skipped)} of {total} files: {shown}{more}"


def index(root: str, names: list[str]) -> tuple[dict[str, video.Info], list[tuple[str, str]]]:
    """Decode every clip once -> (the Info of each readable clip, [(name, reason)] of the others).

    What is true of the bytes of a file is kept in the user's cache directory; only new and changed
    files are decoded again, and those that could not be read.
    """
    cache = _cache_file(root)
    known, stamps = _load(cache), {name: _stamp(root, name) for name in names}
    fresh = [name for name in names if known.get(name, [None])[0] != stamps[name]]
    passing = set()
    if fresh:
        print(f"{root}: decoding {len(fresh)} new or changed videos once", file=sys.stderr)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            probes = zip(fresh, pool.map(lambda name: _probe(root, name), fresh))
            probes = list(progress.shown(probes, len(fresh), "videos"))
        for name, (outcome, is_lasting) in probes:
            known[name] = [stamps[name], outcome]
            passing |= set() if is_lasting else {name}
        _save(cache, {name: known[name] for name in names if name not in passing})
    outcomes = {name: known[name][1] for name in names}
    infos = {name: video.Info(**o) for name, o in outcomes.items() if isinstance(o, dict)}
    return infos, [(name, outcomes[name]) for name in names if name not in infos]


def _stamp(root, name):
    """A value that changes with the file."""
    try:
        stat = os.stat(os.path.join(root, name))
    except OSError as error:
        return error.strerror
    return [stat.st_size, stat.st_mtime_ns]


def _probe(root, name):
    """(video.Info as a dict or the reason, a str, for which there is none; whether it is lasting).

    An outcome is lasting if it depends on the bytes of the file alone.
    """
    try:
        with video.opened(os.path.join(root, name)) as file:
            return dataclasses.asdict(video.probe(file)), True
    except Exception as error:
        of_bytes = isinstance(error, video.VideoError) and not isinstance(error, video.ReadError)
        return _reason(error), of_bytes


def _reason(error) -> str:
    """Why a file is not used. Decoders raise many kinds, and one file must not stop the others."""
    if isinstance(error, video.VideoError):
        return str(error)
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    if isinstance(error, MemoryError):
        return "needs too much memory"
    return f"cannot be decoded ({type(error).__name__}: {' '.join(str(error).split())})"


def _cache_file(root):
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    key = _hash(os.fsencode(os.path.realpath(root)))[:16]
    return pathlib.Path(home, "jaxvid", f"index-3-{key}.json")


def _load(cache):
    """{name: [stamp, Info as a dict or a reason]}; {} if the cache cannot be read."""
    try:
        known = files.parse_json(cache.read_bytes())
        schema.check("", known, {schema.OPEN: None})
        for stamp_and_outcome in known.values():
            _, outcome = stamp_and_outcome
            if isinstance(outcome, dict):
                schema.build(video.Info, outcome)
            else:
                schema.check("reason", outcome, str)
        return known
    except (OSError, TypeError, ValueError):
        return {}


def _save(cache, known):
    """Write the cache atomically. If the disk is not writable, the next start decodes again."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        files.write(cache, json.dumps(known))
    except OSError as error:
        logging.warning("the index of videos was not saved: %s", error)


# Cutting videos into clips


def check_cut(size: int, frames: int, fps: float) -> None:
    """Raise UserError unless videos can be cut into clips of these."""
    checks.at_least("size", size, 1, at_most=MAX_SIZE)
    checks.at_least("frames", frames, 1, at_most=MAX_FRAMES)
    memory.require(f"size={size}, frames={frames}", "frames of a clip", 3 * frames * size**2)
    checks.require(0 <= fps <= 1000, "fps", fps, "must lie in [0, 1000]; 0 keeps the source's rate")


def walk(root: str, name: str, recipe, use=lambda picture_HWC: None) -> list[int] | str:
    """Call `use` with each picture of a video -> the lengths of its parts, or why not to use it.

    recipe: has size, frames and fps. `use` gets None where the video is cut (`video.resample`). A
    video without a part of `frames` frames, or that cannot be decoded to its end, is not used.
    """
    parts = [0]
    try:
        with video.opened(os.path.join(root, name)) as file:
            for picture_HWC in video.resample(file, recipe.size, recipe.fps):
                use(picture_HWC)
                if picture_HWC is None:
                    parts.append(0)
                else:
                    parts[-1] += 1
    except Exception as error:
        return _reason(error)
    if max(parts) < recipe.frames:
        at = f" at {recipe.fps:g} per second" if recipe.fps else ""
        between = f" in a row, it {cuts_in(parts)}" if len(parts) > 1 else ""
        return f"has {max(parts)} frames{at}{between}, {recipe.frames} are needed"
    return parts


def cuts_in(parts: Sequence) -> str:
    """What `walk` did to a video of several parts; "" for one part."""
    return f"is cut {len(parts) - 1} times, at gaps or stills" if len(parts) > 1 else ""


def cut(root: str, recipe, name: str) -> tuple[list[int], list[bytes]] | str:
    """(lengths of the parts, chunks of `recipe.frames` frames) of a video, or why not to use it."""
    window = Window(recipe.frames, recipe.size)
    chunks, pictures = [], []

    def use(picture_HWC):
        if picture_HWC is None:
            pictures.clear()
            return
        pictures.append(picture_HWC)
        if len(pictures) == recipe.frames:
            chunks.append(video.encode_chunk(window.augment(np.stack(pictures), None)))
            pictures.clear()

    outcome = walk(root, name, recipe, use)
    return outcome if isinstance(outcome, str) else (outcome, chunks)
