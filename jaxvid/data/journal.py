"""The progress of a command that writes a data set, kept so that the same command resumes."""

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Sequence

from jaxvid import files, schema
from jaxvid.data import shards
from jaxvid.data.source import SPLITS
from jaxvid.errors import UserError
from jaxvid.schema import Whole

SAVE_SECONDS = 300.0  # between two saves of the progress, which happen between clips
JOURNAL = "journal.json"
# Earlier versions have no "part", as they saved between items only, and no "cut".
FORM = {
    **{"recipe": {schema.OPEN: None}, "done": Whole(), "part?": Whole()},
    **{"records": {split: [Whole()] for split in SPLITS}},
    **{"skipped": [{"name": str, "reason": str}], "cut?": [[str]]},
}


class Journal:
    """The progress of a set, in the folder where it grows; a new process resumes from it.

    recipe: a dict that differs between sets. items: the names of all items in order. done: finished
    items. clips: finished clips of the next item. records: of each closed shard. skipped, cut:
    (name, reason) of items.
    """

    def __init__(self, folder: pathlib.Path, recipe: dict, items: Sequence[str]):
        self._path, self._items = folder / JOURNAL, items
        order = hashlib.sha256(os.fsencode("\n".join(items))).hexdigest()[:16]
        self._recipe = recipe = {**recipe, "items": order}
        self.done, self.clips, self.skipped, self.cut = 0, 0, [], []
        self.records = {split: [] for split in SPLITS}
        self._saved = time.monotonic()
        if not self._path.exists():
            shards.clear(folder)
            folder.mkdir(parents=True)
            return
        found = self._load(folder)
        changed = [name for name in recipe if found["recipe"].get(name) != recipe[name]]
        if changed:
            raise UserError(
                f"out={folder}: holds the beginning of another set (with another "
                f"{', '.join(changed)}); remove it, or repeat the command that began it"
            )
        self.done, self.clips, self.records = found["done"], found.get("part", 0), found["records"]
        self.skipped = [(entry["name"], entry["reason"]) for entry in found["skipped"]]
        self.cut = list(map(tuple, found.get("cut", [])))
        for split in SPLITS:  # shards that were still open
            for path in folder.glob(f"{split}-?????"):
                if int(path.name[-5:]) >= len(self.records[split]):
                    path.unlink()

    def _load(self, folder):
        """The saved progress. Raises UserError if it is damaged."""
        try:
            found = files.parse_json(self._path.read_bytes())
            schema.check("", found, FORM)
            if found["done"] > len(self._items):
                raise ValueError(f"done={found['done']}: there are {len(self._items)} items")
            return found
        except ValueError as error:
            raise UserError(
                f"out={folder}: its {JOURNAL} is damaged ({error}); remove the folder and begin "
                "again"
            ) from error

    def save(self, done: int, clips: int, writers: dict, always: bool = False) -> None:
        """If it is time, or `always`, close the shards of {split: Shards} and save the progress."""
        if not always and time.monotonic() - self._saved <= SAVE_SECONDS:
            return
        for split, writer in writers.items():
            writer.close()
            self.records[split] = writer.records
        self.done, self.clips = done, clips
        skipped = [{"name": name, "reason": reason} for name, reason in self.skipped]
        progress = {"recipe": self._recipe, "done": done, "part": clips}
        progress |= {"records": self.records, "skipped": skipped, "cut": self.cut}
        files.write(self._path, json.dumps(progress))
        self._saved = time.monotonic()

    def used(self) -> list[str]:
        """The names of the finished items that were not skipped."""
        skipped = {name for name, _ in self.skipped}
        return [name for name in self._items[: self.done] if name not in skipped]

    def resuming(self, unit: str) -> str:
        """One line for a process that goes on."""
        return f"resuming after {self.done} of {len(self._items)} {unit}"
