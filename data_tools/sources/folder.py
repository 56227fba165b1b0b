"""Images in folders named after their classes."""

import os
from collections import Counter
from functools import partial

from data_tools.common.progress import note
from data_tools.sources.base import IMAGE_SUFFIXES, SPLIT_OF, Format, list_folder
from xc.pack import PackError


def records(root, skipped):
    """Yields the images of a tree, in a fixed order."""
    ignored = skipped.ignored
    has_splits = _has_splits(root)
    levels = [iter([""])]
    while levels:
        folder = next(levels[-1], None)
        if folder is None:
            levels.pop()
            continue
        inner, names = list_folder(os.path.join(root, folder), ignored)
        first, _, label = folder.partition("/") if has_splits else ("", "", folder)
        for name in names:
            path = os.path.join(folder, name)
            if not name.lower().endswith(IMAGE_SUFFIXES):
                ignored["files that are not images"] += 1
            elif not label:
                raise PackError(f"{path}: an image without a class; move it into a folder named after its class")
            else:
                yield SPLIT_OF.get(first, ""), path, label, None
        levels.append(map(partial(os.path.join, folder), inner))


def _has_splits(root):
    """Whether the folders at the top are splits."""
    top = set(list_folder(root, Counter())[0])
    has_splits = "train" in top and top <= SPLIT_OF.keys()
    if not has_splits and "train" in top and len(splits := top & SPLIT_OF.keys()) > 1:
        note(f"{root}: {', '.join(sorted(splits))} are taken for classes, not for splits, because "
             f"{min(top - splits)} stands beside them")
    return has_splits


FORMAT = Format(records, takes_files=False)
