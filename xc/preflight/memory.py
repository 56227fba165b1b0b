"""Preflight: whether what a run keeps fits the memory of its ranks."""

from dataclasses import replace

from xc.errors import UserError
from xc.preflight.hosts import by_host
from xc.preflight.memory_plan import ON_HOST, Network, Plan
from xc.preflight.report import of_first, size_text

_FULL = 0.9  # share of the free memory above which others, and what is lost between blocks, decide


def memory(report, cfg, world, facts, examples):
    """Whether what a run keeps fits the memory of the rank that has least; returns the Plan."""
    on_cpu = world.device.type == "cpu"
    seen = of_first(world, lambda: Network.of(cfg, examples.input_shape))
    on_host = min(of_rank["memory"] / len(group) for group in by_host(facts).values() for of_rank in group)
    on_gpu = 0 if on_cpu else min(of_rank["gpu"]["free"] / _sharing(of_rank, facts) for of_rank in facts)

    def planned(cfg, num_ranks):
        return Plan.of(cfg, examples.num_classes, num_ranks, seen, order_bytes=examples.order_bytes,
                       max_accumulation_steps=examples.max_accumulation_steps, on_cpu=on_cpu)

    def load(plan):
        """Shares of the free memory."""
        host = plan.total if on_cpu else sum(plan.parts.get(part, 0) for part in ON_HOST)
        return max(host / on_host, 0 if on_cpu else (plan.total - host) / on_gpu)

    plan = planned(cfg, world.size)
    parts = sorted(plan.parts.items(), key=lambda part: -part[1])
    free = f"{size_text(on_host)} free" + ("" if on_cpu else f" on the host, {size_text(on_gpu)} on the GPU")
    value = (f"{size_text(plan.total)} planned on a rank over the {size_text(facts[0]['taken'])} that it has, {free} ("
             + ", ".join(f"{name} {size_text(size)}" for name, size in parts if size >= 0.01 * plan.total) + ")")
    if load(plan) <= _FULL:
        report("memory", value)
    else:
        remedies = _that_fit(cfg, world.size, lambda *other: load(planned(*other)) <= _FULL)
        remedies += [f"more memory than {size_text(on_host)} for a rank"] * (not remedies)
        report("memory", f"{value}: {'does not fit' if load(plan) > 1 else 'hardly fits'}",
               "wrong" if load(plan) > 1 else "warning", " or ".join(remedies))
    return plan


def _sharing(of_rank, facts):
    """How many ranks have the GPU of this one."""
    return sum((other["host"], other["gpu"]["index"]) == (of_rank["host"], of_rank["gpu"]["index"]) for other in facts)


def _that_fit(cfg, num_ranks, fits):
    """Changes of which each alone makes a plan fit, as text."""
    def will_do(num_ranks=num_ranks, **change):
        try:
            return fits(replace(cfg, **change), num_ranks)
        except UserError:  # that does not go with the other flags
            return False

    found = [flags for flags, change in [
        ("--head-momentum 0", {"head_momentum": 0.0}), ("--row-dtype bfloat16", {"row_dtype": "bfloat16"}),
        ("--head knn --active-classes 0.1", {"head": "knn", "active_classes": 0.1})] if will_do(**change)]
    parts = (cfg.micro_batches * 2**i for i in range(1, 6))
    found += [f"--micro-batches {n}" for n in parts if will_do(micro_batches=n)][:1]
    more = (num_ranks * 2**i for i in range(1, 13))
    one_copy = {"model_parallel_size": 0}
    found += [f"{n} ranks, no more on a host than here" + " and --model-parallel-size 0" * bool(cfg.model_parallel_size)
              for n in more if will_do(n, **one_copy, global_batch=max(cfg.global_batch, n))][:1]
    return found
