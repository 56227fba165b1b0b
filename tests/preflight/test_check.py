"""The doctor: a line for every finding, a remedy and an exit code for faults; no rank waits, and nothing is left."""

import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from tests.support.launch import horovodrun, mpirun, run
from tests.support.worlds import run_ranks
from xc import doctor
from xc.config import Config, UserError, as_arguments, parse
from xc.memory_plan import ON_HOST
from xc.metrics import peak_rss_mb
from xc.world import World

DATA = ["--data", "synth:classes=300,dim=16,test=50", "--feature-dim", 16, "--global-batch", 30]
PLACES = ["ranks", "MPI", "software", "threads", "interfaces", "shared memory", "GPUs", "agreement", "network",
          "clocks"]
OF_A_RUN = ["data", "memory", "run folder", "checkpoints"]


def findings(process):
    """{name: [(state, text), …]} of the table, in its order."""
    found = {}
    for line in process.stdout.splitlines():
        line = re.sub(r"\[\d+,\d+\]<stdout>:", "", line)  # horovodrun writes it in front, at times behind
        state, name, text = line[:8].strip(), line[9:23].strip(), line[24:]
        if state in ("ok", "warning", "wrong"):
            assert text and (state != "warning" or " -> " in text), line
            found.setdefault(name, []).append((state, text))
    return found


def states(report):
    return [(name, state) for state, name, *_ in report.findings]


@pytest.mark.parametrize("arguments", [["--check"], ["--check", "1"], ["--check", "--seed", "0"], ["--check=1"]])
def test_forms_of_the_flag(arguments, tmp_path):
    cfg = parse(arguments)
    assert cfg == Config(check=1)
    (tmp_path / "check.args").write_text(as_arguments(cfg))
    assert parse([f"@{tmp_path / 'check.args'}"]) == cfg
    (tmp_path / "check.args").write_text("--data d --out o\n--check")
    assert parse([f"@{tmp_path / 'check.args'}"]) == Config("d", "o", check=1)


def test_an_installation_alone():
    process = run(sys.executable, "train.py", "--check")
    assert list(findings(process)) == PLACES and {state for (state, _), in findings(process).values()} == {"ok"}
    assert process.stdout.splitlines()[-1] == \
        "0 wrong, 0 with a warning; not looked at: data and memory (--data), run folder (--out)"


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_run_that_will_do(ranks, tmp_path):
    out = tmp_path / "not" / "there" / "run"
    process = mpirun(ranks, "train.py", *DATA, "--out", out, "--check")
    found = findings(process)
    assert list(found) == PLACES + OF_A_RUN and not list(tmp_path.iterdir())
    assert found["ranks"][0][1].startswith(f"{ranks} on ") and "thread level MULTIPLE" in found["MPI"][0][1]
    agreement = "one rank: nothing to agree on" if ranks == 1 else f"MPI and Horovod both sum over {ranks} rank(s)"
    assert found["agreement"] == [("ok", agreement)]
    assert found["data"][0][1].startswith("300 classes, 3,000 + 50 examples (train + test)")
    assert process.stdout.splitlines()[-1].startswith("0 wrong, ")
    out.mkdir(parents=True)
    mpirun(ranks, "train.py", *DATA, "--out", out, "--check", 1)
    assert not list(out.iterdir())


@pytest.mark.mpi
def test_horovodrun_does_not_take_it_for_check_build(tmp_path):
    for form in ["--check", *DATA], ["--check", 1, *DATA], [*DATA, "--check"]:
        found = findings(horovodrun(2, "train.py", *form, "--out", tmp_path / "run"))
        assert set(found) == {*PLACES, *OF_A_RUN} and not list(tmp_path.iterdir())


