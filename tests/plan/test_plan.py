"""The plan of a run on a cluster that is not there: its facts, its laws, what it prints."""

import json
from dataclasses import replace

import pytest

from tests.support.launch import run
from xc.config import Config, parse
from xc.errors import UserError
from xc.plan import show
from xc.plan.cluster import Cluster
from xc.plan.plan import Data, Plan, remedies

FACTS = "ranks=8,ranks-per-host=4,memory=16GB,network=10gbit,flops=1e13,bandwidth=5e11"
DATA = Data(200_000, 4_000_000, (64,))


def cluster(**changes):
    return replace(Cluster.parse(FACTS), **changes)


def config(**settings):
    return Config(plan=FACTS, **{"head": "knn", "global_batch": 1024} | settings)


def planned(cfg=None, **changes):
    return Plan.of(cfg or config(), cluster(**changes), DATA)


def test_facts_in_units():
    found = Cluster.parse("ranks=6, ranks-per-host=3,memory=80GB,network=100gbit,flops=300e12,bandwidth=2TB/s")
    assert (found.ranks, found.num_hosts, found.memory, found.network) == (6, 2, 80e9, 12.5e9)
    assert (found.flops, found.bandwidth, found.latency) == (3e14, 2e12, 20e-6)
    assert found.sending_rate(on_cpu=True) == 12.5e9 / 3 and found.sending_rate(on_cpu=False) == 12.5e9
    one_host = replace(found, ranks=3)
    assert one_host.sending_rate(on_cpu=False) == 4e11 and replace(one_host, local=1e9).sending_rate(True) == 1e9
    for text, name, value in [("memory=1.5GiB", "memory", 1.5 * 2**30), ("network=1e9", "network", 1.25e8),
                              ("local=8e9", "local", 1e9), ("flops32=2e12", "flops32", 2e12),
                              ("network=12.5GB", "network", 12.5e9), ("flops=3Tflops", "flops", 3e12)]:
        others = [pair for pair in FACTS.split(",") if not pair.startswith(name)]
        assert getattr(Cluster.parse(",".join([*others, text])), name) == value


@pytest.mark.parametrize("facts, text", [
    ("ranks=8", "--plan lacks ranks-per-host, on a host: add it, as ranks-per-host=8"),
    (FACTS.replace("network=10gbit,", ""), "lacks network, of a host's link a second, each way: add it"),
    (FACTS + ",speed=3", "'speed' is not known: give key=value of ranks, ranks-per-host,"),
    (FACTS + ",ranks=9", "ranks is given twice"), (FACTS.replace("ranks=8", "ranks=2.5"), "ranks=2.5 is not allowed"),
    (FACTS.replace("16GB", "16GX"), "memory=16GX is not allowed: give a number (B), as memory=80GB"),
    (FACTS.replace("16GB", "16gbit"), "memory=16gbit is not allowed"), (FACTS.replace("1e13", "0"), "flops=0"),
    (FACTS.replace("1e13", "1.2.3"), "flops=1.2.3"), (FACTS.replace("1e13", "1e99"), "flops=1e99"),
    (FACTS.replace("ranks=8", "ranks=6"), "ranks=6 is not a multiple of ranks-per-host=4"), ("", "'' is not known"),
])
def test_a_wrong_fact_is_one_line(facts, text):
    with pytest.raises(UserError) as error:
        Cluster.parse(facts)
    assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [
    {"head": "full"}, {"head": "sampled"}, {"head": "selective"}, {}, {"select": "labels"}, {"micro_batches": 4},
    {"model_parallel_size": 2}, {"row_dtype": "bfloat16", "head_momentum": 0.9}, {"device": "cpu"},
    {"optimizer": "sgd", "lr": 0.1, "head_lr_scale": 1.0, "exchange": "dgc-hier"}])
def test_more_of_anything_is_never_slower(settings):
    plan = planned(config(**settings))
    assert min(plan.times.step.values()) >= 0 and plan.run_seconds >= plan.schedule.length * plan.step_seconds > 0
    for fact in "network", "flops", "bandwidth":
        other = planned(config(**settings), **{fact: 2 * getattr(plan.cluster, fact)})
        assert other.step_seconds <= plan.step_seconds and other.build_seconds <= plan.build_seconds
    assert planned(config(**settings), latency=1.0).step_seconds > 2
    assert planned(config(**settings), ranks=16).memory.parts["class rows"] <= plan.memory.parts["class rows"]


