"""The files of an export beside its graphs: weights, class rows, class names, and model.json, which describes them all.

model.json has the keys

    format, version
    backbone     name, feature_dim, amp of the run; the graphs compute in float32
    input        pixels as a graph takes them: type, shape, colours, how an image becomes a square, mean and std
    outputs      shapes, and what they are
    logits       kind, scale, and how probabilities follow from features and class rows
    classes      count, digest, and the files of names and rows
    checkpoint   name, step, examples, top1 and the data it was measured on: where that is "retrieval on …", top1 is
                 recall@1
    metrics      of the evaluations with these weights, as in metrics.jsonl
    verified     largest differences of each graph from PyTorch, on how many images, and the tolerance
    versions     of Python and of the packages that wrote the files
    files        {name: {bytes, sha256}}
"""

import hashlib
import json
import os
import platform
from importlib.metadata import version

from data_tools.common.progress import Progress, note
from xc.checkpoint import tensor_file
from xc.comm.shard import Shard
from xc.data.class_names import NAMES
from xc.model.backbone import resolved
from xc.use.graph import pixel_norm

FORMAT, VERSION = "xc-export", 1
WEIGHTS, ROWS, CLASS_NAMES, MODEL = "backbone.safetensors", "classes.safetensors", "classes.jsonl", "model.json"


def write_weights(path, backbone):
    """Parameters and buffers of a Backbone: those of the network by their own names, which published weights have, and
    feature_norm.mean and feature_norm.variance (D,)."""
    parts = {"0": "", "1": "feature_norm."}
    tensors = {}
    for name, tensor in backbone.state_dict().items():
        part, _, own = name.partition(".")
        tensors[parts[part] + own] = tensor_file.pieces_of(tensor)
    tensor_file.write(path, tensors)


def write_rows(path, trained):
    """The class rows as the logits use them: `rows`, float32 (C, D). They are mapped and written in blocks.

    ValueError where a file of the checkpoint is damaged.
    """
    count, width = trained.num_classes, trained.cfg.feature_dim
    with Progress("writing the class rows", count, "rows") as progress:
        def pieces():
            for _, rows in trained.row_blocks(Shard(0, count), "cpu"):
                yield from tensor_file.pieces_of(rows)[2]
                progress.add(len(rows))

        tensor_file.write(path, {"rows": ("F32", (count, width), pieces())},
                          {"classes_digest": str(trained.classes_digest)})


def write_names(path, table):
    """The names of a ClassNames in the order of the rows, each a text in JSON: a name may hold line ends."""
    with open(path, "w", encoding="utf-8", newline="\n") as file, \
            Progress("writing the class names", table.num_classes, "names") as progress:
        for first in range(0, table.num_classes, NAMES):
            names = table.class_names(first, min(first + NAMES, table.num_classes))
            file.writelines(json.dumps(name, ensure_ascii=False) + "\n" for name in names)
            progress.add(len(names))


def description(trained, outputs, classes):
    """What model.json says before any file is written.

    outputs  names of the outputs of the graphs; [] where there are none
    classes  {"names": file, "rows": file} of those that will be there
    """
    cfg, meta = trained.cfg, trained.meta
    mean, std = pixel_norm(cfg)
    size, cosine = cfg.image_size, cfg.logits == "cosine"
    of_length = "of length 1" if cosine else "of any length"
    of_outputs = {"features": {"dtype": "float32", "shape": ["N", cfg.feature_dim], "what": of_length},
                  "probabilities": {"dtype": "float32", "shape": ["N", trained.num_classes],
                                    "what": "softmax over all classes, in the order of their names"}}
    return {
        "format": FORMAT, "version": VERSION,
        "backbone": {"name": resolved(cfg.backbone, images=True), "feature_dim": cfg.feature_dim,
                     "amp": cfg.amp, "computes_in": "float32"},
        "input": {"name": "pixels", "dtype": "uint8", "shape": ["N", cfg.channels, size, size],
                  "size": size, "mode": "L" if cfg.channels == 1 else "RGB",
                  "resize": f"the whole image to {size} x {size}, whatever its aspect ratio: bicubic with antialiasing",
                  "normalization": "(pixels / 255 - mean) / std, inside the graphs",
                  "mean": mean.tolist(), "std": std.tolist()},
        "outputs": {name: of_outputs[name] for name in outputs},
        "logits": {"kind": cfg.logits, "scale": trained.scale,
                   "probabilities": "softmax(scale * features @ rows.T) over all classes",
                   "features_and_rows": of_length},
        "classes": {"count": trained.num_classes, "digest": trained.classes_digest} | classes,
        "checkpoint": {"name": trained.folder.name} | {name: meta.get(name) for name in (
            "step", "examples", "top1", "evaluated_on")},
        "metrics": _metrics(trained)}


def _metrics(trained):
    """The lines of metrics.jsonl on evaluations of the checkpoint. A test at the end is of an earlier step, perhaps."""
    path, found = trained.folder.parent.parent / "metrics.jsonl", []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                values = json.loads(line)
                if values.get("scored_step", values.get("step")) == trained.meta["step"] and "split" in values:
                    found.append(values)
    except (OSError, ValueError, AttributeError, RecursionError) as e:
        note(f"note: model.json lacks metrics, or some of them ({path}: {e})")
    return found


def write_model(folder, description, verified, packages):
    """Write model.json, last: with the checksums of the other files of the folder.

    verified  as the key of model.json
    packages  names of those that wrote the files
    """
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    files = {name: _facts(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}
    with open(os.path.join(folder, MODEL), "w", encoding="utf-8") as file:
        json.dump(description | {"verified": verified, "versions": versions, "files": files}, file, indent=1)


def _facts(path):
    size, digest = os.path.getsize(path), hashlib.sha256()
    with open(path, "rb") as file, Progress(f"checksum of {os.path.basename(path)}", size / 1e6, "MB") as progress:
        while piece := file.read(tensor_file.PIECE):
            digest.update(piece)
            progress.add(len(piece) / 1e6)
    return {"bytes": size, "sha256": digest.hexdigest()}
