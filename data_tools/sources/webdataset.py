"""WebDataset: tar files in which an image and its label are neighbours."""

import itertools
import json
import os
import tarfile

from data_tools.sources.base import IMAGE_SUFFIXES, Format, shards, stays_below
from xc import pack as layout
from xc.pack import PackError

MAX_HEADER_BYTES = 2**14  # of what a tar file says about one member in further headers
HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
           tarfile.SOLARIS_XHDTYPE)
MAX_GLOBAL_KEYS = 256  # of the headers that are for all members that follow
MAX_LABELS = 2  # of one sample: .cls and .json
MAX_LABEL_BYTES = 2**16  # of a file .cls or .json


def records(path, skipped):
    """Yields the samples of tar files. A sample is neighbours whose names agree up to the first dot: an image, and .cls
    or .json with `label`.

    .cls has the number or the name of the class. If a .json has `xc_class_name`, as data_tools.export writes it, that
    is the class, whatever its number.
    """
    for split, file in shards(path, ".tar"):
        members = _members(file, split, skipped)
        for key, sample in itertools.groupby(members, key=lambda member: member[0]):
            where = f"{file}: {key}"
            images, labels = [], []
            for _, suffix, data in sample:
                found, most = (images, 1) if "." + suffix in IMAGE_SUFFIXES else (labels, MAX_LABELS)
                if len(found) <= most:  # one more shows that there are too many; memory must not hold them all
                    found.append((suffix, data))
            if len(images) != 1 or not labels:
                what = "several images" if images[1:] else "no label (.cls or .json)" if images else "no image"
                skipped.add(split, where, what)
                continue
            if len(labels) > MAX_LABELS:
                skipped.add(split, where, f"more than {MAX_LABELS} files with a label for one image")
                continue
            try:
                labels, names = map(set, zip(*(_label(suffix, data) for suffix, data in labels), strict=True))
            except ValueError as error:
                skipped.add(split, where, str(error))
                continue
            names = names - {None} or labels
            for found in labels, names:
                if len(found) > 1:
                    skipped.add(split, where, f"labels {' and '.join(map(repr, sorted(found)))} for one image")
                    break
            else:
                yield split, where, names.pop(), images[0][1]


def _members(file, split, skipped):
    """Yields (key, suffix, bytes) of the images and labels in a tar file, in its order."""
    file_bytes = os.path.getsize(file)
    try:
        with open(file, "rb") as raw, tarfile.open(fileobj=raw, mode="r|", tarinfo=_Member) as tar:
            for member in tar:
                tar.members = []  # otherwise it keeps them all
                if tar.offset > file_bytes:  # where the next header should be; tarfile would look for it without end
                    raise tarfile.ReadError(f"ends inside {member.name}")
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key, suffix = folder + slash + stem, suffix.lower()
                is_image = "." + suffix in IMAGE_SUFFIXES
                if member.isdir():
                    continue
                if not (member.isreg() and not member.issparse()):
                    skipped.add(split, f"{file}: {member.name}", "a link, a device or a file with holes")
                elif not stays_below(member.name):
                    skipped.add(split, f"{file}: {member.name}", "its name is absolute or leaves the folder")
                elif not is_image and suffix not in ("cls", "json"):
                    skipped.ignored["members that are neither images nor labels"] += 1
                elif member.size > (layout.MAX_RECORD_BYTES if is_image else MAX_LABEL_BYTES):
                    skipped.add(split, f"{file}: {member.name}", f"{member.size} bytes, too many")
                else:
                    yield key, suffix, tar.extractfile(member).read()
            # tarfile takes a damaged header, and a cut between two members, for the end.
            raw.seek(tar.offset)
            num_bytes = 0
            while block := raw.read(2**20):
                num_bytes += len(block)
                if block.strip(b"\0"):
                    raise tarfile.ReadError(f"no header at byte {tar.offset}, where there is more than zeros")
            if num_bytes < tarfile.BLOCKSIZE * 2:
                raise tarfile.ReadError("ends without the two empty blocks that close a tar file")
    except RecursionError as error:  # tarfile's, for each header of a chain
        raise PackError(f"{file}: a member has too many headers: it is damaged; make the tar file again") from error
    except (tarfile.TarError, EOFError, UnicodeError, ValueError, OverflowError) as error:
        if isinstance(error, PackError):
            raise
        raise PackError(f"{file}: cut short or not a tar file: {error}") from error


class _Member(tarfile.TarInfo):
    """Refuses long headers, which tarfile reads whole and searches in quadratic time, and many global keys, which it
    copies for each header."""

    def _proc_member(self, tar):
        if len(tar.pax_headers) > MAX_GLOBAL_KEYS:
            raise tarfile.ReadError(f"global headers of {len(tar.pax_headers)} keys, more than {MAX_GLOBAL_KEYS}")
        if self.type in HEADERS and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes, more than {MAX_HEADER_BYTES}")
        return super()._proc_member(tar)


def _label(suffix, data):
    """(label, class name or None) in a .cls or .json; ValueError where there is no label."""
    text, name = data.decode("utf-8-sig"), None
    if suffix == "json":
        try:
            value = json.loads(text)
        except RecursionError as error:
            raise ValueError("its .json is nested too deep") from error
        label, name = (value.get("label"), value.get("xc_class_name")) if isinstance(value, dict) else (None, None)
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise ValueError("its .json has no field label that is a number or a name")
        if name is not None and not (isinstance(name, str) and name.strip()):
            raise ValueError("its .json has a field xc_class_name that is no name")
        text = str(label)
        (text + (name or "")).encode()  # fails for half a surrogate pair, which JSON can have
    if not text.strip():
        raise ValueError(f"its .{suffix} is empty")
    return text.strip(), name


FORMAT = Format(records, ".tar", lambda path, head: head[257:262] == b"ustar" or path.endswith(".tar"))
