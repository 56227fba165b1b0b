"""Samples in tar files: which members belong together, and what the label of an image is."""

import itertools
import json
import re
from dataclasses import dataclass, field

from data_tools.sources.columns import class_name

LABEL_SUFFIXES = ("cls", "json", "txt")
ALONE = "a label without an image"
MAX_LABELS = 2  # of one image: .cls and .json
_TEXT_LABEL = re.compile(r"[^\r\n]{1,256}")


class Member:
    """A file in a tar.

    name      as the tar has it
    is_image  by its name or content
    data      its bytes; None where nothing looks at them

    stem, suffix  the name up to the last dot of the file's name, and what follows, in lower case
    key           the name up to the first dot, as WebDataset groups members
    is_label      whether it may have the label of an image
    """

    def __init__(self, name, is_image, data):
        self.name, self.is_image, self.data = name, is_image, data
        start = name.rfind("/") + 1
        last = name.rfind(".", start)
        self.stem, self.suffix = (name[:last], name[last + 1 :].lower()) if last >= 0 else (name, "")
        first = self.stem.find(".", start)
        self.key = self.stem if first < 0 else self.stem[:first]
        self.is_label = not is_image and self.suffix in LABEL_SUFFIXES


@dataclass
class Sample:
    """Neighbours of one stem, and after `paired` an image with its labels.

    image   Member, or None
    labels  Members, at most two more than an image may have
    others  Members that are neither
    """

    key: str
    stem: str
    image: Member | None = None
    labels: list = field(default_factory=list)
    others: list = field(default_factory=list)


def samples(members, report):
    """Yields the Sample of every image in a tar file: labels are neighbours that differ in the last suffix only.

    A single image of a key may have the labels of the key: 0001.input.jpg those of 0001.cls. Images without a label
    beside them come without labels.

    members  of Member, in the order of the file; memory holds those of one sample
    report   report(member, reason) of each that belongs to no sample
    """
    for key, run in itertools.groupby(_by_stem(members, report), key=lambda sample: sample.key):
        waiting, of_key, several, others, has_image = None, None, False, [], False
        for sample in run:
            others += sample.others
            has_image = has_image or sample.image is not None
            if sample.image and sample.labels:
                several = True
                yield sample
            elif sample.image is None:
                if sample.labels and sample.stem == key and several:
                    for label in sample.labels:
                        report(label, "a label for several images")
                elif sample.labels and sample.stem == key and of_key is None:
                    of_key = sample
                else:
                    _report_labels(sample, report)
            elif of_key is not None and (waiting or several):
                for one in waiting, sample:
                    if one is not None:
                        report(one.image, "several images of one sample")
                waiting, several = None, True
            elif waiting or several:  # of a name like "photo 1.2 b.jpg"
                yield from (one for one in (waiting, sample) if one is not None)
                waiting, several = None, True
            else:
                waiting = sample
        if waiting and of_key:
            waiting.labels, of_key = of_key.labels, None
        if waiting:
            yield waiting
        if of_key:
            _report_labels(of_key, report)
        for member in others if not has_image else ():
            report(member, "neither an image nor beside one")


def _by_stem(members, report):
    """Yields the Sample of neighbours with one stem; of several images none is taken."""
    for stem, group in itertools.groupby(members, key=lambda member: member.stem):
        sample, several = None, False
        for member in group:
            sample = sample or Sample(member.key, stem)
            if member.is_image and (sample.image or several):
                for one in filter(None, (sample.image, member)):
                    report(one, "several images of one sample")
                sample.image, several = None, True
            elif member.is_image:
                sample.image = member
            elif not member.is_label:
                sample.others.append(member)
            elif len(sample.labels) < MAX_LABELS + 2:
                sample.labels.append(member)
        if not several:
            yield sample


def _report_labels(sample, report):
    for label in sample.labels:
        report(label, ALONE)


def label_of(labels):
    """The class name in the files .cls and .json of an image; None where there are none.

    A .cls has the number or the name of the class. If a .json has `xc_class_name`, as data_tools.export writes it, that
    is the class, whatever its number. A .json without a field `label` says other things.

    ValueError where there is no single name.
    """
    told = [label for label in labels if label.suffix != "txt"]
    if len(told) > MAX_LABELS:
        raise ValueError(f"more than {MAX_LABELS} files with a label for one image")
    found = [pair for label in told if (pair := _label(label)) is not None]
    numbers = {label for label, _ in found}
    names = {name for _, name in found} - {None} or numbers
    for values in numbers, names:
        if len(values) > 1:
            raise ValueError(f"labels {' and '.join(map(repr, sorted(values)))} for one image")
    return names.pop() if names else None


def text_label(labels):
    """The class name in the .txt of an image, None where there is none; ValueError where it is no name."""
    for label in labels:
        if label.suffix == "txt":
            text = label.data.decode("utf-8-sig").strip()
            if not _TEXT_LABEL.fullmatch(text):
                raise ValueError("its .txt is no label: it is empty, or has several lines or more than 256 characters")
            return class_name(text)
    return None


def _label(member):
    """(label, class name or None) in a .cls or .json; None where the .json has no label."""
    text, name = member.data.decode("utf-8-sig"), None
    if member.suffix == "json":
        try:
            value = json.loads(text)
        except RecursionError as error:
            raise ValueError("its .json is nested too deep") from error
        if not (isinstance(value, dict) and "label" in value):
            return None
        label, name = value["label"], value.get("xc_class_name")
        is_whole = isinstance(label, float) and label.is_integer()
        if not (isinstance(label, str | int) or is_whole) or isinstance(label, bool):
            raise ValueError("its .json has a field label that is neither a whole number nor a name")
        if name is not None and not (isinstance(name, str) and name.strip()):
            raise ValueError("its .json has a field xc_class_name that is no name")
        text = str(label)
        (text + (name or "")).encode()  # fails for half a surrogate pair, which JSON can have
    if not text.strip():
        raise ValueError(f"its .{member.suffix} is empty")
    return class_name(text.strip()), name
