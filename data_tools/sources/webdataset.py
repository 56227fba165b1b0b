"""Tar files: WebDataset, in which an image and its label are neighbours, and folders of classes in a tar."""

import os
import tarfile

from data_tools.sources.base import Format, shards, stays_below
from data_tools.sources.names import claims_image, is_never_data
from data_tools.sources.samples import ALONE, Member, label_of, samples, text_label
from xc.data import pack as layout
from xc.data.image_types import HEAD_BYTES, image_type
from xc.data.pack import PackError

MAX_HEADER_BYTES = 2**14  # of what a tar file says about one member in further headers
HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
           tarfile.SOLARIS_XHDTYPE)
MAX_GLOBAL_KEYS = 256  # of the headers that are for all members that follow
MAX_LABEL_BYTES = 2**16  # of a file .cls, .json or .txt
# In a tar that is all they can be; features in .npz, .gz or .h5 may stand beside an image.
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip", ".7z", ".rar")
MOST_HALVES = 2**16  # names that are remembered, about 5 MB


def records(path, how, skipped):
    """Yields the images of tar files.

    The class is in .cls, or in .json as `label`, beside the image (samples.py); else it is the path of the folder in
    the tar, below train/, val/ or test/ if it begins so; else the text in .txt.

    PackError where an image and its label do not stand side by side, or where some images of a file have labels and
    others only folders.
    """
    for split, file in shards(path, ".tar", how, skipped):
        yield from _Tar(file, split, how, skipped).records()


class _Tar:
    """One tar file."""

    def __init__(self, file, split, how, skipped):
        self._file, self._split, self._how, self._skipped = file, split, how, skipped
        self._by, self._first = None, ""  # what gives the classes, and the first image
        self._halves = {True: set(), False: set()}  # hashes of names: images without labels, labels without images

    def records(self):
        members = _members(self._file, self._split, self._skipped)
        for sample in samples(members, self._report):
            image, where = sample.image, f"{self._file}: {sample.image.name}"
            if self._how.leaves_out(self._split):
                yield self._split, where, "", image.data
                continue
            try:
                split, name = self._class_of(image, sample.labels)
            except ValueError as error:
                if isinstance(error, PackError):
                    raise
                self._skipped.add(self._split, where, str(error))
                continue
            yield split, where, name, image.data

    def _class_of(self, image, labels):
        """(split, class name); ValueError where there is none."""
        name = label_of(labels)
        if name is not None:
            self._check_same("label", image)
            return self._split, name
        self._check_apart(image, labels)
        if self._by == "label":
            raise ValueError("no label (.cls or .json) beside it, as other images of the file have")
        split, folder = self._folder_of(image)
        if folder:
            self._check_same("folder", image)
        elif not self._how.leaves_out(split):
            folder = text_label(labels)
            if folder is None:
                has = "its .json has no field label" if labels else "no label (.cls or .json) beside it"
                raise ValueError(f"{has}, and it is in no folder of a class")
            self._how.note_once("the text in .txt gives the class, since there is no .cls, no label in a .json and no "
                                "folder")
            self._check_same("text", image)
        return split, folder

    def _folder_of(self, image):
        """(split, class name or "") by the folder of an image."""
        parts = [part for part in image.name.split("/")[:-1] if part not in ("", ".")]
        named, split = [found for part in parts if (found := self._how.splits.of(part))], self._split
        if named and self._how.splits.of(parts[0]):
            if split and split != named[0]:
                raise PackError(f"{self._file}: {image.name}: split {named[0]}, but the file is of split {split}")
            split, parts = named[0], parts[1:]
            if not parts and not self._how.leaves_out(split):
                raise PackError(f"{self._file}: {image.name}: its folder names a split, and nothing names its class; "
                                f"put it into {split}/CLASS/, or a .cls beside it")
            named = named[1:]
        if named and len(parts) > 1:
            raise PackError(f"{self._file}: {image.name}: the path names split {named[0]} below the folder of a class; "
                            f"put it into {named[0]}/CLASS/")
        return split, "/".join(parts)

    def _check_same(self, by, image):
        if self._by not in (None, by):
            raise PackError(f"{self._file}: the class of {self._first} is in its {self._by}, that of {image.name} in "
                            f"its {by}; give all images the same. In a tar that is not sorted by name (tar "
                            "--sort=name), an image and its label may stand apart")
        self._by, self._first = by, self._first or image.name

    def _check_apart(self, member, labels=()):
        """PackError where the other half of a sample, image or label, came earlier in the file."""
        if any(label.suffix != "txt" for label in labels):
            return
        names = {hash(name) for name in (member.stem, member.key)}
        if names & self._halves[not member.is_image]:
            raise PackError(f"{self._file}: the image of {member.stem} and its label do not stand side by side; sort "
                            "the tar by name (tar --sort=name)")
        if len(self._halves[member.is_image]) < MOST_HALVES:
            self._halves[member.is_image] |= names

    def _report(self, member, reason):
        if reason == ALONE and member.suffix != "txt":
            self._check_apart(member)
        self._skipped.add(self._split, f"{self._file}: {member.name}", reason)


