"""The weights that a backbone starts from: those of a file, where names and shapes are the same.

A file may come from anywhere, so nothing in it is run: safetensors files hold numbers only, and torch's files are read
with weights_only.
"""

import os
import pickle
import zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from xc.errors import UserError, one_line

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_NESTS = ("state_dict", "model_state_dict", "model")  # names under which training scripts keep the weights
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")  # what wrappers put before names
_NAMED = 3  # tensors of a line


def load(backbone, path):
    """Copy what fits from a file into a Backbone; returns three lines: what matched, was left out, and is new.

    UserError where the file cannot be read, or less than half of the network's numbers are in it.
    """
    found, done = _plain(_read(path), path)
    whole = backbone.state_dict()
    published = {f"0.{name}": tensor for name, tensor in found.items()}
    if len(published.keys() & whole.keys()) >= len(found.keys() & whole.keys()):  # else it is of our checkpoints
        found = published
    wanted = {name: tensor for name, tensor in whole.items() if name.startswith("0.")}
    matched = {name for name, tensor in whole.items() if name in found and found[name].shape == tensor.shape
               and found[name].is_floating_point() == tensor.is_floating_point()}
    new = {name: tensor for name, tensor in wanted.items() if name not in matched}
    left_out = {name: tensor for name, tensor in found.items() if name not in matched}
    total, fits = _count(wanted), _count(wanted[name] for name in matched & wanted.keys())
    if 2 * fits < total:
        raise UserError(f"--init {path} fits {fits:,} of the {total:,} numbers of the backbone, less than half (in the "
                        f"file: {_named(left_out)}; here: {_named(new)}): give the weights of this --backbone")
    for name in sorted(matched):
        if found[name].is_floating_point() and not found[name].isfinite().all():
            raise UserError(f"--init {path} has numbers in {_short(name)} that are not finite: take another file")
    with torch.no_grad():
        for name in matched:
            whole[name].copy_(found[name])
    return [f"init: matched {len(matched)} tensors, {fits:,} of {total:,} numbers of the backbone, from {path}{done}",
            f"init: left out {len(left_out)} tensors of the file{_listed(left_out)}",
            f"init: new {len(new)} tensors of the backbone{_listed(new)}"]


def share(backbone, world):
    """Give every rank the weights of rank 0, bit for bit. Collective."""
    for tensor in backbone.state_dict().values():
        bits = tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor  # as a number -0 + 0 would be 0
        with world.traffic.uncounted():
            bits.copy_(world.all_ranks.all_reduce(bits.clone() if world.rank == 0 else torch.zeros_like(bits)))


def _read(path):
    """What a file holds: {name: tensor}, or a nest of them. UserError where it cannot be read."""
    if os.path.isdir(path):
        raise UserError(f"--init {path} is a folder, but not that of a run: give the --out of a run, or a file of "
                        "weights, as backbone.safetensors of a checkpoint")
    if not os.path.isfile(path):  # of a Path, is_file fails where a name is too long
        raise UserError(f"--init {path} is not a file, nor the folder of a run: give the path of one of them")
    if path.suffix not in _SUFFIXES:
        raise UserError(f"--init {path} has no ending of a file of weights: give one that ends in "
                        f"{', '.join(_SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Only the newer of torch's formats, a zip, can be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, SafetensorError,
            pickle.UnpicklingError) as e:
        reason = one_line(str(e).split("\n")[0].split(". ")[0])[:200]  # torch goes on with advice that is not safe
        raise UserError(f"--init {path} cannot be read as tensors alone ({reason}): save a state_dict with torch.save "
                        "or safetensors") from e


def _plain(found, path):
    """({name: tensor} without nests and the prefixes of wrappers, a text about what was done)."""
    done = ""
    while isinstance(found, dict) and (nest := next((n for n in _NESTS if isinstance(found.get(n), dict)), None)):
        found, done = found[nest], f"{done}, in its {nest}"
    tensors = {n: t for n, t in found.items() if isinstance(n, str) and torch.is_tensor(t)} \
        if isinstance(found, dict) else {}
    if not tensors:
        raise UserError(f"--init {path} holds no tensors by name: save a state_dict")
    others = len(found) - len(tensors)
    done += f", beside {others} values that are no tensors" if others else ""
    while prefix := next((p for p in _PREFIXES if any(name.startswith(p) for name in tensors)), None):
        shorter = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if len(shorter) < len(tensors):  # two tensors would have one name
            break
        tensors, done = shorter, f"{done}, without {prefix} before its names"
    return tensors, done


def _count(tensors):
    return sum(tensor.numel() for tensor in (tensors.values() if isinstance(tensors, dict) else tensors))


def _short(name):
    """The name as the network alone has it."""
    return one_line(name.removeprefix("0."))[:80]


def _named(tensors):
    """The largest of the tensors, with their shapes."""
    largest = sorted(tensors, key=lambda name: -tensors[name].numel())[:_NAMED]
    text = ", ".join(f"{_short(name)} {tuple(tensors[name].shape)}" for name in largest)
    return (text or "nothing") + (", …" if len(tensors) > _NAMED else "")


def _listed(tensors):
    return f": {_named(tensors)}" if tensors else ""
