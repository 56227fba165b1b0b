"""The graph that an export holds: from pixels to features and probabilities, captured by torch.export."""

import logging
import warnings
from contextlib import contextmanager

import torch
from torch import nn

from xc.comm.shard import Shard
from xc.data.augment import norm_of
from xc.errors import UserError
from xc.model.backbone import Backbone

MOST_BYTES = 2**31 - 2**26  # of the numbers in a graph: an ONNX file ends at 2 GB, which protobuf cannot exceed
_HALF = 0.5, 0.5


class Graph(nn.Module):
    """Pixels (N, channels, size, size) uint8 -> {"features": (N, D)} and, with class rows, {"probabilities": (N, C)}.

    Pixels are normalised inside. Features are as the logits use them, probabilities those of the softmax over all
    classes without margin. All is computed in float32, whatever --amp the run had.
    """

    def __init__(self, trained, rows=None):
        """rows: (C, D) float32 as the logits use them; None: the graph ends at the features"""
        super().__init__()
        self._trained = trained
        self.backbone = Backbone(*trained.backbone)
        for name, numbers in zip(("mean", "std"), pixel_norm(trained.cfg), strict=True):
            self.register_buffer(name, numbers[:, None, None])
        self.register_buffer("rows", rows)
        self.eval().requires_grad_(False)

    def forward(self, pixels):
        inputs = (pixels.float() / 127.5 - 1 - (2 * self.mean - 1)) / (2 * self.std)  # the order of `prepared`
        outputs = {"features": self._trained.directions(self.backbone(inputs))}
        if self.rows is not None:
            outputs["probabilities"] = (self._trained.scale * outputs["features"] @ self.rows.T).softmax(1)
        return outputs


def pixel_norm(cfg):
    """(means, deviations) of pixels from 0 to 1, float32 (channels,) each, of a run's --input-norm."""
    norm = norm_of(cfg.input_norm, cfg.channels)
    return [numbers.flatten() for numbers in norm] if norm else torch.tensor(_HALF)[:, None].repeat(1, cfg.channels)


def check_size(trained, with_rows):
    """UserError where the weights, or the class rows, take more bytes than a graph can hold."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in trained.backbone.state_dict().values())
    if weights > MOST_BYTES:
        raise UserError(f"the backbone takes {weights / 1e9:.1f} GB, and a graph holds {MOST_BYTES / 1e9:.1f}: take "
                        "--formats safetensors")
    rows = 4 * trained.num_classes * trained.cfg.feature_dim
    if with_rows and weights + rows > MOST_BYTES:
        raise UserError(f"the {trained.num_classes} class rows take {rows / 1e9:.1f} GB, and a graph holds "
                        f"{MOST_BYTES / 1e9:.1f}: add --features-only; --formats safetensors writes the rows")


def rows_of(trained):
    """All class rows as the logits use them, float32 (C, D), in memory. ValueError where a file is damaged."""
    rows = torch.empty(trained.num_classes, trained.cfg.feature_dim)
    for first, block in trained.row_blocks(Shard(0, trained.num_classes), "cpu"):
        rows[first : first + len(block)] = block
    return rows


def captured(graph, cfg):
    """The torch.export.ExportedProgram of a Graph, for any number of images.

    UserError where it cannot be captured, as where a branch depends on numbers.
    """
    pixels = torch.zeros(2, cfg.channels, cfg.image_size, cfg.image_size, dtype=torch.uint8)
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(graph, (pixels,), dynamic_shapes={"pixels": {0: torch.export.Dim("N")}})
    except Exception as e:  # of many kinds, with pages of text
        raise UserError(f"torch.export cannot capture the backbone ({first_line(e)}): take --formats safetensors"
                        ) from e


@contextmanager
def quiet():
    """Keeps back what torch and its exporter warn of, which is about packages and functions of theirs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def first_line(error):
    """The first line of what an error says that is not empty, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
