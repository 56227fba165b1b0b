"""Names of splits: train, val and test, however a folder, a file or a column spells them."""

import os
import re

# What each spelling means. A name with another word of its own, as dev, eval, extra or trainval, is not clear.
SPLIT_OF = {"train": "train", "training": "train", "trn": "train",
            "val": "val", "valid": "val", "validation": "val", "validating": "val",
            "test": "test", "testing": "test", "tst": "test"}
# Words that may stand beside it and say nothing: train_images, Test Set, val2017.
_NEUTRAL = {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "data", "dataset", "set",
            "split", "sample", "samples", "file", "files"}
_JOINED = re.compile(rf"({'|'.join(SPLIT_OF)})({'|'.join(_NEUTRAL)})")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+")
_PARTS = ("train", "val", "test", "trn", "tst")  # one of them is in every spelling


def _words(name):
    words = []
    for word in map(str.lower, _WORD.findall(name)):
        joined = _JOINED.fullmatch(word)  # trainset
        words += joined.groups() if joined else [word]
    return words


def split_of(name):
    """The split that a folder or a value of a column names, as of train, VALIDATION, Test Set; "" where none."""
    if (key := name.lower()) in SPLIT_OF:  # nearly all
        return SPLIT_OF[key]
    found, words = set(), [word for word in _words(name) if not word.isdigit()]
    for word in words:
        if word in SPLIT_OF:
            found.add(SPLIT_OF[word])
        elif word not in _NEUTRAL:
            return ""
    return found.pop() if len(found) == 1 else ""


def split_in(name):
    """The split in the name of a file or folder, other words aside, as of imagenet-validation-000.tar.

    "" where it names no split, or several and not in its first word.
    """
    words = [SPLIT_OF.get(word, "") for word in _words(name)] or [""]
    named = {split for split in words if split}
    return named.pop() if len(named) == 1 else words[0]


def split_and_rest(name):
    """(split, the other words) of a name with a split at one of its ends, numbers aside; ("", ()) of all others.

    Those of train_apple and AppleTest_2 are ("train", ("apple",)) and ("test", ("apple",)).
    """
    lower = name.lower()
    if not any(part in lower for part in _PARTS):  # nearly all
        return "", ()
    words = [word for word in _words(name) if not word.isdigit()]
    for place in (0, -1):
        if words and (split := SPLIT_OF.get(words[place], "")):
            del words[place]
            return split, tuple(words)
    return "", ()


class SplitNames:
    """The names of splits in a source, with what the user says about them.

    renamed  {name, in lower case: split} of --rename-split
    without  names, in lower case, of --without: splits, or names in the source
    """

    def __init__(self, renamed=(), without=()):
        self.renamed, self.without = dict(renamed), frozenset(without)
        self._unused = set(self.renamed) | self.without

    def of(self, name):
        """The split that a folder or a value of a column names; "" where none. --without leaves out some splits."""
        return self._told(name) or self._renamed(split_of(name))

    def in_name(self, name):
        """The split in the name of a file or folder, other words aside; "" where none."""
        told = {split for word in (os.path.splitext(name)[0], *_words(name)) if (split := self._told(word))}
        return told.pop() if len(told) == 1 else self._renamed(split_in(name))

    def and_rest(self, name):
        """(split, the other words) of a name, as split_and_rest finds them."""
        split, rest = split_and_rest(name)
        return self._renamed(split), rest

    def is_told(self, name):
        """Whether the user said what this name means."""
        return name.lower() in self.renamed or name.lower() in self.without

    def leaves_out(self, split):
        """Whether images of this split are left out."""
        if split.lower() in self.without:
            self._unused.discard(split.lower())
            return True
        return False

    def unused(self):
        """Names of --rename-split and --without that no source has."""
        return sorted(self._unused)

    def _told(self, name):
        key = name.lower()
        return self._renamed(key) if key in self.renamed else name if key in self.without else ""

    def _renamed(self, name):
        if name in self.renamed:
            self._unused.discard(name)
        return self.renamed.get(name, name)
