"""Preflight: whether the run fits the memory of its ranks."""

from dataclasses import replace

from xc.errors import UserError
from xc.gradients.choice import candidates, with_exchange
from xc.plan.backbone_size import BackboneSize
from xc.plan.memory import MAX_LOAD, MemoryPlan
from xc.plan.remedies import flags_of, in_micro_batches, saving_memory
from xc.plan.workload import Workload
from xc.preflight.hosts import by_host
from xc.preflight.report import on_rank_0, size_text


def report_memory(report, cfg, world, facts, examples):
    """Compare the plan with the memory of the rank that has least free. Returns the MemoryPlan. Collective."""
    on_cpu = world.device.type == "cpu"
    backbone = on_rank_0(world, lambda: BackboneSize.of(cfg, examples.input_shape, world.size))
    host_free = min(one["memory"] / len(on_host) for on_host in by_host(facts).values() for one in on_host)
    gpu_free = 0 if on_cpu else min(one["gpu"]["free"] / _num_sharing_gpu(one, facts) for one in facts)

    def planned(cfg, num_ranks):
        if cfg.exchange == "auto":
            plans = [planned(with_exchange(cfg, name), num_ranks) for name in candidates(cfg)]
            return max(plans, key=lambda plan: plan.total)
        work = Workload.of(cfg, examples.num_classes, num_ranks, on_cpu)
        return MemoryPlan.of(work, backbone, order_bytes=examples.order_bytes,
                             max_accumulation_steps=examples.max_accumulation_steps)

    def load(plan):
        """The share of the free memory that it takes, on the host or on the GPU, whichever is more."""
        return plan.total / host_free if on_cpu else max(plan.on_host / host_free, plan.on_gpu / gpu_free)

    plan = planned(cfg, world.size)
    parts = sorted(plan.parts.items(), key=lambda part: -part[1])
    free = f"{size_text(host_free)} free" + ("" if on_cpu else f" on the host, {size_text(gpu_free)} on the GPU")
    needed = size_text(plan.total) if on_cpu else f"{size_text(plan.on_host)} + {size_text(plan.on_gpu)}"
    value = (f"a rank needs at most {needed} more than its {size_text(facts[0]['taken'])} now, {free} ("
             + ", ".join(f"{name} {size_text(size)}" for name, size in parts if size >= 0.01 * plan.total) + ")")
    if load(plan) <= MAX_LOAD:
        report.add("memory", value)
    else:
        remedies = _remedies(cfg, world.size, lambda *changed: load(planned(*changed)) <= MAX_LOAD)
        remedies += [f"more than {size_text(host_free)} of memory for each rank"] * (not remedies)
        report.add("memory", f"{value}: {'does not fit' if load(plan) > 1 else 'leaves less than 10 % free'}",
                   "wrong" if load(plan) > 1 else "warning", " or ".join(remedies))
    return plan


def _num_sharing_gpu(rank_facts, facts):
    """How many ranks use the same GPU as this one."""
    gpu = rank_facts["host"], rank_facts["gpu"]["index"]
    return sum((other["host"], other["gpu"]["index"]) == gpu for other in facts)


def _remedies(cfg, num_ranks, fits):
    """Texts of changes, each of which alone makes the plan fit. fits: (Config, number of ranks) -> whether it fits."""
    def helps(num_ranks=num_ranks, **change):
        try:
            return fits(replace(cfg, **change), num_ranks)
        except UserError:  # the change contradicts other flags
            return False

    found = [flags_of(change) for change in saving_memory(cfg) if helps(**change)]
    found += [flags_of(change) for change in in_micro_batches(cfg, 5) if helps(**change)][:1]
    more = (num_ranks * 2**i for i in range(1, 13))
    one_copy = {"model_parallel_size": 0}
    found += [f"{n} ranks, with no more on a host than now"
              + " and --model-parallel-size 0" * bool(cfg.model_parallel_size)
              for n in more if helps(n, **one_copy, global_batch=max(cfg.global_batch, n))][:1]
    return found
