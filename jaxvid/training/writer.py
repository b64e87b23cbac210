"""What a run leaves on disk beside checkpoints: metrics.jsonl, TensorBoard, sampled videos."""

import json
import math
import time
from pathlib import Path

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from jaxvid import files
from jaxvid.data import video

FPS = 8  # of sampled clips; a model knows frames, not seconds


class Writer:
    """Appends to <workdir>/metrics.jsonl and TensorBoard; does nothing off process 0.

    Opening drops the lines past `step`, so that a run that was cut off and resumed holds every
    step once. Everything is written at once: a failing disk is reported where it fails.
    """

    def __init__(self, workdir, step, tensorboard):
        self.workdir, self.lines, self.events = Path(workdir), None, None
        if jax.process_index():
            return
        path = self.workdir / "metrics.jsonl"
        _drop_lines_past(path, step)
        self.lines = open(path, "a", buffering=1)  # noqa: SIM115
        if tensorboard:
            folder = self.workdir / "tensorboard"
            folder.mkdir(exist_ok=True)
            self.events = EventsWriter(str(folder / "events"))
            # TensorBoard then hides what an earlier process wrote past this step.
            self._event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step, values):
        """One line, one point of each curve. What is not finite is null: JSON has no NaN."""
        if not self.lines:
            return
        values = {name: float(value) for name, value in values.items()}
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self.lines.write(json.dumps({"step": step, **finite}) + "\n")
        if self.events:
            entries = [Summary.Value(tag=name, simple_value=v) for name, v in values.items()]
            self._event(step, summary=Summary(value=entries))

    def videos(self, step, video_BTHWC):
        """uint8 clips -> samples/<step>/: an mp4 and a GIF each, and sheet.png with all."""
        if not self.lines:
            return
        write_clips(self.workdir / "samples" / f"{step:06d}", video_BTHWC)
        if self.events:
            # As an image: tensorboardX.add_video writes nothing, silently, without moviepy.
            H, W = video_BTHWC.shape[2:4]
            gifs = [video.gif_bytes(video_THWC, FPS) for video_THWC in video_BTHWC]
            images = [
                Summary.Image(encoded_image_string=gif, height=H, width=W, colorspace=3)
                for gif in gifs
            ]
            entries = [Summary.Value(tag=f"sample/{i}", image=x) for i, x in enumerate(images)]
            self._event(step, summary=Summary(value=entries))

    def close(self):
        for file in filter(None, (self.lines, self.events)):
            file.close()

    def _event(self, step, **content):
        self.events.write_event(Event(wall_time=time.time(), step=step, **content))
        self.events.flush()


def write_clips(folder, video_BTHWC):
    """uint8 clips -> an mp4 and a GIF each, numbered, and sheet.png with all, a row each."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "sheet.png", video.contact_sheet(video_BTHWC))
    for index, video_THWC in enumerate(video_BTHWC):
        video.write_mp4(folder / f"{index}.mp4", video_THWC, FPS)
        video.write_gif(folder / f"{index}.gif", video_THWC, FPS)


def _drop_lines_past(path, step):
    """Rewrite metrics.jsonl without later steps and without a line that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            continue
    files.write(path, "".join(kept))
