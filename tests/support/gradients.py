"""A small network and its gradients on every rank."""

import torch

from xc.comm.world import World
from xc.model import backbone as backbones
from xc.optim.schedule import StepPlan

# outside of the threads, which share torch's random generator; without its norm, which has sums of its own
NET = backbones.build("small", (1, 16, 16), 8, 1, World())[0]


def now(density=1.0):
    return StepPlan(0.1, 2, 1, density)


def give(net, exchange, seed, scale=1.0, density=1.0, passes=1):
    """One step's gradients, of random images, summed over `passes` backward passes."""
    for i in range(passes):
        if exchange and i == passes - 1:
            exchange.before_last_backward(now(density))
        images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(seed * 10 + i))
        (net(images) * scale).square().sum().backward()


def matrices(net):
    """Its parameters that an exchange may compress, by name."""
    return {name: p for name, p in net.named_parameters() if p.dim() > 1}
