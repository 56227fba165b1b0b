"""What a checkpoint holds, and whether its files are as they were written."""

from data_tools.checkpoints.ranges import RangedTables
from data_tools.common.progress import Progress
from xc.checkpoint import layout as checkpoint

DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def checkpoints_of(run):
    """Folders of the checkpoints of a run, or of its folder checkpoints, oldest first; [] where it is not a run."""
    return checkpoint.folders(run / "checkpoints") or checkpoint.folders(run)


def read(folder):
    """meta.json of one checkpoint, with every value checked that is used here; ValueError where it cannot be used."""
    if found := checkpoints_of(folder):
        raise ValueError(f"{folder} is a run with {len(found)} checkpoints: name one of them, as {found[-1]}")
    meta = checkpoint.read_meta(folder)
    numbers = {"step": 0, "examples": 0, "num_classes": 1, "num_rows": 1, "feature_dim": 1}
    if not (all(type(meta.get(name)) is int and least <= meta[name] < 2**63 for name, least in numbers.items())
            and all(0 <= facts["bytes"] < 2**63 for facts in meta["files"].values())
            and meta.get("row_dtype") in tuple(DTYPES)
            and isinstance(meta.get("rows_are"), str) and meta["rows_are"].isprintable()):
        raise ValueError(f"checkpoint {folder} does not say what it holds: take another checkpoint")
    checkpoint.ranges_of(folder, meta)
    return meta


def faults(folder, files, checksums=False, progress=None):
    """One line for each damaged file of a checkpoint.

    files  {name: {bytes, crc32}} of the files to check
    """
    found = (checkpoint.fault_of(folder / name, facts, checksums, progress) for name, facts in sorted(files.items()))
    return [fault for fault in found if fault]


def class_rows(folder, meta):
    """RangedTables of the class rows; ValueError where they are not as meta.json says."""
    rows = RangedTables(folder, "rows", checkpoint.ranges_of(folder, meta), meta["num_rows"])
    dtype, row = rows.table("weight")
    if dtype != DTYPES[meta["row_dtype"]] or len(row) != 1:
        raise ValueError(f"checkpoint {folder}: its class rows are {dtype} {row}, not {meta['row_dtype']}")
    return rows


def describe(folder):
    """Facts of a checkpoint as a dict for JSON."""
    meta = read(folder)
    damaged = faults(folder, meta["files"])
    of_epoch = meta.get("num_records")  # train.py adds it to the state
    facts = {"checkpoint": str(folder), "step": meta["step"], "examples": meta["examples"],
             "epoch": meta["examples"] / of_epoch if type(of_epoch) is int and 0 < of_epoch < 2**63 else None,
             "top1": checkpoint.top1_of(folder), "evaluated_on": meta.get("evaluated_on"),
             "num_classes": meta["num_classes"], "num_rows": meta["num_rows"],
             "rows_are": meta["rows_are"], "feature_dim": meta["feature_dim"], "row_dtype": meta["row_dtype"],
             "residuals_of_ranks": sum(name.startswith("residuals-") for name in meta["files"]),
             "bytes": sum(facts["bytes"] for facts in meta["files"].values()),
             "files": {name: facts["bytes"] for name, facts in sorted(meta["files"].items())}, "damaged": damaged}
    if not damaged:
        rows = class_rows(folder, meta)
        facts |= {"row_width": rows.table("weight")[1][0], "head_momentum": "momentum" in rows.first_file}
    return facts


def describe_run(run):
    """Facts of all checkpoints of a run: what they hold, or why they cannot be read."""
    folders, facts = checkpoints_of(run), []
    best = checkpoint.best_of(folders)
    for folder in folders:
        try:
            facts.append(describe(folder) | {"best": folder == best})
        except ValueError as error:
            facts.append({"checkpoint": str(folder), "best": folder == best, "damaged": [str(error)]})
    return facts


def verify(folder):
    """([line for each damaged file], text: how many files and MB) of a checkpoint, after reading every byte."""
    try:
        files = read(folder)["files"]
    except ValueError as error:
        return [str(error)], ""
    return _checked(folder, files), f"{len(files)} files, {_megabytes(files):.1f} MB"


def read_valid(folder):
    """meta.json of a checkpoint whose checksums all match, for rewriting: damaged bytes must not get a new checksum.

    ValueError names the first damaged file.
    """
    meta = read(folder)
    raise_first(_checked(folder, meta["files"]))
    return meta


def raise_first(found):
    """ValueError with the first of these lines, if there is one."""
    if found:
        raise ValueError(found[0])


def _checked(folder, files):
    with Progress(f"verifying {folder.name}", _megabytes(files), "MB") as progress:
        return faults(folder, files, checksums=True, progress=lambda count: progress.add(count / 1e6))


def _megabytes(files):
    return sum(facts["bytes"] for facts in files.values()) / 1e6
