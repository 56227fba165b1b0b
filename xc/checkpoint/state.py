"""The state of a run, to and from the files of a checkpoint (layout.py).

No random state is kept: every random number is a function of the seed and of the step.
"""

from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from xc.checkpoint.layout import FORMAT, VERSION, ranges_of, read_meta, rows_name, types_of
from xc.gradients.allreduce import AllReduce
from xc.model.head_table import Head
from xc.optim.noise_scale import NoiseScale
from xc.optim.optimizers import RowSGD
from xc.optim.schedule import Progress
from xc.run import watchdog
from xc.run.loss_meter import LossMeter

_UNSAID = {"input_norm": "half"}  # in checkpoints of code that knew nothing else
_BLOCK = 2**22  # numbers that are looked at at once


@dataclass
class State:
    """All that training changes."""

    backbone: torch.nn.Module
    backbone_optimizer: torch.optim.Optimizer
    head: Head
    head_optimizer: RowSGD
    exchange: AllReduce
    noise: NoiseScale
    losses: LossMeter


def files_of(state, world):
    """What this rank writes: the file of class rows, the files of the head, the others; each {file name: {name:
    tensor}}. Collective."""
    head, others, means = state.head, state.exchange.files(), state.exchange.mean_buffers()
    of_rows, of_head = {}, {}
    if world.replicas.rank == 0 and len(head.shard):
        of_rows = {rows_name(head.shard.first, head.shard.last): dict(_row_tables(state))}
        of_head = head.files()
    if world.rank == 0:
        others["backbone.safetensors"] = state.backbone.state_dict() | means
        others["optimizer.safetensors"] = _moments_by_name(state)
    return of_rows, of_head, others


def meta_of(state, progress):
    """The part of meta.json that describes the state."""
    return {"format": FORMAT, "version": VERSION, **asdict(progress), **_numbers(state), **_shape(state.head)}


def not_finite(state, world):
    """The name of a tensor of the state that is not finite, on whichever rank; None where all are. Collective."""
    name = next((f"{key} of {name}" for files in files_of(state, world) for name, tables in files.items()
                 for key, tensor in tables.items() if tensor.is_floating_point() and not _is_finite(tensor)), None)
    return next((name for name in world.all_ranks.all_gather_object(name) if name is not None), None)


def _is_finite(tensor):
    # In blocks, since torch copies 16-bit numbers to sum them. A sum is quick, but may be infinite for huge numbers.
    for block in tensor.flatten().split(_BLOCK):
        watchdog.heartbeat("looking for numbers that are not finite")
        if not (block.sum(dtype=torch.float32).isfinite() or block.isfinite().all()):
            return False
    return True


def load_weights(folder, state, identity):
    """Load what evaluation needs of a checkpoint: the backbone and the class rows. Nothing else is changed.

    The rest is that of `load`.
    """
    folder = Path(folder)
    ranges = fitting(folder, state, identity)[1]
    with _naming(folder / "backbone.safetensors") as reading:
        state.backbone.load_state_dict(_renamed(state, load_file(reading.path)))
        _load_rows(folder, state, ranges, {"weight": state.head.weight}, reading)


def load(folder, state, identity):
    """Load a checkpoint into a state; returns the progress at which it was written.

    identity  {name: value} that the run and the checkpoint must have in common

    Not collective: every rank reads the class ranges that overlap its own shard. ValueError names what is corrupt or
    does not fit.
    """
    folder, head = Path(folder), state.head
    progress, ranges, numbers = fitting(folder, state, identity)
    with _naming(folder / "backbone.safetensors") as reading:
        state.backbone.load_state_dict(_renamed(state, load_file(reading.path)))
        reading.path = folder
        state.exchange.load(folder)
        reading.path = folder / "optimizer.safetensors"
        _set_moments_by_name(state, _renamed(state, load_file(reading.path)))
        _load_rows(folder, state, ranges, dict(_row_tables(state)), reading)
        reading.path = folder
        head.load(folder)  # it checks its own files
        for owner, values in zip(_number_owners(state), numbers, strict=True):
            if values.get("active") == vars(owner).get("active"):  # loss scaling is on, or off, as it was then
                vars(owner).update(values)
    return progress


@contextmanager
def _naming(path):
    """Turn an error of the block into a ValueError that names the file in hand, `path` of what the block gets."""
    watchdog.heartbeat("reading a checkpoint")
    reading = SimpleNamespace(path=path)
    try:
        yield reading
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as e:
        raise ValueError(f"checkpoint file {reading.path} cannot be used ({' '.join(str(e).split())}): resume with the "
                         "settings it was written with, or take another checkpoint") from e


