"""--exchange auto: the exchange with which a step of the backbone takes the least time on these ranks."""

import gc
import statistics
import time
from dataclasses import replace

import torch

from xc.config import FLAGS_OF_EXCHANGES, Config, unused_flags
from xc.gradients import exchanges
from xc.optim.schedule import StepPlan
from xc.run import watchdog

_WARM_UP, _STEPS = 2, 9
_LEAST_GAIN = 0.1  # of the time of the dense exchange: below it, what is sent stays exact


def candidates(cfg):
    """Names of the exchanges that --exchange auto compares. dgc has a momentum of its own, which AdamW cannot use."""
    return ["dense", "powersgd"] + ["dgc"] * (cfg.optimizer != "adamw")


def with_exchange(cfg, name):
    """A Config with this exchange in place of auto, and without what others read."""
    cfg = replace(cfg, exchange=name)
    return replace(cfg, **{flag: getattr(Config, flag) for flag in unused_flags(cfg, "exchange", FLAGS_OF_EXCHANGES)})


def quickest(seconds):
    """The name with the least of {name: seconds of a step}; dense where no other one saves a tenth of its time."""
    best = min(seconds, key=seconds.get)
    return best if seconds[best] < (1 - _LEAST_GAIN) * seconds["dense"] else "dense"


def measured(cfg, names, make_network, input_shape, world):
    """{name: seconds} of a forward pass, a backward pass and the exchange, of each name. Collective.

    make_network  makes a backbone as that of the run

    Random images of input_shape go through a network of its own; nothing of the run is touched. The seconds are the
    median of a few steps, on the slowest rank, so all ranks get the same numbers.
    """
    seconds, on_gpu = {}, [world.device] * (world.device.type == "cuda")
    for name in names:
        with torch.random.fork_rng(on_gpu):  # a network with dropout draws numbers
            seconds[name] = _seconds(with_exchange(cfg, name), make_network, input_shape, world)
        gc.collect()  # hooks of parameters are in cycles, which would keep the network
    return seconds


def _seconds(cfg, make_network, input_shape, world):
    with world.raise_on_all_ranks():
        network = make_network()
        exchange = exchanges.EXCHANGES[cfg.exchange](network, world, cfg)
    plan = StepPlan(cfg.lr, cfg.global_batch, cfg.micro_batches, cfg.density)
    examples = max(1, cfg.global_batch // cfg.micro_batches // world.size)
    images = torch.randn(examples, *input_shape, device=world.device)
    seconds = []
    for _ in range(_WARM_UP + _STEPS):
        watchdog.heartbeat("comparing exchanges")
        world.all_ranks.all_reduce(torch.zeros(1, device=world.device))
        start = time.perf_counter()
        for i in range(cfg.micro_batches):
            features = network(images)
            if i == cfg.micro_batches - 1:
                exchange.before_last_backward(plan)
            features.backward(torch.ones_like(features))
        exchange.reduce()
        exchange.zero_grad()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        seconds.append(time.perf_counter() - start)
    mine = torch.tensor([statistics.median(seconds[_WARM_UP:])], dtype=torch.float64, device=world.device)
    return world.all_ranks.all_reduce(mine, "max").item()
