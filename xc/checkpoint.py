"""Checkpoints that any number of ranks reads.

    RUN/checkpoints/step-00001200/
        rows-000000000000-000000001650.safetensors   class rows and their momentum, by class range: one file a shard
        neighbors-….safetensors                      what the head chooses classes by, if anything: the head's own files
        backbone.safetensors                         parameters and buffers
        optimizer.safetensors                        the backbone's momentum, by parameter name
        residuals-….safetensors                      what every rank has yet to deliver, if anything: the exchange's own
        buffers-….safetensors                        the backbone's buffers of every rank, where they differ: likewise
        meta.json                                    format, position, classes, width, the files of class rows

All files are written into a hidden folder, meta.json last, with the length and checksum of every other; then the
folder is renamed: a folder of the final name is whole, and on the disk. safetensors: loading runs no code. A rank reads
the class ranges that it needs, whoever wrote them. No random state is kept: everything random is a function of the
seed and of the step.
"""

import json
import math
import re
import sys
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from xc import watchdog
from xc.config import UserError
from xc.disk import sync
from xc.exchange import AllReduce
from xc.heads import Head
from xc.losses import Losses
from xc.noise_scale import NoiseScale
from xc.optim import RowSGD
from xc.run_folder import replace_text
from xc.schedule import Position

_FORMAT, _VERSION = "xc-checkpoint", 5
_MOST_META = 2**26  # characters of a meta.json, of which a file takes a hundred: it may come from anywhere
_FOLDER = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"[a-z]+(-\d+)*\.safetensors")
_ROWS = re.compile(r"rows-(\d{12})-(\d{12})\.safetensors")


@dataclass
class State:
    """All that training changes."""

    backbone: torch.nn.Module
    body_optimizer: torch.optim.Optimizer
    head: Head
    head_optimizer: RowSGD
    exchange: AllReduce
    noise: NoiseScale
    losses: Losses


def files_of(state, world):
    """{file name: {name: tensor}} of what this rank writes. Collective."""
    head, files, means = state.head, state.exchange.files(), state.exchange.mean_buffers()
    if world.replicas.rank == 0 and len(head.shard):
        files |= {rows_name(head.shard.first, head.shard.last): dict(_row_tables(state))} | head.files()
    if world.rank == 0:
        files["backbone.safetensors"] = state.backbone.state_dict() | means
        files["optimizer.safetensors"] = _momentum_by_name(state)
    return files


def meta_of(state, position):
    """What meta.json says of the state itself."""
    return {"format": _FORMAT, "version": _VERSION, **asdict(position), **_numbers(state), **_shape(state.head)}


def rows_among(names):
    """Those of file names that are of class rows, in their order."""
    return sorted(name for name in names if _ROWS.fullmatch(name))


def to_resume(resume, run, world):
    """Folder of the checkpoint that --resume means, every byte of which is as it was written; None to begin anew. With
    auto it is the newest whole one. UserError where a file is damaged. Collective."""
    if resume == "auto":
        return newest_whole(run, world)
    if not resume:
        return None
    with world.agreed():
        check(Path(resume), world.rank, world.size)
    return Path(resume)


def newest_whole(run, world, most_steps=10**18):
    """The newest checkpoint of a run, of at most so many steps, whose files are whole; those that are not are named.
    None where there is none; UserError where there are some but none is whole. Collective.
    """
    broken = []
    found = world.everyone.all_gather_object(folders(Path(run) / "checkpoints"))[0]  # not all hosts see them at once
    for folder in reversed([folder for folder in found if int(folder.name[5:]) <= most_steps]):
        try:
            with world.agreed():
                check(folder, world.rank, world.size)
            return folder
        except UserError as error:
            broken.append(str(error))
            if world.rank == 0:
                print(f"warning: {error}", file=sys.stderr, flush=True)
    if broken:
        raise UserError(f"{broken[0]}, and no older one is whole: name another checkpoint by --resume, or begin anew "
                        "in another --out")
    return None


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


