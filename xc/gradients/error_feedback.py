"""What exchanges have in common that compress gradients and keep the rest: error feedback (Seide et al. 2014)."""

import torch
from safetensors import safe_open

from xc.comm.groups import Group
from xc.comm.shard import Shard
from xc.gradients.allreduce import AllReduce, residual_files


class ErrorFeedback(AllReduce):
    """An exchange in which each rank adds what was not delivered to its next gradient.

    compressed    buckets with
                  first, last  range of the bucket among all compressed parameters, laid end to end
                  part         the Shard of it that this rank keeps
                  unsent       {name: (numbers of the part,)}; checkpoints use the same names
    unsent_names  these names
    shared_names  names of what is in these files beside, the same on all ranks
    inner         ranks that keep parts of one gradient
    outer         ranks that keep gradients of their own
    """

    unsent_names = shared_names = ""

    def __init__(self, backbone, world, bucket_mb=4.0, bits=32, loss_scale=None, two_level=False):
        """two_level: gradients are summed dense inside each host, and compressed between hosts only"""
        self.inner, self.outer = (world.host, world.cross_host) if two_level else (Group(), world.all_ranks)
        self.compressed = []
        super().__init__(backbone, world, bucket_mb, bits, loss_scale)

    def before_last_backward(self, plan):
        self._plan, self._buffers_differ = plan, True
        if not self.loss_scale.active:
            super().before_last_backward(plan)

    def reduce(self):
        if self.loss_scale.active:  # nothing was sent yet: if any rank overflowed, no rank may change its residuals
            for bucket in self._buckets:
                bucket.flat.div_(self.loss_scale.scale)
            overflow = torch.tensor([not self._all_finite()], dtype=torch.int32, device=self.world.device)
            if self.world.all_ranks.all_reduce(overflow, "max").item():
                return False
            super().before_last_backward(self._plan)
        self._exchange()
        return True

    def on_bucket_ready(self, bucket):
        if "first" in self._sketches:
            self._sketch("all", bucket, 1.0)  # `reduce` has divided its gradients by the loss scale already

    def files(self):
        tables = {f"{name}.{bucket.first + bucket.part.first}": rows
                  for bucket in self.compressed for name, rows in bucket.unsent.items()}
        return super().files() | {self.residual_file(): tables}

    def residual_file(self):
        """Name of this rank's file of unsent gradients."""
        return f"residuals-{self.outer.rank:06d}-{self.inner.rank:06d}.safetensors"

    def load(self, folder):
        """Read the files of a checkpoint of any number W' of ranks. Rank r mod W adds what rank r of W' had.

        ValueError for the files of another exchange. Not collective.
        """
        if not residual_files(folder):
            raise ValueError("it holds no unsent gradients: resume with the --exchange that it was written with")
        for bucket in self.compressed:
            for rows in bucket.unsent.values():
                rows.fill_(-0.0)  # -0 + x has the bits of x for every x, 0 + x has not
        for i, path in enumerate(residual_files(folder)):
            with safe_open(path, "pt") as file:
                if not i:
                    self._load_shared(file)
                if int(path.stem.split("-")[1]) % self.outer.size == self.outer.rank:
                    self._add_residuals(file)
        self._load_buffers(folder)

    def _load_shared(self, file):
        """Load what all ranks have alike."""

    def _add_residuals(self, file):
        for key in file.keys():
            name, first = key.split(".", 1)
            if name in self.shared_names:
                continue
            if name not in self.unsent_names:
                raise ValueError("it holds the unsent gradients of another exchange: resume with the --exchange that "
                                 "it was written with")
            saved, first = file.get_slice(key), int(first)
            last = first + saved.get_shape()[0]
            for bucket in self.compressed:
                mine = Shard(bucket.first + bucket.part.first, bucket.first + bucket.part.last)
                start, stop = max(first, mine.first), min(last, mine.last)
                if start < stop:
                    rows = saved[start - first : stop - first].to(self.world.device)
                    bucket.unsent[name][start - mine.first : stop - mine.first] += rows