def test_what_hides_under_computation():
    """Features of all micro-batches but one; nothing of the network where it is infinitely fast."""
    alone, split = planned(network=1e8), planned(config(micro_batches=4), network=1e8)
    assert split.times.step["network, features"] < alone.times.step["network, features"]
    fast = planned(network=1e18, latency=1e-12)
    assert sum(seconds for phase, seconds in fast.times.step.items() if "network" in phase) < 1e-6


def test_builds_are_those_of_the_run():
    for every, builds, late in ("1epochs", 9, 8), ("2.5epochs", 3, 3), ("10epochs", 0, 1), ("0.5epochs", 19, 15):
        assert planned(config(graph_every=every, graph_from="0")).builds == builds
        assert planned(config(graph_every=every)).builds == late
    assert planned(config(head="full")).builds == 0


def test_what_does_not_fit_has_a_remedy():
    big = Data(30_000_000, 100_000_000, (64,))
    plan = Plan.of(config(head="full", feature_dim=512, global_batch=4096), cluster(), big)
    assert not plan.fits
    found = remedies(plan, big)
    assert found[0][1].fits and "--head knn --active-classes 0.01" in [flags for flags, other in found if other.fits]
    assert all(other.fits or other.step_seconds < plan.step_seconds for _, other in found)
    assert remedies(found[0][1], big) == [] or remedies(found[0][1], big)[0][1].step_seconds < found[0][1].step_seconds


def test_a_remedy_is_flags_that_go_with_the_others():
    """DGC cannot go with AdamW, the default."""
    cfg = config(backbone="resnet18", feature_dim=32, global_batch=16, head="full")
    few = Data(100, 10_000, (3, 16, 16))
    plan = Plan.of(cfg, cluster(network=1e6), few)
    flags = [flags for flags, _ in remedies(plan, few)]
    assert "@recipes/sgd.args --exchange dgc" in flags and "--exchange dgc" not in flags
    sgd = replace(cfg, optimizer="sgd", lr=0.1, head_lr_scale=1.0)
    assert "--exchange dgc" in [flags for flags, _ in remedies(Plan.of(sgd, plan.cluster, few), few)]


@pytest.mark.parametrize("settings, text", [
    ({"model_parallel_size": 3}, "--model-parallel-size 3 does not divide ranks=8"),
    ({"global_batch": 4}, "--global-batch 4 is less than the 8 ranks"),
    ({"active_classes": 300_000.0}, "more than the 200000 classes"),
])
def test_settings_that_do_not_fit_are_one_line(settings, text):
    with pytest.raises(UserError) as error:
        planned(config(**settings))
    assert text in str(error.value)


@pytest.mark.parametrize("facts, data, text", [
    (FACTS, "", "--plan lacks classes of the data"), (FACTS + ",classes=10", "", "--plan lacks examples of the data"),
    (FACTS + ",classes=10,examples=10", "synth:classes=10", "which --data synth:classes=10 has: leave one out")])
def test_the_data_are_given_once(facts, data, text):
    with pytest.raises(UserError) as error:
        Data.of(Config(data=data, plan=facts), Cluster.parse(facts))
    assert text in str(error.value)


def test_no_launcher(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    with pytest.raises(UserError, match="without mpirun"):
        show.show(Config(plan=FACTS))


def test_the_command_prints_tables_and_json():
    flags = ["--head", "knn", "--global-batch", "512", "--backbone", "resnet18"]
    done = run("python", "train.py", "--plan", f"{FACTS},classes=1000000,examples=20000000", *flags)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["step_seconds"] == pytest.approx(sum(result["phases"].values())) and result["fits"]
    assert result["active"] == 100_000 and result["rows_per_rank"] == 125_000 and result["limit"] in done.stdout
    for title in "memory of a rank", "sent by a rank in a step", "time of a step", "time of a build of the graph":
        assert title in done.stdout


def test_the_flag_needs_neither_data_nor_out():
    assert parse(["--plan", FACTS]).plan == FACTS
