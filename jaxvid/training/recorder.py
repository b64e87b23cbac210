"""The files of a sampled stream, written while it runs, from which it can go on."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
from flax import serialization

from jaxvid import files
from jaxvid.data import mp4, video
from jaxvid.errors import UserError

SHOWN = 64  # first frames in the GIFs and the contact sheet
STATE = "stream.msgpack"  # after the SHA-256 of its content
DIGEST = 32  # bytes


class Recorder:
    """Clips of one stream in a folder: 0.mp4, 1.mp4 .. with GIFs and a sheet of the first frames.

    Frames go into parts, one file for each clip. `save` ends the parts and keeps the state of the
    stream after them, so a stream that is killed goes on from there, and what it had written since
    is written anew. `finish` joins the parts. Memory holds one part and the first frames.

    fps: frames per second. made_with: what the stream is a function of, as JSON. A list there holds
    pairs of a frame and what counts from it on; pairs after the frames made so far may change.
    """

    def __init__(self, folder: Path, fps: float, made_with: dict):
        self.folder, self.frames = Path(folder), 0
        self._fps, self._made_with, self._parts = fps, made_with, {}
        self._encoders, self._first, self._leaves = [], [], []

    def resume(self):
        """Go on after what `save` kept last.

        Raises UserError if the folder holds no stream, one that was made with something else, or
        one that the disk has changed.
        """
        path = self.folder / STATE
        if not path.exists():
            raise UserError(f"resume: {self.folder} holds no stream ({STATE}); leave --resume out")
        digest, content = path.read_bytes()[:DIGEST], path.read_bytes()[DIGEST:]
        if hashlib.sha256(content).digest() != digest:
            raise UserError(f"resume: {path} is damaged; sample into another --out")
        kept = serialization.msgpack_restore(content)
        made_with = json.loads(kept["made_with"])
        self.frames, self._parts = kept["frames"], json.loads(kept["parts"])
        self._leaves = [*kept["state"].values()]
        for name in made_with | self._made_with:
            before, now = (self._acted(made.get(name)) for made in (made_with, self._made_with))
            if before != now:
                raise UserError(
                    f"resume: the stream in {self.folder} was made with {name}={before}, not "
                    f"{now}; give the same, or another --out"
                )
        for name, digest in self._parts.items():
            part = self.folder / "parts" / name
            if not part.exists() or hashlib.sha256(part.read_bytes()).hexdigest() != digest:
                raise UserError(f"resume: {part} is missing or damaged; sample into another --out")

    def _acted(self, value):
        """A value of `made_with`, as far as frames made so far depend on it."""
        if isinstance(value, list):
            return [pair for pair in value if pair[0] < self.frames] or None
        return value

    def restored(self, template):
        """The state that `resume` found, in the form and on the devices of `template`."""
        if not self._leaves:
            raise UserError(
                f"resume: the stream in {self.folder} ended within a block of its frame schedule; "
                "sample into another --out"
            )
        wanted, tree = jax.tree.flatten(template)
        forms = [
            [(np.shape(x), np.asarray(x).dtype) for x in part] for part in (wanted, self._leaves)
        ]
        if forms[0] != forms[1]:
            raise UserError(
                f"resume: the state in {self.folder} is that of another stream or of an earlier "
                "version; a mixer without window (task.model.mixer.window=None) ends with the "
                "--frames it began with"
            )
        places = (getattr(leaf, "sharding", None) for leaf in wanted)
        leaves = [
            leaf if place is None else jax.device_put(leaf, place)
            for leaf, place in zip(self._leaves, places)
        ]
        return jax.tree.unflatten(tree, leaves)

    def write(self, clip_BTHWC: np.ndarray):
        """Append uint8 frames to all clips; small ones are enlarged."""
        clip_BTHWC = video.enlarge(clip_BTHWC)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._encoders:
            height, width = clip_BTHWC.shape[2:4]
            self._encoders = [mp4.Encoder(self._fps, height, width) for _ in clip_BTHWC]
        for encoder, clip_THWC in zip(self._encoders, clip_BTHWC, strict=True):
            encoder.write(clip_THWC)
        if self.frames < SHOWN:
            self._first.append(clip_BTHWC)
        self.frames += clip_BTHWC.shape[1]

    def save(self, state):
        """End the parts, and keep the state of the stream after the frames written so far.

        state: a tree of arrays, or None if the stream cannot go on from here.
        """
        if self._first:
            self._show(np.concatenate(self._first, axis=1)[:, :SHOWN])
            self._first = []
        number = len(self._parts) // max(len(self._encoders), 1)
        for clip, encoder in enumerate(self._encoders):
            name, content = f"{clip}-{number:06d}.mp4", encoder.finish()
            (self.folder / "parts").mkdir(exist_ok=True)
            files.write(self.folder / "parts" / name, content)
            self._parts[name] = hashlib.sha256(content).hexdigest()
        self._encoders = []
        leaves = jax.tree.leaves(jax.device_get(state))
        kept = {
            "made_with": json.dumps(self._made_with),
            "frames": self.frames,
            "parts": json.dumps(self._parts),
            "state": {f"{index:06d}": np.asarray(leaf) for index, leaf in enumerate(leaves)},
        }
        content = serialization.msgpack_serialize(kept)
        files.write(self.folder / STATE, hashlib.sha256(content).digest() + content)

    def finish(self, clips: int):
        """Join the parts that were saved to one mp4 per clip."""
        for clip in range(clips):
            names = sorted(name for name in self._parts if name.startswith(f"{clip}-"))
            mp4.join(self.folder / f"{clip}.mp4", [self.folder / "parts" / name for name in names])

    def _show(self, video_BTHWC):
        for clip, video_THWC in enumerate(video_BTHWC):
            video.write_gif(self.folder / f"{clip}.gif", video_THWC, self._fps)
        files.write(self.folder / "sheet.png", video.contact_sheet(video_BTHWC))