def load(folder, state, identity):
    """Put a checkpoint into the state given; returns the position it was written at.

    Not collective: every rank reads the class ranges that overlap its own shard. ValueError names what is broken or
    does not fit.
    """
    folder, head = Path(folder), state.head
    position, ranges, numbers = _fitting(folder, {**_shape(head), **identity}, state)
    path = folder / "backbone.safetensors"
    watchdog.note("reading a checkpoint")
    try:
        state.backbone.load_state_dict(load_file(path))
        path = folder
        state.exchange.load(folder)
        path = folder / "optimizer.safetensors"
        _set_momentum_by_name(state, load_file(path))
        for first, last in ranges:
            start, stop = max(first, head.shard.first), min(last, head.shard.last)
            if start >= stop:
                continue
            watchdog.note("reading a checkpoint")
            path = folder / rows_name(first, last)
            with safe_open(path, "pt") as file:
                if "momentum" not in file.keys() and state.head_optimizer.momentum:
                    raise ValueError("it holds no momentum of the rows: go on with --head-momentum 0")
                for name, rows in _row_tables(state):
                    piece = file.get_slice(name)
                    if piece.get_shape() != [last - first, rows.shape[1]]:
                        raise ValueError(f"{name} has shape {piece.get_shape()}")
                    rows[start - head.shard.first : stop - head.shard.first] = piece[start - first : stop - first]
        path = folder
        head.load(folder)  # checks its files itself
        for owner, values in zip(_number_owners(state), numbers, strict=True):
            if values.get("active") == vars(owner).get("active"):  # losses are scaled now as they were then
                vars(owner).update(values)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as e:
        raise ValueError(f"checkpoint file {path} cannot be used ({' '.join(str(e).split())}): resume with the "
                         "settings it was written with, or take another checkpoint") from e
    return position


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
    if not isinstance(meta, dict) or (meta.get("format"), meta.get("version")) != (_FORMAT, _VERSION):
        raise ValueError(f"{folder} is not a checkpoint of format {_FORMAT}, version {_VERSION}: resume it with the "
                         "code that wrote it")
    if not _is_sealed(meta):
        raise ValueError(f"checkpoint file {folder / 'meta.json'} is damaged: its checksum is not that of what it says")
    files = meta.get("files")
    if not isinstance(files, dict) or not all(
            _FILE.fullmatch(name) and isinstance(facts, dict) and _types(facts) == {"bytes": int, "crc32": int}
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


def _fitting(folder, expected, state):
    """(position, ranges of the files of rows, numbers) of a checkpoint; ValueError if it is not as expected."""
    meta = read_meta(folder)
    for name, here in expected.items():
        if meta.get(name) != here:
            raise ValueError(f"checkpoint {folder} has {name} {meta.get(name)}, this run {here}: resume with the "
                             "data and settings it was written with")
    ranges = ranges_of(folder, meta)
    strangers = {path.name for path in Path(folder).glob("*.safetensors")} - meta["files"].keys()
    if strangers:
        raise ValueError(f"checkpoint {folder} was written without {min(strangers)}: take that file away")
    position = Position(*(meta.get(field.name) for field in fields(Position)))
    if not all(type(n) is int and 0 <= n < 2**62 for n in asdict(position).values()):
        raise ValueError(f"checkpoint {folder} names no position: take another checkpoint")
    numbers = [meta.get(name) for name in _numbers(state)]
    for found, known in zip(numbers, _numbers(state).values(), strict=True):
        if not isinstance(found, dict) or _types(found) != _types(known):
            raise ValueError(f"checkpoint {folder} lacks the state of noise, loss scale and losses: take another "
                             "checkpoint")
    return position, ranges, numbers


def _types(values):
    return {name: type(value) for name, value in values.items()}


def _number_owners(state):
    return state.noise, state.exchange.loss_scale, state.losses


def _numbers(state):
    """What is kept in meta.json of the state, by name."""
    return dict(zip(("noise_scale", "loss_scale", "losses"), map(asdict, _number_owners(state)), strict=True))


def _shape(head):
    return {"num_classes": head.num_classes, "feature_dim": head.feature_dim, "num_rows": head.num_rows,
            "rows_are": head.rows_are, "row_dtype": str(head.weight.dtype).removeprefix("torch.")}


def _row_tables(state):
    """(name, (S, ...)) of what is kept by class range."""
    yield "weight", state.head.weight
    if state.head_optimizer.momentum:
        yield "momentum", state.head_optimizer.momentum_rows


def folders(checkpoints):
    """Folders of the whole checkpoints, oldest first."""
    return sorted((f for f in checkpoints.glob("step-*") if _FOLDER.fullmatch(f.name)), key=lambda f: int(f.name[5:]))


def rows_name(first, last):
    """Name of the file of the class rows first ... last - 1."""
    return f"rows-{first:012d}-{last:012d}.safetensors"


def _momentum_by_name(state):
    momentum = {name: state.body_optimizer.state[p].get("momentum_buffer")
                for name, p in state.backbone.named_parameters()}
    return {name: buffer for name, buffer in momentum.items() if buffer is not None}


def _set_momentum_by_name(state, momentum):
    parameters = {name: p for name, p in state.backbone.named_parameters() if p.requires_grad}
    kept = {id(p) for group in state.body_optimizer.param_groups if group["momentum"] for p in group["params"]}
    wanted = {name for name, p in parameters.items() if id(p) in kept}
    if momentum and not wanted <= momentum.keys() <= parameters.keys():
        raise ValueError(f"it has the momentum of {len(momentum)} tensors, this run keeps that of {len(wanted)}")
    for name, buffer in momentum.items():
        if buffer.shape != parameters[name].shape:
            raise ValueError(f"momentum of {name} has shape {tuple(buffer.shape)}")
        if name not in wanted:
            continue
        state.body_optimizer.state[parameters[name]]["momentum_buffer"] = buffer.to(parameters[name])


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
