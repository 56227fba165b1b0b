"""The spelling of class names: what is made alike, and what must not be taken for the same."""

import unicodedata

from data_tools.common.progress import note
from xc.data.pack import PackError

MOST_EXAMPLES = 3


class Spelling:
    """Names of classes in one form of Unicode, in which é is one character or two.

    form  "nfc" or "none"
    """

    def __init__(self, form):
        self._form, self._num_images, self._examples = form, 0, {}

    def of(self, name):
        """The name in the form."""
        if self._form == "none":
            return name
        normal = unicodedata.normalize("NFC", name)
        if normal != name:
            self._num_images += 1
            if len(self._examples) < MOST_EXAMPLES:
                self._examples[normal] = None
        return normal

    def note(self):
        """Notes how many names were changed."""
        if self._num_images:
            note(f"{self._num_images} images had class names in another form of Unicode than NFC, as "
                 f"{', '.join(map(repr, self._examples))}; they were changed")


class Numbers:
    """Finds sources whose labels are numbers without names, beside sources that name the same numbers.

    The numbers of both would be classes of their own: 3 and cat.
    """

    def __init__(self):
        self._bare = self._named = None

    def take(self, source, name):
        """Takes a source that was read, and the last name of a class in it, or None.

        PackError where it does not go with those before.
        """
        if source.how.named:
            self._named = self._named or min(source.how.named)
        if source.how.bare:
            self._bare = self._bare or min(source.how.bare)
        elif not source.how.named and name is not None and name.isdigit():
            self._bare = self._bare or source.path
        if self._bare and self._named:
            raise PackError(f"{self._named} names its classes, but {self._bare} has only numbers; give both names, or "
                            "pack them apart")
