"""What a backbone takes: its bytes, its operations, and the layers whose gradients are sent."""

import math
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from xc.comm.world import World
from xc.gradients.dgc import Dgc
from xc.model import backbone as backbones


@dataclass(frozen=True)
class BackboneSize:
    """In bytes, unless said otherwise.

    matrices     parameters with two or more dimensions that are trained
    parameters   all parameters
    buffers      all buffers
    activations  what the forward pass of one example keeps for the backward pass
    example      one example
    trained      parameters that are trained
    flops        floating-point operations of the forward pass of one example
    buckets      numbers in each of the buckets in which DGC selects
    shapes       of the parameters that are trained
    """

    matrices: int
    parameters: int
    buffers: int
    activations: int
    example: int
    trained: int
    flops: int = 0
    buckets: tuple = ()
    shapes: tuple = ()

    @classmethod
    def of(cls, cfg, input_shape, num_ranks=1):
        """Build the backbone and measure it. UserError if its name is unknown or it does not take such examples."""
        examples_of_rank = cfg.global_batch // cfg.micro_batches // num_ranks
        backbone = backbones.build(cfg.backbone, input_shape, cfg.feature_dim, cfg.seed, World(), cfg.amp,
                                   examples_of_rank, cfg.freeze)
        own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
        saved = {}  # {address: bytes}

        def save(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        counter = FlopCounterMode(display=False)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), counter:
            features = backbone(torch.zeros(2, *input_shape))  # two, since a batch norm needs more than one
        activations = sum(saved.values()) // 2
        del features  # only now, since freed memory could be used twice and would be counted once
        parameters = list(backbone.parameters())
        trained = [p for p in parameters if p.requires_grad]
        buckets = tuple(len(bucket.flat) for bucket in Dgc(backbone, World()).compressed)
        return cls(_nbytes(p for p in trained if p.dim() > 1), _nbytes(parameters), _nbytes(backbone.buffers()),
                   activations, 4 * math.prod(input_shape), _nbytes(trained), counter.get_total_flops() // 2, buckets,
                   tuple(tuple(p.shape) for p in trained))


def _nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)
