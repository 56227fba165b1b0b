"""Optimizers: torch's SGD or LARS for the backbone, our own for the class rows."""

import numpy as np
import torch

_BLOCK_BYTES = 2**22  # of gathered rows at a time


def backbone_optimizer(backbone, cfg, keeps_momentum=False):
    """SGD or LARS with momentum; biases and norm scales are not decayed.

    keeps_momentum: the exchange takes the momentum of tensors of two dimensions and more. There is none here then, and
    their decay, which momentum would sum up, is 1/(1 - momentum) times stronger for that.
    """
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    matrices = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": cfg.weight_decay}
    others = {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}
    if keeps_momentum:
        matrices |= {"momentum": 0.0, "nesterov": False, "weight_decay": cfg.weight_decay / (1 - cfg.momentum)}
    groups = [g for g in (matrices, others) if g["params"]]
    options = {"lr": cfg.lr, "momentum": cfg.momentum, "nesterov": bool(cfg.nesterov), "fused": True}
    if cfg.optimizer == "lars":
        return Lars(groups, cfg.lars_trust, cfg.momentum if keeps_momentum else 0.0, **options)
    return torch.optim.SGD(groups, **options)


class Lars(torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You et al. 2017): every layer moves in proportion to its weights' length.

        λ = trust |w| / (|g| + β |w|)     v ← m v + γ λ (g + β w)     w ← w - v

    γ the learning rate, β the weight decay. λ = 1 for tensors of fewer than two dimensions, and where w or g is 0.

    taken: the momentum m of an exchange that takes it, 0 without. Gradients arrive summed up then: λ takes their norm
    times sqrt(1 - m²), which is a gradient's own where gradients are mostly noise, and β times 1 - m (ours). Layers
    move about as far as without such an exchange, and less far where gradients stay the same for long.
    """

    def __init__(self, groups, trust, taken=0.0, **options):
        super().__init__(groups, **options)
        self.trust, self.taken = trust, taken

    @torch.no_grad()
    def step(self):
        given = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        for group, (rate, decay) in zip(self.param_groups, given, strict=True):
            weights, grads = group["params"], [p.grad for p in group["params"]]
            if weights[0].dim() > 1:
                rate = [rate * self._trust(*norms, group) for norms in
                        zip(torch._foreach_norm(weights), torch._foreach_norm(grads), strict=True)]
            if decay:
                torch._foreach_add_(grads, weights, alpha=decay)
            torch._foreach_mul_(grads, rate)
            group["lr"], group["weight_decay"] = 1.0, 0.0  # SGD's own factor is outside of the momentum
        super().step()
        for group, (rate, decay) in zip(self.param_groups, given, strict=True):
            group["lr"], group["weight_decay"] = rate, decay

    def _trust(self, weight, grad, group):
        """λ of a layer with these norms, as a tensor: nothing waits for a GPU."""
        grad, decay = grad * (1 - self.taken**2) ** 0.5, group["weight_decay"] * (1 - self.taken)
        ratio = self.trust * weight / (grad + decay * weight)
        return torch.where((weight > 0) & (grad > 0), ratio, torch.ones_like(ratio))


class RowSGD:
    """SGD with momentum for the active rows of a head: gather, update, scatter, in blocks of rows.

    Lazy: a row that is not active keeps its place, its momentum and its length; its next active step goes on from
    there, as if the steps between had not been. With all rows active in each step the numbers are torch.optim.SGD's.

    Rows in bfloat16 are updated in float32 and rounded to one of their two neighbours at random, so that steps
    smaller than the spacing of bfloat16 are not lost but right on average; their momentum is kept the same way.

    momentum_rows  (S, D) in the rows' own type; (0, D) without momentum
    """

    def __init__(self, head, momentum, weight_decay):
        self.head, self.momentum, self.weight_decay = head, momentum, weight_decay
        self.momentum_rows = torch.zeros_like(head.weight if momentum else head.weight[:0])
        self.param_groups = [{"lr": 0.0}]  # as torch's optimizers have it, for set_lr

    @torch.no_grad()
    def step(self):
        head, lr = self.head, self.param_groups[0]["lr"]
        row_grad = head.row_grad
        self._random = None  # anew each step: the same on all copies of a shard, and after a resume
        size = max(1, _BLOCK_BYTES // (head.weight.shape[1] * head.compute_dtype.itemsize))
        for first in range(0, head.num_active, size):
            block = slice(first, min(first + size, head.num_active))
            grad, ids = row_grad[block], head.active_rows(block)
            if self.weight_decay:
                grad.add_(self._take(head.weight, ids), alpha=self.weight_decay)
            if self.momentum:
                momentum = self._take(self.momentum_rows, ids)
                grad = momentum.mul_(self.momentum).add_(grad)
                self._put(self.momentum_rows, ids, momentum)
            if isinstance(ids, slice) or head.weight.dtype == torch.bfloat16:
                self._put(head.weight, ids, self._take(head.weight, ids).add_(grad, alpha=-lr))
            else:
                head.weight.index_add_(0, ids, grad, alpha=-lr)  # without a copy of the rows

    def _take(self, table, ids):
        """Rows to compute with: a view of the table where that is possible."""
        rows = table[ids] if isinstance(ids, slice) else table.index_select(0, ids)
        return rows.to(self.head.compute_dtype)

    def _put(self, table, ids, rows):
        if table.dtype == torch.bfloat16:
            rows = self._rounded(rows)
        if not isinstance(ids, slice):
            table.index_copy_(0, ids, rows)
        elif table.dtype == torch.bfloat16:
            table[ids] = rows

    def _rounded(self, rows):
        """float32 -> bfloat16, up or down at random so that the mean is the number itself.

        bfloat16 is the upper half of a float32: a random number of 16 bits added to the lower half carries over as
        often as the lower half is large.
        """
        if self._random is None:
            head = self.head
            seed = int(np.random.default_rng([head.seed, head.step, head.shard.first, 16]).integers(2**63))
            self._random = torch.Generator(rows.device).manual_seed(seed)
        noise = torch.randint(2**16, rows.shape, dtype=torch.int32, device=rows.device, generator=self._random)
        bits = rows.view(torch.int32) + noise
        rounded = bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
        return torch.where(rows.isfinite(), rounded, rows.to(torch.bfloat16))  # noise would make a number of a NaN


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