@pytest.mark.mpi
def test_a_folder_that_holds_a_run(tmp_path):
    run(sys.executable, "train.py", *DATA, "--out", tmp_path / "run", "--steps", 2, "--warmup", 0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = findings(mpirun(2, "train.py", *DATA, "--out", tmp_path / "run", "--check", expect=2))
    assert found["run folder"][0][0] == "wrong" and "already holds a run" in found["run folder"][0][1]
    mpirun(2, "train.py", *DATA, "--out", tmp_path / "run", "--resume", "auto", "--check")
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path != tmp_path / "run"}
    assert after == {path: time for path, time in before.items() if path != tmp_path / "run"}


@pytest.mark.mpi
@pytest.mark.parametrize("arguments, name, text", [
    (["--data", "nowhere"], "data", "nowhere"),
    (["--out", "README.md/run"], "run folder", "README.md is not a folder"),
    (["--out", "README.md"], "run folder", "is not a folder"),
    (["--out", "/proc/run"], "run folder", "cannot be written to"),
    (["--global-batch", 2], "data", "--global-batch 2 is less than the 3 ranks"),
    (["--head", "knnn"], "memory", "--head knnn is not known"),
    (["--backbone", "small"], "memory", "--backbone small takes images"),
])
def test_a_mistake_is_a_line_among_the_others(arguments, name, text, tmp_path):
    process = mpirun(3, "train.py", *DATA, "--out", tmp_path / "run", *arguments, "--check", expect=2)
    found = findings(process)
    assert set(PLACES) <= set(found) and {"data", "run folder"} <= set(found)
    assert [n for n, ((state, _), *_) in found.items() if state == "wrong"] == [name]
    assert text in found[name][0][1] and "1 wrong" in process.stdout.splitlines()[-1]
    assert "Traceback" not in process.stderr and not list(tmp_path.iterdir())


def namespaces():
    """Whether this process may mount for itself, as root may."""
    return bool(shutil.which("unshare")) and not subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode


@pytest.mark.mpi
@pytest.mark.skipif(not namespaces(), reason="needs root, to mount")
def test_a_folder_that_is_not_shared(tmp_path):
    """Rank 1 has another file system there, as on a host of its own."""
    own = [sys.executable, "train.py", *DATA, "--out", tmp_path / "run", "--check"]
    there = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', tmp_path]
    process = run("mpirun", "--oversubscribe", "-np", 1, *own, ":", "-np", 1, *there, *own, expect=2)
    (state, found), = findings(process)["run folder"]
    assert state == "wrong" and "rank 1 does not see what rank 0 writes" in found and "all hosts share" in found
    assert not list(tmp_path.iterdir())


@pytest.mark.mpi
@pytest.mark.skipif(not namespaces(), reason="needs root, to mount")
@pytest.mark.parametrize("options, text", [("ro", "Read-only file system"), ("size=20m", "No space left")])
def test_a_folder_that_takes_nothing(options, text, tmp_path):
    script = f'mount -t tmpfs -o {options} none "$0" && "$@"; code=$?; ls -A "$0" >&2; exit $code'
    process = run("unshare", "-m", "sh", "-c", script, tmp_path, sys.executable, "train.py", *DATA, "--out",
                  tmp_path / "run", "--check", expect=2)
    (state, found), = findings(process)["run folder"]
    assert state == "wrong" and text in found and not process.stderr


@pytest.mark.parametrize("flags", [[], ["--head", "selective"], ["--head-momentum", 0.9, "--row-dtype", "bfloat16"]])
def test_a_plan_that_does_not_fit(flags, tmp_path):
    """3 TiB of class rows: known at once."""
    process = run(sys.executable, "train.py", "--data", "synth:classes=100000000,dim=16,test=0", "--feature-dim", 8192,
                  *flags, "--out", tmp_path / "run", "--check", expect=2)
    (state, text), = findings(process)["memory"]
    assert state == "wrong" and "does not fit" in text and " ranks, no more on a host than here" in text
    assert "class rows" in text and not list(tmp_path.iterdir())


