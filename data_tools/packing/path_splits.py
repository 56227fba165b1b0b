"""Splits in the paths of images that have none: train/1.jpg and test/2.jpg must not become one training set."""

from data_tools.sources.splits import split_of
from xc.data.pack import PackError

MOST_NAMES = 2**12  # that are remembered of files whose names have a split in them


class PathSplits:
    """Looks at the paths of images without a split.

    splits  SplitNames: --rename-split may say that two names are one split
    """

    def __init__(self, splits):
        self._splits, self._folder = splits, None
        self._found = {}  # {"" or the other words of the file's name: {split: path}}

    def take(self, path, is_file):
        """Takes the path of an image; that of one in another file ends with its name in there, after a colon."""
        folder, _, name = (path if is_file else path.rpartition(": ")[2]).rpartition("/")
        if folder != self._folder:
            self._folder = folder
            for part in folder.split("/"):
                if split_of(part):
                    self._found.setdefault("", {}).setdefault(self._splits.of(part), path)
        split, rest = self._splits.and_rest(name.rpartition(".")[0] or name)
        if split and (rest in self._found or len(self._found) < MOST_NAMES):
            self._found.setdefault(rest, {}).setdefault(split, path)

    def end(self, source):
        """PackError where paths of this source name different splits."""
        for by_split in self._found.values():
            if len(by_split) > 1:
                one, other = sorted(by_split.values())[:2]
                raise PackError(f"{source}: {one} and {other} are named after different splits, but have none; say the "
                                "splits in a column, in folders at the top, or by a source for each (train=… test=…), "
                                "or take all for one split, as --rename-split test=train does")
        self._found, self._folder = {}, None
