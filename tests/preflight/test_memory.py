"""The preflight check of memory: what is free against the plan, and what to change where that does not fit."""

import os
from dataclasses import replace

import torch

from tests.support.facts import facts_of
from xc.comm.world import World
from xc.config import Config
from xc.preflight import hosts, storage
from xc.preflight.memory import report_memory
from xc.preflight.report import Report
from xc.run.metrics import peak_rss_mb


def test_memory_of_a_cgroup(tmp_path):
    group = tmp_path / "group"
    group.mkdir()

    def left(limit):
        (group / "memory.max").write_text(f"{limit}\n")
        return hosts._free_in_cgroup(group, "memory.max", "memory.current", "inactive_file")

    (group / "memory.current").write_text("700\n")
    (group / "memory.stat").write_text("anon 600\ninactive_file 40\n")
    assert left(1000) == 340 and left("max") is None
    assert hosts._free_in_cgroup(tmp_path, "memory.max", "memory.current", "inactive_file") is None
    assert 2**26 < hosts.memory_available() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


EXAMPLES = storage.Examples(100_000, 10**6, (16,), 0, 1, "")


def planned(cfg, memory, device="cpu", gpu=None):
    """(MemoryPlan, state, text) of two ranks of a host with so much memory free."""
    world = World()
    world.size, world.device = 2, torch.device(device)
    report, facts = Report(), facts_of(memory=memory, taken=0, device=device, gpu=gpu)
    plan = report_memory(report, cfg, world, [facts, facts], EXAMPLES)
    (state, _, value, remedy), = report.findings
    return plan, state, f"{value} -> {remedy}"


def test_memory_against_the_plan():
    cfg = Config(data="d", out="o", head_momentum=0.9, feature_dim=1024)
    plan, state, text = planned(cfg, 2**50)
    assert state == "ok" and all(size < 0.01 * plan.total or name in text for name, size in plan.parts.items())
    assert planned(cfg, 2 * plan.total / 0.95)[1] == "warning"
    # what is proposed does fit, and what is not does not
    proposed = {"--head-momentum 0": {"head_momentum": 0.0}, "--row-dtype bfloat16": {"row_dtype": "bfloat16"},
                "--head knn --active-classes 0.1": {"head": "knn", "active_classes": 0.1},
                "--micro-batches 2": {"micro_batches": 2}}
    seen = set()
    for share in 0.95, 0.8, 0.6, 0.3:
        memory = share * 2 * plan.total
        _, state, text = planned(cfg, memory)
        assert state == "wrong" and "does not fit" in text
        for flags, change in proposed.items():
            fits = planned(replace(cfg, **change), memory)[1] == "ok"
            assert fits == (flags in text), (share, flags)
            seen.add((flags, fits))
    assert {fits for flags, fits in seen if "momentum" in flags} == {True, False}


def test_memory_of_a_gpu_is_not_the_hosts():
    cfg = Config(data="d", out="o")
    gpu = {"count": 1, "name": "G", "free": 2**40, "index": 0}  # for both ranks
    plan, state, _ = planned(cfg, 2**40, "cuda", gpu)
    on_host, there = plan.on_host, plan.on_gpu
    assert state == "ok" and plan.parts["checkpoint copy"] < on_host < plan.total == on_host + there
    assert planned(cfg, 2.5 * on_host, "cuda", gpu | {"free": 2.5 * there})[1] == "ok"
    assert planned(cfg, 1.5 * on_host, "cuda", gpu)[1] == "wrong"
    assert planned(cfg, 2**40, "cuda", gpu | {"free": 1.5 * there})[1] == "wrong"


def test_a_plan_allocates_nothing():
    """The rows alone would be 48 GiB."""
    before = peak_rss_mb()
    cfg = Config("synth:classes=100000000,dim=128", check=1)
    world, report = World(), Report()
    facts = hosts.host_facts(report, world)
    plan = report_memory(report, cfg, world, facts, storage.report_data(report, cfg, world))
    assert plan.parts["class rows"] == 100_000_000 * 128 * torch.float32.itemsize and peak_rss_mb() - before < 300