@pytest.mark.mpi
def test_hosts_of_different_sizes():
    def on(hosts, *flags, **options):
        command = []
        for host in hosts:
            command += [":"] * bool(command) + ["-np", 1, "-x", f"XC_HOST={host}", sys.executable]
            command += ["train.py", "--check", *flags]
        return findings(run("mpirun", "--oversubscribe", *command, **options))

    found = on("aab")
    (state, text), = found["ranks"]
    assert state == "warning" and "3 on a (2), b (1)" in text and "as many" in text
    assert len(found["threads"]) == len(found["shared memory"]) == len(found["network"]) == 2
    assert on("aab", "--exchange", "dgc-hier", expect=2)["ranks"][0][0] == "wrong"
    assert on("ab")["ranks"][0][0] == "ok"


def test_other_code_on_one_rank_is_named(monkeypatch):
    here = threading.local()
    monkeypatch.setattr(doctor, "_digest", lambda: "new" if here.rank == 2 else "old")

    def body(world):
        here.rank = world.rank
        report = doctor.Report()
        doctor.software(report, world)
        return report

    for report in run_ranks(3, body):
        (state, _, value, remedy), = report.findings
        assert state == "wrong" and value.endswith("rank 2 has code new, rank 0 old") and remedy
        assert report.conclusion() == (2, "1 wrong, 0 with a warning")


@pytest.mark.parametrize("error", [RuntimeError("out of\nluck"), OSError(5, "Input/output error"), KeyError()])
def test_what_goes_wrong_on_one_rank_is_heard_by_all(error):
    def body(world):
        def look():
            if world.rank == 1:
                raise error
            return world.rank

        with pytest.raises(UserError, match="rank 1: ") as raised:
            doctor.of_all(world, look)
        return str(raised.value), doctor.of_all(world, lambda: world.rank)

    texts, found = zip(*run_ranks(3, body), strict=True)
    assert len(set(texts)) == 1 and "\n" not in texts[0] and found == ([0, 1, 2],) * 3


@pytest.mark.parametrize("ahead", [0.0, 0.5, 1.5, -3600.0])
def test_clocks(ahead):
    import time

    def body(world):
        def clock():
            return time.time() + (ahead if world.rank == 2 else 0.0)

        report = doctor.Report()
        doctor.clocks(report, world, clock)
        return doctor.clock_offsets(world, clock), report

    for offsets, report in run_ranks(3, body):
        assert all(low <= true <= high for (low, high), true in zip(offsets, (0.0, 0.0, ahead), strict=True))
        assert states(report) == [("clocks", "warning" if abs(ahead) > 1.2 else "ok")]
        assert not ahead or report.findings[0][2].startswith("rank 2 ")


def facts_of(**values):
    """As `host_facts` has them, of a rank for which all is well."""
    return {"host": "a", "settings": {}, "cores": [0, 1], "threads": 1, "addresses": [("eth0", "10.0.0.1")],
            "shared_memory": 2**30, "device": "cpu"} | values


@pytest.mark.parametrize("finding, facts, state, text", [
    (doctor.threads, [facts_of(), facts_of()], "ok", "2 of 2 rank(s) on 2 core(s)"),
    (doctor.threads, [facts_of(), facts_of(threads=2)], "warning", "OMP_NUM_THREADS=1"),
    (doctor.threads, [facts_of(cores=[0]), facts_of(cores=[0])], "warning", "binding_policy=none"),
    (doctor.threads, [facts_of(cores=[0]), facts_of(cores=[1])], "ok", ""),
    (doctor.shared_memory, [facts_of(shared_memory=2**23)], "ok", ""),
    (doctor.shared_memory, [facts_of(shared_memory=2**23)] * 2, "warning", "--shm-size"),
    (doctor.interfaces, [facts_of(), facts_of(host="b", addresses=[("eth0", "10.0.0.2")])], "ok", ""),
    (doctor.interfaces, [facts_of(), facts_of(host="b")], "warning", "10.0.0.1 on a, b"),
    (doctor.interfaces, [facts_of(settings={"OMPI_MCA_btl_tcp_if_include": "10.0.0.0/8"})] * 2, "ok", "if_include"),
    (doctor.interfaces, [facts_of(settings={"OMPI_MCA_btl_tcp_if_include": "ib0"})], "wrong", "ib0 is not on a"),
    (doctor.interfaces, [facts_of(settings={"OMPI_MCA_btl_tcp_if_include": "10.1.0.0/16"})], "wrong", "is not on a"),
    (doctor.interfaces, [facts_of(settings={"OMPI_MCA_btl_tcp_if_include": "10.1/x"})], "wrong", "10.1/x"),
])
def test_what_follows_from_facts(finding, facts, state, text):
    report = doctor.Report()
    report.look("interfaces", finding, facts)
    (found, _, value, remedy), = report.findings
    assert found == state and text in value + remedy


