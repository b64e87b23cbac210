"""The files of a run beside checkpoints: metrics.jsonl, TensorBoard, sampled videos."""

import json
import math
import time
from pathlib import Path

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from jaxvid import files
from jaxvid.data import mp4, video

SHEET = "sheet.png"
FPS = 8.0  # of sampled clips of a run on data without a rate


class Writer:
    """Appends to <workdir>/metrics.jsonl and TensorBoard, on process 0 alone.

    Opening drops the lines after `step`, so a resumed run has every step once. Nothing is buffered:
    a disk error is raised by the call that meets it.
    """

    def __init__(self, workdir, step, tensorboard, fps=0.0):
        self.fps = fps
        self.workdir, self.lines, self.events = Path(workdir), None, None
        self._path = self.workdir / "metrics.jsonl"
        if jax.process_index():
            return
        self._rewrite(self._lines_up_to(step))
        if tensorboard:
            folder = self.workdir / "tensorboard"
            folder.mkdir(exist_ok=True)
            self.events = EventsWriter(str(folder / "events"))
            # TensorBoard then hides what an earlier process wrote past this step.
            self._event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step, values):
        """Write a line and a point of each curve. Values that are not finite become null."""
        if not self.lines:
            return
        self.lines.write(json.dumps({"step": step, **_finite(values)}) + "\n")
        self._points(step, values)

    def has_scores(self, step):
        """Whether the line of `step` has an evaluation; only process 0 knows."""
        lines = self._lines_up_to(step) if self.lines else []
        names = [name for line in lines if line["step"] == step for name in line]
        return any(name.startswith("evaluate/") for name in names)

    def amend(self, step, values):
        """Add values to the line of `step`, the last one written."""
        if not self.lines:
            return
        lines = self._lines_up_to(step)
        known = lines.pop() if lines and lines[-1]["step"] == step else {"step": step}
        self.lines.close()
        self._rewrite([*lines, known | _finite(values)])
        self._points(step, values)

    def has_videos(self, step):
        """Whether the samples of `step` are complete."""
        earlier = self.workdir / "samples" / f"{step:06d}"  # as earlier versions wrote it
        return any((folder / SHEET).exists() for folder in (self._samples(step), earlier))

    def videos(self, step, video_BTHWC):
        """uint8 clips -> samples/<step>/: an mp4 and a GIF each, and sheet.png with all."""
        if not self.lines:
            return
        write_clips(self._samples(step), video_BTHWC, self.fps)
        if self.events:
            # As an image: tensorboardX.add_video writes nothing, silently, without moviepy.
            shown_BTHWC = video.enlarge(video_BTHWC)
            H, W = shown_BTHWC.shape[2:4]
            gifs = [video.gif_bytes(video_THWC, self.fps or FPS) for video_THWC in shown_BTHWC]
            images = [
                Summary.Image(encoded_image_string=gif, height=H, width=W, colorspace=3)
                for gif in gifs
            ]
            entries = [Summary.Value(tag=f"sample/{i}", image=x) for i, x in enumerate(images)]
            self._event(step, summary=Summary(value=entries))

    def close(self):
        for file in filter(None, (self.lines, self.events)):
            file.close()

    def _samples(self, step):
        return self.workdir / "samples" / str(step)

    def _lines_up_to(self, step):
        """The lines of metrics.jsonl up to `step` as dicts, without one that a crash cut short."""
        if not self._path.exists():
            return []
        lines = []
        for line in self._path.read_text(errors="replace").splitlines():
            try:
                found = json.loads(line)
                if found["step"] <= step:
                    lines.append(found)
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
        return lines

    def _rewrite(self, lines):
        files.write(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        self.lines = open(self._path, "a", buffering=1)  # noqa: SIM115

    def _points(self, step, values):
        if self.events:
            entries = [Summary.Value(tag=name, simple_value=v) for name, v in values.items()]
            self._event(step, summary=Summary(value=entries))

    def _event(self, step, **content):
        self.events.write_event(Event(wall_time=time.time(), step=step, **content))
        self.events.flush()


def write_clips(folder, video_BTHWC, fps=0.0):
    """uint8 clips -> an mp4 and a GIF each, numbered, and sheet.png with all, a row each.

    Small frames are enlarged. fps: of the clips; 0 = FPS.
    """
    video_BTHWC = video.enlarge(video_BTHWC)
    folder.mkdir(parents=True, exist_ok=True)
    for index, video_THWC in enumerate(video_BTHWC):
        mp4.write(folder / f"{index}.mp4", video_THWC, fps or FPS)
        video.write_gif(folder / f"{index}.gif", video_THWC, fps or FPS)
    files.write(
        folder / SHEET, video.contact_sheet(video_BTHWC)
    )  # last: it marks the folder as complete


def _finite(values):
    """The values, None for those that are not finite: JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
