"""Prints a plan: tables for people, then one line of JSON."""

import json

from xc.comm.launch import launched_rank
from xc.errors import UserError
from xc.gradients.choice import candidates, quickest, with_exchange
from xc.plan.cluster import Cluster
from xc.plan.plan import Data, Plan, remedies
from xc.plan.sent import PATHS

_SMALL = 0.005  # share of the whole below which a part has no line of its own


def show(cfg):
    """Print the plan of a Config with --plan. UserError where it is launched on several ranks, or cannot be."""
    if launched_rank() is not None:
        raise UserError("--plan is one process, for a cluster that need not be there: give it without mpirun, srun or "
                        "horovodrun")
    cluster = Cluster.parse(cfg.plan)
    data = Data.of(cfg, cluster)
    taken = ""
    if cfg.exchange == "auto":
        cfg = with_exchange(cfg, quickest(_backbone_seconds(cfg, cluster, data)))
        taken = f"--exchange auto would take {cfg.exchange}"
    plan = Plan.of(cfg, cluster, data)
    others = remedies(plan, data)
    print("\n".join([taken] * bool(taken) + [*_lines(plan, data, others)]))
    print(json.dumps(_as_json(plan, others)))


def _backbone_seconds(cfg, cluster, data):
    """{name: seconds} of the backbone's part of a step, of the exchanges that --exchange auto compares."""
    seconds = {}
    for name in candidates(cfg):
        try:
            step = Plan.of(with_exchange(cfg, name), cluster, data).times.step
        except UserError:  # the run is shorter than its warm-up
            continue
        seconds[name] = sum(time for phase, time in step.items() if "backbone" in phase)
    return seconds


def _lines(plan, data, others):
    cluster, work, cfg = plan.cluster, plan.work, plan.cfg
    kind = "processes on CPUs" if work.on_cpu else "GPUs"
    yield f"{cluster.ranks:,} {kind}, {min(cluster.ranks, cluster.ranks_per_host)} a host"
    yield (f"{data.num_classes:,} classes x {cfg.feature_dim} in {cfg.row_dtype}, {work.num_rows:,} a rank; --head "
           f"{cfg.head}, {work.quota * work.num_shards:,} active; {cfg.global_batch:,} examples a step, "
           f"{work.examples * cfg.micro_batches:,} a rank")
    yield ""
    yield from _table("memory of a rank", "GiB", plan.memory.parts, 2**30)
    yield (f"{'':2}at one time {plan.rank_memory / 2**30:.2f} of {cluster.memory / 2**30:.2f} GiB"
           + ("" if work.on_cpu else f" on the GPU and {plan.memory.on_host / 2**30:.2f} GiB on the host")
           + ("" if plan.fits else ": DOES NOT FIT with a tenth to spare")
           + f"; a checkpoint has {plan.memory.on_disk / 2**30:.1f} GiB")
    yield ""
    by_path = {PATHS[path]: sent for path, sent in plan.sent.by_path.items()}
    yield from _table("sent by a rank in a step", "MiB", by_path, 2**20)
    yield ""
    yield from _table("time of a step", "ms", plan.times.step, 1e-3)
    if plan.times.build:
        yield ""
        yield from _table("time of a build of the graph", "s", plan.times.build, 1)
    yield ""
    yield (f"{plan.schedule.length:,} steps of {1e3 * plan.step_seconds:.1f} ms and {plan.builds} builds of the graph: "
           f"{_duration(plan.run_seconds)}, without evaluations and checkpoints; "
           f"{cfg.global_batch / plan.step_seconds:,.0f} examples/s")
    yield f"{plan.limit} takes most of a step, {plan.times.step[plan.limit] / plan.step_seconds:.0%}"
    for flags, other in others:
        yield (f"  {flags}: {1e3 * other.step_seconds:.1f} ms, {other.rank_memory / 2**30:.2f} GiB"
               + " (does not fit)" * (not other.fits))
    if not others:
        yield "  no other setting that the plan tried makes a step shorter by 3 %"


def _table(title, unit, parts, scale):
    total = sum(parts.values())
    yield f"{title:40}{unit:>10}"
    for name, size in sorted(parts.items(), key=lambda part: -part[1]):
        if size >= _SMALL * total:
            yield f"  {name:38}{size / scale:10,.2f}"
    if rest := [size for size in parts.values() if 0 < size < _SMALL * total]:
        yield f"  {f'{len(rest)} smaller':38}{sum(rest) / scale:10,.2f}"
    yield f"  {'sum':38}{total / scale:10,.2f}"


def _duration(seconds):
    for unit, length in ("days", 86400), ("hours", 3600), ("minutes", 60):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _as_json(plan, others):
    return {"ranks": plan.cluster.ranks, "classes": plan.work.num_classes, "rows_per_rank": plan.work.num_rows,
            "active": plan.work.quota * plan.work.num_shards, "exchange": plan.cfg.exchange, "fits": plan.fits,
            "rank_bytes": plan.rank_memory,
            "memory_bytes": plan.memory.parts, "checkpoint_bytes": plan.memory.on_disk,
            "sent_bytes": plan.sent.by_path, "collectives": plan.sent.calls,
            "step_seconds": plan.step_seconds, "phases": plan.times.step, "limit": plan.limit,
            "build_seconds": plan.build_seconds, "build_phases": plan.times.build, "builds": plan.builds,
            "steps": plan.schedule.length, "run_seconds": plan.run_seconds,
            "remedies": {flags: {"step_seconds": other.step_seconds, "rank_bytes": other.rank_memory,
                                 "fits": other.fits} for flags, other in others}}