def test_gpus():
    """By facts alone: there need not be one here."""
    gpu = {"count": 2, "name": "G", "free": 2**34, "index": 0}
    for num_ranks, state in (1, "warning"), (2, "ok"), (3, "wrong"):
        report = doctor.Report()
        doctor.gpus(report, [facts_of(device="cuda", gpu=gpu)] * num_ranks)
        assert states(report) == [("GPUs", state)]


def test_memory_of_a_cgroup(tmp_path):
    group = tmp_path / "group"
    group.mkdir()

    def left(limit):
        (group / "memory.max").write_text(f"{limit}\n")
        return doctor._left_in(group, "memory.max", "memory.current", "inactive_file")

    (group / "memory.current").write_text("700\n")
    (group / "memory.stat").write_text("anon 600\ninactive_file 40\n")
    assert left(1000) == 340 and left("max") is None
    assert doctor._left_in(tmp_path, "memory.max", "memory.current", "inactive_file") is None
    assert 2**26 < doctor.memory_available() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


EXAMPLES = doctor.Examples(100_000, 10**6, (16,), 0, 1, "")


def planned(cfg, memory, device="cpu", gpu=None):
    """(Plan, state, text) of two ranks of a host with so much memory free."""
    world = World()
    world.size, world.device = 2, torch.device(device)
    report, facts = doctor.Report(), facts_of(memory=memory, taken=0, device=device, gpu=gpu)
    plan = doctor.memory(report, cfg, world, [facts, facts], EXAMPLES)
    (state, _, value, remedy), = report.findings
    return plan, state, f"{value} -> {remedy}"


def test_memory_against_the_plan():
    cfg = Config("d", "o", head_momentum=0.9, feature_dim=1024)
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
    cfg = Config("d", "o")
    gpu = {"count": 1, "name": "G", "free": 2**40, "index": 0}  # for both ranks
    plan, state, _ = planned(cfg, 2**40, "cuda", gpu)
    on_host = sum(plan.parts[part] for part in ON_HOST)
    assert state == "ok" and plan.parts["checkpoint copy"] < on_host < plan.total
    there = plan.total - on_host
    assert planned(cfg, 2.5 * on_host, "cuda", gpu | {"free": 2.5 * there})[1] == "ok"
    assert planned(cfg, 1.5 * on_host, "cuda", gpu)[1] == "wrong"
    assert planned(cfg, 2**40, "cuda", gpu | {"free": 1.5 * there})[1] == "wrong"


def test_a_plan_allocates_nothing():
    """The rows alone would be 48 GiB."""
    before = peak_rss_mb()
    cfg = Config("synth:classes=100000000,dim=128", check=1)
    world, report = World(), doctor.Report()
    facts = doctor.host_facts(report, world)
    plan = doctor.memory(report, cfg, world, facts, doctor.data_set(report, cfg, world))
    assert plan.parts["class rows"] == 100_000_000 * 128 * torch.float32.itemsize and peak_rss_mb() - before < 300
