"""Rewrites of checkpoints: one file of all, class rows in another number of files, rows of some classes."""

import itertools
import os
import shutil
from bisect import bisect_left

import numpy as np

from data_tools.checkpoints import ranges
from data_tools.checkpoints.contents import class_rows, faults, raise_first, read, read_valid
from xc.checkpoint import layout as checkpoint
from xc.checkpoint import tensor_file
from xc.comm.shard import Shard
from xc.files import sync
from xc.knn.graph_file import read_graph


def merge(folder, out):
    """Writes the backbone and all class rows of a checkpoint into one safetensors file; returns a summary."""
    meta = read_valid(folder)
    backbone = tensor_file.TensorFile(folder / "backbone.safetensors")
    tensors = {f"backbone.{name}": backbone.tensor(name) for name in backbone}
    tensors["weight"] = class_rows(folder, meta).tensor("weight", 0, meta["num_rows"])
    tensor_file.write(out, tensors, _origin(meta))
    dtype, shape, _ = tensors["weight"]
    return f"{len(tensors) - 1} tensors of the backbone, weight {dtype} {shape}, whose rows are {meta['rows_are']}"


def reshard(folder, out, num_files):
    """Writes a checkpoint as the new folder out with its class rows, and their graph, in num_files files each.

    returns  a summary; ValueError where the checkpoint is damaged or has too few rows
    """
    meta = read_valid(folder)
    class_rows(folder, meta)
    num_rows, kinds = meta["num_rows"], ranges.kinds_among(meta["files"])
    if num_files > num_rows:
        raise ValueError(f"--files {num_files} is more than the {num_rows} class rows: take at most that many")
    out.mkdir()
    files = {}
    for kind, found in kinds.items():
        source = _Graph if kind == "neighbors" else ranges.RangedTables
        tables = source(folder, kind, found, num_rows)
        for part in range(num_files):
            shard = Shard.of(num_rows, num_files, part)  # as of a rank of so many
            path = out / ranges.name_of(kind, shard.first, shard.last)
            files[path.name] = tensor_file.write(path, tables.tensors(shard.first, shard.last))
    ranged_files = {ranges.name_of(kind, *of_file) for kind, found in kinds.items() for of_file in found}
    for name in sorted(meta["files"].keys() - ranged_files):
        shutil.copyfile(folder / name, out / name)
        sync(out / name)
        files[name] = meta["files"][name]
    checkpoint.write_meta(out, meta | {"rows": checkpoint.rows_among(files), "files": files})
    sync(out / "meta.json")
    return f"{len(files)} files; train.py resumes from it by --resume"


class _Graph:
    """The files of a KNN graph. The part of a range of rows is in memory, as on a rank of a run."""

    def __init__(self, folder, kind, found, num_rows):
        self._paths, self._num_rows = [folder / ranges.name_of(kind, *of_file) for of_file in found], num_rows

    def tensors(self, first, last):
        graph = read_graph(self._paths, Shard(first, last), self._num_rows)
        return {name: tensor_file.pieces_of(tensor) for name, tensor in graph.tables().items()}


def slice_rows(folder, out, intervals):
    """Writes the rows of some classes into one safetensors file; returns a summary.

    intervals  [(first, last)] of class ids, last included, in the order of the output

    ValueError where a class is named twice or is not there, or a file that is read is damaged.
    """
    meta = read(folder)
    if meta["rows_are"] != "classes":
        raise ValueError(f"the rows of {folder} are {meta['rows_are']}, none is the row of one class: slice one "
                         "of another head")
    in_order = sorted(intervals)
    highest = max(last for _, last in intervals)
    if highest >= meta["num_rows"]:
        raise ValueError(f"--classes names {highest}, but {folder} has the classes 0 to {meta['num_rows'] - 1}")
    for (_, before), (first, _) in itertools.pairwise(in_order):
        if first <= before:
            raise ValueError(f"--classes names class {first} twice: name every class once")
    raise_first(faults(folder, meta["files"]))
    lasts, touched = [last for _, last in in_order], {}
    for first, last in checkpoint.ranges_of(folder, meta):
        found = bisect_left(lasts, first)
        if found < len(lasts) and in_order[found][0] < last:
            name = checkpoint.rows_name(first, last)
            touched[name] = meta["files"][name]
    raise_first(faults(folder, touched, checksums=True))  # damaged bytes must not get a new checksum
    rows = class_rows(folder, meta)
    dtype, row = rows.table("weight")
    count = sum(last - first + 1 for first, last in intervals)
    block = tensor_file.PIECE // 8
    ids = (np.arange(start, min(start + block, last + 1), dtype="<i8").tobytes()
           for first, last in intervals for start in range(first, last + 1, block))
    pieces = (piece for first, last in intervals for piece in rows.rows("weight", first, last + 1))
    tensor_file.write(out, {"classes": ("I64", (count,), ids), "weight": (dtype, (count, *row), pieces)}, _origin(meta))
    return f"the rows of {count} classes, weight {dtype} {(count, *row)}"


def _origin(meta):
    return {"step": str(meta["step"]), "rows_are": meta["rows_are"]}


def check_out(out, folder, force, is_folder):
    """ValueError for outputs that would fail, before anything is read."""
    if not is_folder and out.suffix != ".safetensors":
        raise ValueError(f"{out} is not allowed: give a name that ends in .safetensors")
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise ValueError(f"{out.parent}: no such folder, or not writable; make it first, {out.name} goes there")
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out} lies inside the checkpoint {folder}; give a place outside")
    if os.path.lexists(out) and not force:
        raise ValueError(f"{out} exists; remove it, give another name, or --force")
    if os.path.lexists(out) and not ((out / "meta.json").is_file() if is_folder else out.is_file()):
        raise ValueError(f"{out} is not a {'checkpoint' if is_folder else 'file'}, which --force could replace; give "
                         "another name")
