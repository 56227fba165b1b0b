"""TODO"""

import json
import math
import re
import zlib
from pathlib import Path

from xc.files import replace_text, sync
from xc.run import watchdog

FORMAT, VERSION = "xc-checkpoint", 5
_MOST_META = 2**26  # characters of a meta.json, of which a file takes a hundred: it may come from anywhere
_FOLDER = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"[a-z]+(-\d+)*\.safetensors")
_ROWS = re.compile(r"rows-(\d{12})-(\d{12})\.safetensors")


def rows_among(names):
    """Those of file names that are of class rows, in their order."""
    return sorted(name for name in names if _ROWS.fullmatch(name))


def write_meta(folder, meta):
    """Write meta.json, with a checksum of all that it says."""
    replace_text(Path(folder) / "meta.json", json.dumps(meta | {"crc32": _crc32_of(meta)}, indent=1))


def add_top1(folder, top1):
    """Put into a checkpoint what an evaluation gave that it was written without."""
    write_meta(folder, read_meta(folder) | {"top1": top1})
    sync(folder)


def _crc32_of(meta):
    text = json.dumps({name: value for name, value in meta.items() if name != "crc32"}, sort_keys=True)
    return zlib.crc32(text.encode())


def _is_sealed(meta):
    try:
        return meta.get("crc32") == _crc32_of(meta)
    except RecursionError:
        return False


def check(folder, part=0, num_parts=1):
    """ValueError where a file of a checkpoint is not as it was written, by its length or checksum.

    part, num_parts: of the ranks that share the files; all look at all lengths.
    """
    for i, (name, facts) in enumerate(sorted(read_meta(folder)["files"].items())):
        if fault := fault_of(Path(folder) / name, facts, checksum=i % num_parts == part):
            raise ValueError(fault)


def fault_of(path, facts, checksum=True, progress=None):
    """What is wrong with a file of a checkpoint, by its length or also its checksum; None where it is as written.

    facts     {bytes, crc32} of `read_meta`
    progress  called with every number of bytes read
    """
    try:
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "not there"
            return f"checkpoint file {path} is damaged: it is {found}, it was {facts['bytes']} bytes"
        if checksum and crc32(path, progress) != facts["crc32"]:
            return f"checkpoint file {path} is damaged: its checksum is not that of what was written"
    except OSError as error:
        return f"checkpoint file {path} cannot be read: {error}"
    return None


def read_meta(folder):
    """What meta.json of a checkpoint says; ValueError if it cannot be. `files`: {name: {bytes, crc32}}."""
    folder = Path(folder)
    try:
        if not (folder / "meta.json").is_file():  # opening a pipe would wait for its writer
            raise ValueError("it has no file meta.json")
        with open(folder / "meta.json", encoding="utf-8") as file:
            text = file.read(_MOST_META + 1)
        if len(text) > _MOST_META:
            raise ValueError(f"its meta.json is larger than {_MOST_META} characters")
        meta = json.loads(text)
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{folder} is not a checkpoint ({e}): name a folder RUN/checkpoints/step-...") from e
    if not isinstance(meta, dict) or (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{folder} is not a checkpoint of format {FORMAT}, version {VERSION}: resume it with the "
                         "code that wrote it")
    if not _is_sealed(meta):
        raise ValueError(f"checkpoint file {folder / 'meta.json'} is damaged: its checksum is not that of what it says")
    files = meta.get("files")
    if not isinstance(files, dict) or not all(
            _FILE.fullmatch(name) and isinstance(facts, dict) and types_of(facts) == {"bytes": int, "crc32": int}
            for name, facts in files.items()):
        raise ValueError(f"checkpoint {folder} does not say which files it has: take another checkpoint")
    return meta


def ranges_of(folder, meta):
    """(first, last) of the files of class rows, ascending; ValueError where they do not cover all rows once."""
    num_rows, rows = meta.get("num_rows"), meta.get("rows")
    matches = [_ROWS.fullmatch(str(name)) for name in (rows if isinstance(rows, list) else ())]
    ranges = sorted((int(m[1]), int(m[2])) for m in matches if m)
    edges = [0, *(last for _, last in ranges)]
    if (len(ranges) != len(matches) or [first for first, _ in ranges] + [num_rows] != edges
            or not meta["files"].keys() >= {rows_name(*of_file) for of_file in ranges}):
        raise ValueError(f"checkpoint {folder}: its files do not cover the class rows 0 to {num_rows} "
                         "once: take another checkpoint")
    return ranges


def folders(checkpoints):
    """Folders of the whole checkpoints, oldest first."""
    return sorted((f for f in checkpoints.glob("step-*") if _FOLDER.fullmatch(f.name)), key=lambda f: int(f.name[5:]))


def rows_name(first, last):
    """Name of the file of the class rows first ... last - 1."""
    return f"rows-{first:012d}-{last:012d}.safetensors"


def crc32(path, progress=None):
    """zlib.crc32 of a file. progress: called with every number of bytes read."""
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(2**22):
            watchdog.note("reading a checkpoint")
            crc = zlib.crc32(piece, crc)
            if progress:
                progress(len(piece))
    return crc


def best_of(folders):
    """The checkpoint of the highest top-1, of equal ones the first; None where none was evaluated."""
    return max((folder for folder in folders if top1_of(folder) is not None), key=top1_of, default=None)


def top1_of(folder):
    """Top-1 that an evaluation gave at a checkpoint; None where there was none, or the checkpoint cannot be read."""
    try:
        top1 = read_meta(folder).get("top1")
    except ValueError:
        return None
    return top1 if isinstance(top1, float) and math.isfinite(top1) else None


def types_of(values):
    return {name: type(value) for name, value in values.items()}
