"""A directory of clips: its files, their classes and splits, and what decoding them shows."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import re

from absl import logging

from jaxvid import files
from jaxvid.data import video
from jaxvid.errors import UserError

VALIDATION_SHARE = 0.1


def find(root, field="data.path"):
    """Names of the video files below a directory, relative to it and sorted.

    Raises UserError where there is no directory or no video in it; hidden files are left out.
    """
    if not root or not os.path.isdir(root):
        raise UserError(f"{field}={str(root)!r}: no such directory; name a directory of videos")
    names = []
    for folder, folders, names_here in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names_here:
            if name.lower().endswith(video.SUFFIXES) and not name.startswith("."):
                names.append(pathlib.Path(folder, name).relative_to(root).as_posix())
    if not names:
        raise UserError(f"{field}={str(root)!r}: holds no {' '.join(video.SUFFIXES)} file")
    return sorted(names)


def class_of(name):
    """The class of a clip is the first directory of its name; "" if it lies in none."""
    return name.split("/")[0] if "/" in name else ""


def classes_of(names):
    """The classes of a set of clips in order of their labels; none where there is but one."""
    classes = sorted(set(map(class_of, names)))
    return classes if len(classes) > 1 else []


def scenes_of(names):
    """Clips by scene, [[name, ...], ...], in an order that hashes decide.

    Clips whose names differ only in a final _c<number> (UCF-101) show one scene.
    """
    scenes = {}
    for name in sorted(names):
        scenes.setdefault(re.sub(r"_c\d+$", "", name.rsplit(".", 1)[0]), []).append(name)
    return [scenes[key] for key in sorted(scenes, key=lambda key: _hash(os.fsencode(key)))]


def held_out(scenes):
    """How many of the first scenes are for validation: a tenth, and at least one of several."""
    return round(VALIDATION_SHARE * scenes) or min(1, scenes - 1)


class Splits:
    """Which clips are for validation, told of those that give anything, one after another.

    The first scenes that do are held out, whole. So two sets of one directory at one rate hold out
    the same clips where their clips are of one length, and `split_of`, of all files that can be
    read, holds out no other. A set of shorter clips may train on what one of longer ones holds out.

    order: in which to tell of the names. count: how many scenes are to be held out.
    """

    def __init__(self, names):
        scenes = scenes_of(names)
        self.order = [name for scene in scenes for name in scene]
        self.count = held_out(len(scenes))
        self._scene_of = {name: place for place, scene in enumerate(scenes) for name in scene}
        self._held_out = set()

    def take(self, name):
        """ "train" or "validation" for the next clip in order that gives something, or the same."""
        if len(self._held_out) < self.count:
            self._held_out.add(self._scene_of[name])
        return "validation" if self._scene_of[name] in self._held_out else "train"


def split_of(names):
    """{name: "train" or "validation"}; a scene stays whole and a new one moves few others."""
    splits = Splits(names)
    return {name: splits.take(name) for name in splits.order}


def _hash(data):
    return hashlib.sha256(data).hexdigest()


def printable(name):
    """A file name for a terminal: bytes that are not UTF-8, which it may have, as \\xNN."""
    return os.fsencode(name).decode(errors="backslashreplace")


def report(skipped, total):
    """One line that counts the files left out and names them, the first eight with the reason."""
    shown = "; ".join(f"{printable(name)} {reason}" for name, reason in skipped[:8])
    more = f"; and {len(skipped) - 8} more" if len(skipped) > 8 else ""
    return f"skipped {len(skipped)} of {total} files: {shown}{more}"


def index(root, names):
    """Decode every clip once -> ({name: video.Info}, [(name, reason)] of those that cannot be).

    The outcome is kept in the user's cache directory, so that only new and changed files are
    decoded again.
    """
    cache = _cache_file(root)
    known, stamps = _load(cache), {name: _stamp(root, name) for name in names}
    fresh = [name for name in names if known.get(name, [None])[0] != stamps[name]]
    if fresh:
        logging.info("looking through %d new or changed videos in %s", len(fresh), root)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, outcome in zip(fresh, pool.map(lambda name: _probe(root, name), fresh)):
                known[name] = [stamps[name], outcome]
        _save(cache, {name: known[name] for name in names})
    outcomes = {name: known[name][1] for name in names}
    infos = {name: video.Info(**o) for name, o in outcomes.items() if isinstance(o, dict)}
    return infos, [(name, outcomes[name]) for name in names if name not in infos]


def _stamp(root, name):
    """What changes when the file does."""
    try:
        stat = os.stat(os.path.join(root, name))
    except OSError as error:
        return error.strerror
    return [stat.st_size, stat.st_mtime_ns]


def _probe(root, name):
    """video.Info as a dict, or the reason why there is none."""
    try:
        with open(os.path.join(root, name), "rb") as file:
            return dataclasses.asdict(video.probe(file))
    except video.VideoError as error:
        return str(error)
    except OSError as error:
        return f"cannot be opened ({error.strerror})"


def _cache_file(root):
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    key = _hash(os.fsencode(os.path.realpath(root)))[:16]
    return pathlib.Path(home, "jaxvid", f"index-2-{key}.json")


def _load(cache):
    """{name: [stamp, Info as a dict, or a reason]}; a cache that cannot be read is an empty one."""
    try:
        return json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}


def _save(cache, known):
    """Write in one stroke; without a writable home the next start decodes again, no more."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        files.write(cache, json.dumps(known))
    except OSError as error:
        logging.warning("the index of videos is not kept: %s", error)
