"""The journal of a part of a pack: JSON lines of what is written, from which an interrupted process resumes."""

import json
import os
from contextlib import suppress

from data_tools.packing.skipped import Tally
from data_tools.packing.writer import Shard
from xc.files import sync


class Journal:
    """The journal in a folder, which need not exist yet.

    shards   {split: [Shard]} that are complete and on the disk
    start    place of the record to resume from; 0: from the first
    skipped  state of `Skipped` at that record; None: nothing was written
    taken    number of records before it
    done     whether all records are written
    """

    def __init__(self, folder):
        self.folder, self.shards, self.start, self.skipped, self.taken, self.done = folder, {}, 0, None, 0, False
        self._path = os.path.join(folder, "journal")
        self._length = 0  # of its complete lines; the last may be truncated
        with suppress(FileNotFoundError), open(self._path, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    self._length += len(line)
                    self._take(**json.loads(line))

    @property
    def tally(self):
        """Tally of the images that could not be packed."""
        return Tally(**self.skipped["tally"]) if self.skipped else Tally()

    def _take(self, split, shard, start, skipped, taken):
        if shard is not None:
            self.shards.setdefault(split, []).append(Shard(*shard))
        self.start, self.skipped, self.taken = start or 0, skipped, taken
        self.done = start is None

    def add(self, split, shard, start, skipped, taken):
        """Records a Shard of a split that is on the disk, or None, and the place to resume from; None at the end."""
        entry = {"split": split, "shard": shard, "start": start, "skipped": skipped, "taken": taken}
        line = json.dumps(entry).encode() + b"\n"
        if shard is not None:
            sync(os.path.join(self.folder, split))  # the entry of the shard in its folder
        with open(self._path, "ab") as file:
            file.truncate(self._length)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._length += len(line)
        self._take(**entry)