def _load_rows(folder, state, ranges, tables, reading):
    """Read this rank's part of the tables {name: (S, …)} from the files of class rows."""
    shard = state.head.shard
    for first, last in ranges:
        start, stop = max(first, shard.first), min(last, shard.last)
        if start >= stop:
            continue
        watchdog.heartbeat("reading a checkpoint")
        reading.path = folder / rows_name(first, last)
        with safe_open(reading.path, "pt") as file:
            if "momentum" in tables and "momentum" not in file.keys():
                raise ValueError("it holds no momentum of the class rows: resume with --head-momentum 0")
            for name, rows in tables.items():
                piece = file.get_slice(name)
                if piece.get_shape() != [last - first, rows.shape[1]]:
                    raise ValueError(f"{name} has shape {piece.get_shape()}")
                rows[start - shard.first : stop - shard.first] = piece[start - first : stop - first]


def fitting(folder, state, identity):
    """(progress, ranges of the files of rows, numbers) of a checkpoint; ValueError where `load` cannot take it."""
    meta = read_meta(folder)
    for name, here in {**_shape(state.head), **identity}.items():
        if (there := meta.get(name, _UNSAID.get(name))) != here:
            raise ValueError(f"checkpoint {folder} has {name} {there}, this run {here}: resume with the "
                             "data and settings it was written with")
    ranges = ranges_of(folder, meta)
    unknown = {path.name for path in Path(folder).glob("*.safetensors")} - meta["files"].keys()
    if unknown:
        raise ValueError(f"checkpoint {folder} was written without {min(unknown)}: remove that file")
    progress = Progress(*(meta.get(field.name) for field in fields(Progress)))
    if not all(type(n) is int and 0 <= n < 2**62 for n in asdict(progress).values()):
        raise ValueError(f"checkpoint {folder} names no progress: take another checkpoint")
    numbers = [meta.get(name) for name in _numbers(state)]
    for found, known in zip(numbers, _numbers(state).values(), strict=True):
        if not isinstance(found, dict) or types_of(found) != types_of(known):
            raise ValueError(f"checkpoint {folder} lacks the state of noise, loss scale and losses: take another "
                             "checkpoint")
    return progress, ranges, numbers


def _number_owners(state):
    return state.noise, state.exchange.loss_scale, state.losses


def _numbers(state):
    """{name: {field: number}}: the part of the state that is kept in meta.json."""
    return dict(zip(("noise_scale", "loss_scale", "losses"), map(asdict, _number_owners(state)), strict=True))


def _shape(head):
    return {"num_classes": head.num_classes, "feature_dim": head.feature_dim, "num_rows": head.num_classes,
            "rows_are": "classes", "row_dtype": str(head.weight.dtype).removeprefix("torch.")}


def _row_tables(state):
    """(name, tensor (S, …)) of the tables that are kept by class range."""
    yield "weight", state.head.weight
    if state.head_optimizer.momentum:
        yield "momentum", state.head_optimizer.momentum_rows


def _renamed(state, tensors):
    renamed = getattr(state.backbone, "renamed", None)
    return renamed(tensors) if renamed else tensors


# Parts of the optimizer's state of a parameter, and what is added to the parameter's name for them.
_MOMENTS = {"momentum_buffer": "", "exp_avg": ".exp_avg", "exp_avg_sq": ".exp_avg_sq", "step": ".step"}


def _moments_by_name(state):
    moments = {name: state.backbone_optimizer.state[p] for name, p in state.backbone.named_parameters()
               if p in state.backbone_optimizer.state}
    return {name + _MOMENTS[part]: tensor for name, parts in moments.items() for part, tensor in parts.items()
            if tensor is not None}


def _set_moments_by_name(state, moments):
    """Set the state of the backbone's optimizer. A file of a run without momentum is empty, and changes nothing."""
    optimizer = state.backbone_optimizer
    parts = ["exp_avg", "exp_avg_sq", "step"] if isinstance(optimizer, torch.optim.AdamW) else ["momentum_buffer"]
    parameters = {name: p for name, p in state.backbone.named_parameters() if p.requires_grad}
    kept = {id(p) for group in optimizer.param_groups if group.get("momentum", True) for p in group["params"]}
    known = {name + _MOMENTS[part]: (p, part) for name, p in parameters.items() for part in parts}
    wanted = {name for name, (p, _) in known.items() if id(p) in kept}
    if moments and not wanted <= moments.keys() <= known.keys():
        raise ValueError(f"it has {len(moments)} tensors of the optimizer, this run needs {len(wanted)}, for its "
                         "--optimizer, --momentum and --freeze: give those of its run.args, and where that has no "
                         "--optimizer, put @recipes/sgd.args before it")
    for name, tensor in moments.items():
        parameter, part = known[name]
        if tensor.shape != (() if part == "step" else parameter.shape):
            raise ValueError(f"momentum of {name} has shape {tuple(tensor.shape)}")
        if name in wanted:
            optimizer.state[parameter][part] = tensor.to(parameter)
