"""Optimizers: torch's SGD and AdamW, and LARS, for the backbone, RowSGD for the class rows."""

import numpy as np
import torch

from xc.optim.add_rows import add_rows

_BLOCK_BYTES = 2**22  # rows that are gathered at a time
_LARS_TRUST = 0.001  # length of a layer's step at learning rate 1, as a share of its weights' (You et al. 2017)


def backbone_optimizer(backbone, cfg, keeps_momentum=False):
    """SGD or LARS with momentum, or AdamW, for a Config, of the parameters that are trained. Biases and norm scales
    have no weight decay.

    keeps_momentum  the gradient exchange applies the momentum of tensors with two or more dimensions. This optimizer
                    then has none for them, and their weight decay is 1/(1 - momentum) times stronger, since momentum
                    would have summed it up.
    """
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    matrices = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": cfg.weight_decay}
    others = {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}
    if keeps_momentum:
        matrices |= {"momentum": 0.0, "weight_decay": cfg.weight_decay / (1 - cfg.momentum)}
    groups = [g for g in (matrices, others) if g["params"]]
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, cfg.lr, betas=(cfg.momentum, 0.999), fused=True)
    options = {"lr": cfg.lr, "momentum": cfg.momentum, "fused": True}
    if cfg.optimizer == "lars":
        return Lars(groups, cfg.momentum if keeps_momentum else 0.0, **options)
    return torch.optim.SGD(groups, **options)


class Lars(torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You et al. 2017): every layer moves in proportion to the length of its weights.

        λ = trust |w| / (|g| + β |w|)     v ← m v + γ λ (g + β w)     w ← w - v

    γ is the learning rate, m the momentum, β the weight decay, trust 0.001. λ = 1 for tensors of fewer than two
    dimensions, and where w or g is 0.

    exchange_momentum: m where the gradient exchange applies the momentum, else 0. Gradients then arrive summed up, so
    λ uses their norm times sqrt(1 - m²), which is the norm of one gradient if gradients are mostly noise, and β times
    1 - m (ours). Layers move about as far as without such an exchange, and less far where gradients stay the same for
    long.
    """

    def __init__(self, groups, exchange_momentum=0.0, **options):
        super().__init__(groups, **options)
        self.exchange_momentum, self.trust = exchange_momentum, _LARS_TRUST

    @torch.no_grad()
    def step(self):
        """Update the weights from their gradients, which it overwrites."""
        given = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        for group, (rate, decay) in zip(self.param_groups, given, strict=True):
            weights, grads = group["params"], [p.grad for p in group["params"]]
            if weights[0].dim() > 1:
                rate = [rate * self._trust(*norms, group) for norms in
                        zip(torch._foreach_norm(weights), torch._foreach_norm(grads), strict=True)]
            if decay:
                torch._foreach_add_(grads, weights, alpha=decay)
            torch._foreach_mul_(grads, rate)
            group["lr"], group["weight_decay"] = 1.0, 0.0  # SGD would apply its rate outside of the momentum
        super().step()
        for group, (rate, decay) in zip(self.param_groups, given, strict=True):
            group["lr"], group["weight_decay"] = rate, decay

    def _trust(self, weight, grad, group):
        """λ of a layer with these norms, as a tensor, so that nothing waits for a GPU."""
        momentum = self.exchange_momentum
        grad, decay = grad * (1 - momentum**2) ** 0.5, group["weight_decay"] * (1 - momentum)
        ratio = self.trust * weight / (grad + decay * weight)
        return torch.where((weight > 0) & (grad > 0), ratio, torch.ones_like(ratio))


class RowSGD:
    """SGD with momentum for the active rows of a head: gather, update and scatter, in blocks of rows.

    An inactive row and its momentum do not change; its next active step continues from there. With all rows active in
    every step the numbers are those of torch.optim.SGD.

    Rows in bfloat16 are updated in float32 and then rounded up or down at random, so that steps smaller than the
    spacing of bfloat16 are right on average. Their momentum is rounded in the same way.

    momentum_rows  (S, D) in the dtype of the rows; (0, D) without momentum
    before_update  called with the rows, a slice or local ids, that are about to change; None: nothing is called
    """

    def __init__(self, head, momentum=0.0):
        self.head, self.momentum = head, momentum
        self.momentum_rows = torch.zeros_like(head.weight if momentum else head.weight[:0])
        self.param_groups = [{"lr": 0.0}]  # as in torch's optimizers, for set_lr
        self.before_update = None

    @torch.no_grad()
    def step(self):
        """Update the active rows of the head from head.row_grad (A, D)."""
        head, lr = self.head, self.param_groups[0]["lr"]
        row_grad = head.row_grad
        self._random = None  # a new generator each step: the same on all replicas of a shard, and after a resume
        size = max(1, _BLOCK_BYTES // (head.weight.shape[1] * head.compute_dtype.itemsize))
        for first in range(0, head.num_active, size):
            block = slice(first, min(first + size, head.num_active))
            grad, ids = row_grad[block], head.active_rows(block)
            if self.before_update:
                self.before_update(ids)
            if self.momentum:
                momentum = self._take(self.momentum_rows, ids)
                grad = momentum.mul_(self.momentum).add_(grad)
                self._put(self.momentum_rows, ids, momentum)
            if isinstance(ids, slice) or head.weight.dtype == torch.bfloat16:
                self._put(head.weight, ids, self._take(head.weight, ids).add_(grad, alpha=-lr))
            else:
                add_rows(head.weight, ids, grad * -lr)  # needs no copy of the rows

    def _take(self, table, ids):
        """Rows of a table to compute with: a view where that is possible, else a copy."""
        rows = table[ids] if isinstance(ids, slice) else table.index_select(0, ids)
        return rows.to(self.head.compute_dtype)

    def _put(self, table, ids, rows):
        """Write back rows of `_take`; a float32 view is up to date already."""
        if table.dtype == torch.bfloat16:
            rows = self._rounded(rows)
        if not isinstance(ids, slice):
            table.index_copy_(0, ids, rows)
        elif table.dtype == torch.bfloat16:
            table[ids] = rows

    def _rounded(self, rows):
        """float32 -> bfloat16, rounded up or down at random; the mean is the number itself.

        bfloat16 is the upper half of a float32. A random number of 16 bits added to the lower half carries over with
        a probability in proportion to the lower half.
        """
        if self._random is None:
            head = self.head
            seed = int(np.random.default_rng([head.seed, head.step, head.shard.first, 16]).integers(2**63))
            self._random = torch.Generator(rows.device).manual_seed(seed)
        noise = torch.randint(2**16, rows.shape, dtype=torch.int32, device=rows.device, generator=self._random)
        bits = rows.view(torch.int32) + noise
        rounded = bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
        return torch.where(rows.isfinite(), rounded, rows.to(torch.bfloat16))  # noise would turn a NaN into a number


def set_lr(optimizer, lr):
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
