"""The layout of checkpoints on disk, and the reading of their meta.json. Needs neither torch nor the trainer.

    RUN/checkpoints/step-00001200/
        rows-000000000000-000000001650.safetensors   class rows and their momentum, by class range: one file a shard
        neighbors-….safetensors                      the head's own files: the graph or index of its class selection
        backbone.safetensors                         parameters and buffers
        optimizer.safetensors                        the backbone's momentum, by parameter name; with AdamW both
                                                     moments and the number of steps
        residuals-….safetensors                      the exchange's own files: gradients that a rank has not yet sent
        buffers-….safetensors                        the backbone's buffers of every rank, where they differ
        meta.json                                    format, progress, classes, width, and every file's length and
                                                     CRC-32

meta.json has the keys

    format, version, crc32                          of meta.json itself
    files, rows                                     {file name: {bytes, crc32}}; the names of the files of class rows
    step, examples, last_batch                      the progress of the run
    num_classes, num_rows, rows_are, feature_dim, row_dtype            the class rows
    seed, sampler, logits, num_records, data_seed, classes_digest, course,
    input_norm                                      what a resumed run must have in common
    noise_scale, loss_scale, losses                 small parts of the state
    top1, evaluated_on                              of the evaluation at this step, and on which data; or null. Where
                                                    that is "retrieval on …", top1 is recall@1

All files are written into a hidden folder, meta.json last, and then the folder is renamed. So a folder with its final
name is complete and on the disk. safetensors files hold no code. Any number of ranks can read a checkpoint: a rank
reads the class ranges that it needs, whoever wrote them.
"""

import json
import math
import re
import shutil
import sys
import zlib
from pathlib import Path

from xc.files import replace_text, sync

FORMAT, VERSION = "xc-checkpoint", 5
_MOST_META = 2**26  # characters of a meta.json, of which a file takes a hundred: it may come from anywhere
_FOLDER = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"[a-z]+(-\d+)*\.safetensors")
_ROWS = re.compile(r"rows-(\d{12})-(\d{12})\.safetensors")


def rows_among(names):
    """The names of files of class rows among these names, sorted."""
    return sorted(name for name in names if _ROWS.fullmatch(name))


def write_meta(folder, meta):
    """Write meta.json with a checksum of its own content."""
    replace_text(Path(folder) / "meta.json", json.dumps(meta | {"crc32": _crc32_of(meta)}, indent=1))


def add_top1(folder, top1, evaluated_on):
    """Add the top-1 of a later evaluation on those data to a checkpoint."""
    write_meta(folder, read_meta(folder) | {"top1": top1, "evaluated_on": evaluated_on})
    sync(folder)


def _crc32_of(meta):
    text = json.dumps({name: value for name, value in meta.items() if name != "crc32"}, sort_keys=True)
    return zlib.crc32(text.encode())


def _checksum_matches(meta):
    try:
        return meta.get("crc32") == _crc32_of(meta)
    except RecursionError:
        return False


def check(folder, part=0, num_parts=1, progress=None):
    """ValueError where a file of a checkpoint is not as it was written, by its length or checksum.

    part, num_parts  the ranks share the checksums: this one is number `part`. All of them check all lengths
    progress         called with every number of bytes read
    """
    for i, (name, facts) in enumerate(sorted(read_meta(folder)["files"].items())):
        if fault := fault_of(Path(folder) / name, facts, i % num_parts == part, progress):
            raise ValueError(fault)


def fault_of(path, facts, checksum=True, progress=None):
    """What is wrong with a file of a checkpoint, by its length and, if asked, its checksum; None if nothing is.

    facts     {bytes, crc32} of `read_meta`
    progress  called with every number of bytes read
    """
    try:
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "not there"
            return f"checkpoint file {path} is damaged: it is {found}, it was {facts['bytes']} bytes"
        if checksum and crc32(path, progress) != facts["crc32"]:
            return f"checkpoint file {path} is damaged: its checksum does not match"
    except OSError as error:
        return f"checkpoint file {path} cannot be read: {error}"
    return None


def read_meta(folder):
    """The content of a checkpoint's meta.json; `files` is {name: {bytes, crc32}}. ValueError where it is not valid."""
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
    if not _checksum_matches(meta):
        raise ValueError(f"checkpoint file {folder / 'meta.json'} is damaged: its checksum does not match")
    files = meta.get("files")
    if not isinstance(files, dict) or not all(
            _FILE.fullmatch(name) and isinstance(facts, dict) and types_of(facts) == {"bytes": int, "crc32": int}
            for name, facts in files.items()):
        raise ValueError(f"checkpoint {folder} does not say which files it has: take another checkpoint")
    return meta


def ranges_of(folder, meta):
    """(first, last) of every file of class rows, ascending. ValueError where they do not cover all rows exactly
    once."""
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
    """Folders of the checkpoints, oldest first."""
    return sorted((f for f in checkpoints.glob("step-*") if _FOLDER.fullmatch(f.name)), key=step_of)


def step_of(folder):
    """The number of steps after which a checkpoint was written, from the name of its folder."""
    return int(folder.name.removeprefix("step-"))


def rows_name(first, last):
    """Name of the file of the class rows first ... last - 1."""
    return f"rows-{first:012d}-{last:012d}.safetensors"


def crc32(path, progress=None):
    """zlib.crc32 of a file.

    progress  called with every number of bytes read
    """
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(2**22):
            crc = zlib.crc32(piece, crc)
            if progress:
                progress(len(piece))
    return crc


def set_aside(later):
    """Rename checkpoints that a run has gone back from, so that nobody takes them for its own: abandoned-step-…"""
    try:
        for folder in later:
            aside = folder.with_name(f"abandoned-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        print(f"note: the run goes on from before {later[0].name}; {len(later)} later checkpoints are now called "
              "abandoned-step-…", file=sys.stderr, flush=True)
    except OSError as error:  # training goes on, as where an old one cannot be deleted
        print(f"warning: {folder} is of the run that was left, and cannot be renamed ({error}); remove it",
              file=sys.stderr, flush=True)


def best_of(folders, evaluated_on=None):
    """The checkpoint with the highest top-1, the first of equal ones; None where none was evaluated.

    folders       oldest first
    evaluated_on  the data that count, by their name in meta.json; None: those of the last one that was evaluated
    """
    if evaluated_on is None:
        last = next((folder for folder in reversed(folders) if top1_of(folder) is not None), None)
        evaluated_on = last and read_meta(last).get("evaluated_on")
    top1 = {folder: top1_of(folder, evaluated_on) for folder in folders}
    return max((folder for folder in folders if top1[folder] is not None), key=top1.get, default=None)


def top1_of(folder, evaluated_on=None):
    """Top-1 of the evaluation at a checkpoint; None where there was none, or the checkpoint cannot be read.

    evaluated_on  None: on any data; else on those. Code that knew test alone did not write what it was
    """
    try:
        meta = read_meta(folder)
    except ValueError:
        return None
    top1 = meta.get("top1")
    if not (isinstance(top1, float) and math.isfinite(top1)):
        return None
    is_old = "evaluated_on" not in meta and str(evaluated_on).startswith("test")
    return top1 if is_old or evaluated_on in (None, meta.get("evaluated_on")) else None


def types_of(values):
    return {name: type(value) for name, value in values.items()}