def _members(file, split, skipped):
    """Yields the Members of a tar file, in its order; what cannot be one is reported."""
    file_bytes = os.path.getsize(file)
    try:
        with open(file, "rb") as raw, tarfile.open(fileobj=raw, mode="r|", tarinfo=_Member) as tar:
            for member in tar:
                tar.members = []  # otherwise it keeps them all
                if tar.offset > file_bytes:  # where the next header should be; tarfile would look for it without end
                    raise tarfile.ReadError(f"ends inside {member.name}")
                name = member.name
                *folders, last = name.split("/")
                if member.isdir() or is_never_data(last) or any(is_never_data(one, is_folder=True) for one in folders):
                    continue
                where = f"{file}: {name}"
                if not (member.isreg() and not member.issparse()):
                    skipped.add(split, where, "a link, a device or a file with holes")
                elif not stays_below(name):
                    skipped.add(split, where, "its name is absolute or leaves the folder")
                elif "/." in "/" + name.removeprefix("./"):
                    skipped.add(split, where, "hidden: its name, or that of its folder, begins with a dot")
                elif (found := _read(tar, member, file)) is None:
                    skipped.add(split, where, f"{member.size} bytes, too many")
                else:
                    yield found
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


def _read(tar, info, file):
    """The Member of a tarfile.TarInfo; None where it is an image or a label of too many bytes."""
    data, is_image = tar.extractfile(info), claims_image(info.name)
    is_label = not is_image and Member(info.name, False, None).is_label
    head = b"" if is_image else data.read(HEAD_BYTES)
    is_image = is_image or image_type(head) is not None
    if info.size > (layout.MAX_RECORD_BYTES if is_image else MAX_LABEL_BYTES if is_label else info.size):
        return None
    if not is_image and info.name.lower().endswith(ARCHIVES):
        raise PackError(f"{file}: {info.name}: an archive in a tar file; unpack it first")
    return Member(info.name.removeprefix("./"), is_image, head + data.read() if is_image or is_label else None)


class _Member(tarfile.TarInfo):
    """Refuses long headers, which tarfile reads whole and searches in quadratic time, and many global keys, which it
    copies for each header."""

    def _proc_member(self, tar):
        if len(tar.pax_headers) > MAX_GLOBAL_KEYS:
            raise tarfile.ReadError(f"global headers of {len(tar.pax_headers)} keys, more than {MAX_GLOBAL_KEYS}")
        if self.type in HEADERS and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes, more than {MAX_HEADER_BYTES}")
        return super()._proc_member(tar)


FORMAT = Format(records, ".tar", lambda path, head: head[257:262] == b"ustar" or path.endswith(".tar"))
