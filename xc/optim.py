"""Optimizers: torch's SGD for the backbone, our own for the class rows."""

import torch


def backbone_sgd(backbone, cfg):
    """SGD with momentum; biases and norm scales are not decayed."""
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=cfg.lr, momentum=cfg.momentum)


class RowSGD:
    """SGD with momentum for a head's class rows; the same numbers as torch.optim.SGD.

    Works in place: torch's SGD makes a second (S, D) temporary for weight decay.

    momentum_rows  (S, D)
    """

    def __init__(self, head, momentum, weight_decay):
        self.head, self.momentum, self.weight_decay = head, momentum, weight_decay
        self.momentum_rows = torch.zeros_like(head.weight)
        self.param_groups = [{"lr": 0.0}]  # as torch's optimizers have it, for set_lr

    @torch.no_grad()
    def step(self):
        weight, grad = self.head.weight, self.head.row_grad
        if self.weight_decay:
            grad.add_(weight, alpha=self.weight_decay)
        self.momentum_rows.mul_(self.momentum).add_(grad)
        weight.add_(self.momentum_rows, alpha=-self.param_groups[0]["lr"])


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
