"""The Slurm templates on a real Slurm of two nodes: whatever befalls a run, it completes or ends for good."""

import fcntl
import functools
import json
import os
import re
import shlex
import shutil
import signal
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.support.checkout import copy_checkout
from tests.support.launch import losses, mpirun
from tests.support.slurm_cluster import Cluster, missing
from tests.support.training import SYNTH
from xc.data.pack import open_splits

pytestmark = [pytest.mark.mpi, pytest.mark.long, pytest.mark.timeout(900)]
FLAGS = [*SYNTH[1:], "--eval-every", 0]
ONE_NODE, TWO_NODES = ["-N", 1, "-n", 2], ["-N", 2]
ENDLESS = 10**6


@pytest.fixture(scope="module")
def one_cluster(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    checkout = copy_checkout(tmp_path_factory.mktemp("slurm") / "checkout")
    with Cluster(checkout) as cluster:
        yield cluster


@pytest.fixture
def cluster(one_cluster, monkeypatch):
    """A cluster without jobs. They run in a copy of the checkout, so that nothing of theirs is left in this one."""
    monkeypatch.setenv("XC_CHECK", "0")  # it has a test of its own, and is one more launch
    yield one_cluster
    one_cluster.cancel_all()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """unbroken(steps): losses of a run of two ranks that nothing happened to."""
    @functools.cache
    def of(steps):
        out = tmp_path_factory.mktemp("unbroken") / "run"
        mpirun(2, *SYNTH, "--eval-every", 0, "--steps", steps, "--out", out)
        return losses(out)

    return of


def ended(cluster, number, state="COMPLETED", code="0:0", restarts=0, seconds=150):
    """Waits for the end of a job of one record and looks at it; nothing of the job is left running."""
    (job,) = cluster.wait(number, seconds)
    log = read_log(cluster, job)
    # Now and then a rank of srun dies inside MPI at its start, where two nodes share a host. The job mends that itself.
    crashes = log.count("exit code 139, back into the queue")
    assert crashes <= 1, log
    assert (job["JobState"], job["ExitCode"], int(job["Restarts"]) - crashes) == (state, code, restarts), log
    until(lambda: not cluster.processes(number), f"processes of the ended job: {cluster.processes(number)}", seconds=15)
    return log


def read_log(cluster, job):
    path = Path(job["StdOut"])
    return path.read_text() if path.exists() else "(no log)"


def until(true, text, seconds=100):
    deadline = time.monotonic() + seconds
    while not (result := true()):
        assert time.monotonic() < deadline, f"not in {seconds} s: {text}"
        time.sleep(0.05)
    return result


def steps_of(out):
    return max(losses(out), default=0) if (out / "metrics.jsonl").exists() else 0


def launches(out):
    """How often the run has been started."""
    return len((out / "launches.jsonl").read_text().splitlines())


def ranks(cluster, number):
    """Process numbers of a job's ranks, which train."""
    return sorted(pid for pid, command in cluster.processes(number).items() if command.startswith("python train.py"))


def put_to_sleep(cluster, number):
    """The two ranks of a job; their process numbers."""
    pids = ranks(cluster, number)
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids


def end_in(cluster, number, seconds):
    """Move a job's time limit; when it then ends. Slurm's shortest one is a minute from the start."""
    end = datetime.now() + timedelta(seconds=seconds)
    cluster.run("scontrol", "update", f"jobid={number}", f"endtime={end:%FT%T}")
    return end


def requeued(cluster, number, times):
    until(lambda: int(cluster.jobs(number)[0]["Restarts"]) >= times, f"restart {times} of {cluster.jobs(number)}")


@pytest.mark.parametrize("launcher, nodes", [("srun", TWO_NODES), ("mpirun", TWO_NODES), ("horovodrun", ONE_NODE)])
def test_a_run_comes_through_whatever_befalls_it(launcher, nodes, cluster, unbroken, tmp_path):
    """Told to stop, it saves and goes on from there; a killed rank, and ranks that do not answer before the job's end,
    cost the steps since the last checkpoint. What comes of it is an unbroken run."""
    out, flags = tmp_path / "run", tmp_path / "run.args"
    flags.write_text(f"--steps {ENDLESS}\n")
    number = cluster.submit(*nodes, "slurm/train.sbatch", *FLAGS, "--save-every", "50steps", "--out", out, f"@{flags}",
                            env={"XC_LAUNCHER": launcher})
    until(lambda: steps_of(out) > 3, "first steps")
    cluster.run("scancel", "--signal=USR1", "--batch", number)
    requeued(cluster, number, 1)
    first = steps_of(out)

    until(lambda: steps_of(out) > first + 60, "steps of the second start, and a checkpoint")
    os.kill(ranks(cluster, number)[1], signal.SIGKILL)
    requeued(cluster, number, 2)

    until(lambda: len(ranks(cluster, number)) == 2 and launches(out) == 3, "the third start")
    put_to_sleep(cluster, number)  # as in a step of minutes
    end = end_in(cluster, number, 40)
    cluster.run("scancel", "--signal=USR1", "--batch", number)
    requeued(cluster, number, 3)
    assert datetime.now() < end
    # The limit stays with the job, and is shorter than the lead of the signal, which would come at any moment.
    cluster.run("scontrol", "update", f"jobid={number}", "timelimit=10")
    last = steps_of(out) + 3
    flags.write_text(f"--steps {last}\n")

    log = ended(cluster, number, restarts=3)
    assert f"2 ranks on {'n[1-2]' if nodes == TWO_NODES else 'n'}" in log and f"by {launcher}," in log
    assert f"exit code 75, back into the queue; goes on from: {out}/checkpoints/step-{first:08d}" in log
    assert "exit code 137, back into the queue; goes on from: " in log
    assert log.count("the job ends before the ranks do, what is not saved is lost, back into the queue") == 1
    assert losses(out) == unbroken(last)
    assert launches(out) == 4
    # One log of rank 0, and of every rank its own.
    logs = cluster.checkout / f"slurm/logs/train-{number}"
    own = (logs / "rank-0.log").read_text().splitlines()
    assert json.loads(own[-1])["steps"] == last and (logs / "rank-1.log").exists()
    if launcher != "horovodrun":  # which writes a prefix before each line
        assert set(own) <= set(log.splitlines())


def test_a_run_outlives_its_time_limit(cluster, unbroken, tmp_path):
    """The run ends when its flags, read anew, say so."""
    out, flags = tmp_path / "run", tmp_path / "run.args"
    flags.write_text(f"--out {out} --steps {ENDLESS}\n")
    number = cluster.submit(*TWO_NODES, "-t", 10, "--signal=B:USR1@40", "slurm/train.sbatch", *FLAGS, f"@{flags}",
                            env={"XC_LAUNCHER": "mpirun"})
    until(lambda: steps_of(out) > 3, "first steps")
    asleep = put_to_sleep(cluster, number)  # lest the run be long: Slurm looks at time limits twice a minute
    end_in(cluster, number, 70)
    log = Path(cluster.jobs(number)[0]["StdOut"])
    until(lambda: "Forwarding signal 10" in log.read_text(), "the signal", seconds=70)
    for pid in asleep:
        os.kill(pid, signal.SIGCONT)
    requeued(cluster, number, 1)
    first = steps_of(out)
    flags.write_text(f"--out {out} --steps {first + 7}\n")
    log = ended(cluster, number, restarts=1)
    assert f"exit code 75, back into the queue; goes on from: {out}/checkpoints/step-{first:08d}" in log
    assert losses(out) == unbroken(first + 7)
    assert [json.loads(line)["ranks"] for line in (out / "launches.jsonl").read_text().splitlines()] == [2, 2]


@pytest.mark.parametrize("launcher, nodes", [("srun", TWO_NODES), ("mpirun", ONE_NODE)])
def test_a_cancelled_job_does_not_come_back(launcher, nodes, cluster, tmp_path):
    number = cluster.submit(*nodes, "slurm/train.sbatch", *FLAGS, "--steps", ENDLESS, "--out", tmp_path / "run",
                            env={"XC_LAUNCHER": launcher})
    until(lambda: steps_of(tmp_path / "run") > 3, "first steps")
    cluster.run("scancel", number)
    (job,) = cluster.wait(number)
    assert job["JobState"] == "CANCELLED" and job["Restarts"] == "0"
    until(lambda: not cluster.processes(number), "the end of all processes", seconds=20)
    assert "back into the queue" not in read_log(cluster, job)
    assert cluster.jobs(number)[0]["JobState"] == "CANCELLED"


def test_a_run_that_went_back_does_not_go_back_again(cluster, unbroken, tmp_path):
    """Its first new checkpoint bears the name of the newest one that there was."""
    out, flags = tmp_path / "run", tmp_path / "run.args"
    base = [*ONE_NODE, "slurm/train.sbatch", *FLAGS, "--save-every", "200steps", "--out", out, f"@{flags}"]
    env = {"XC_LAUNCHER": "mpirun"}
    flags.write_text("--steps 400\n")
    ended(cluster, cluster.submit(*base, env=env))
    old, newest = sorted(out.glob("checkpoints/step-*"))
    assert newest.name == "step-00000400"
    inode = newest.stat().st_ino

    flags.write_text(f"--steps {ENDLESS}\n")
    number = cluster.submit(*base, "--resume", old, env=env)
    until(lambda: newest.exists() and newest.stat().st_ino != inode, "the new checkpoint")
    os.kill(ranks(cluster, number)[1], signal.SIGKILL)
    until(lambda: not ranks(cluster, number), "the end of the ranks")
    assert sorted(out.glob("checkpoints/step-*")) == [old, newest]
    before = (out / "metrics.jsonl").read_text().splitlines()[:400]
    requeued(cluster, number, 1)
    flags.write_text("--steps 410\n")
    log = ended(cluster, number, restarts=1)
    assert f"goes on from: {newest}\n" in log
    assert (out / "metrics.jsonl").read_text().splitlines()[:400] == before  # with its times: not computed anew
    assert losses(out) == unbroken(410)


def test_a_mistake_at_a_restart_may_pass(cluster, unbroken, tmp_path):
    """As the lock of a process on a node that is lost, and does not know yet."""
    out, flags = tmp_path / "run", tmp_path / "run.args"
    flags.write_text(f"--steps {ENDLESS}\n")
    number = cluster.submit(*ONE_NODE, "slurm/train.sbatch", *FLAGS, "--save-every", "4steps", "--out", out,
                            f"@{flags}", env={"XC_LAUNCHER": "mpirun"})
    until(lambda: list(out.glob("checkpoints/step-*")), "a checkpoint")
    os.kill(ranks(cluster, number)[1], signal.SIGKILL)
    with open(out / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for the end of rank 0
        last = steps_of(out) + 3
        flags.write_text(f"--steps {last}\n")
        requeued(cluster, number, 2)
    log = ended(cluster, number, restarts=2)
    assert f"--out {out} belongs to " in log and "exit code 2, back into the queue" in log
    assert losses(out) == unbroken(last)


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(cluster, unbroken, tmp_path):
    """Slurm itself puts the job back into the queue, and starts it when there are two nodes again."""
    out, flags = tmp_path / "run", tmp_path / "run.args"
    flags.write_text(f"--steps {ENDLESS}\n")
    number = cluster.submit(*TWO_NODES, "slurm/train.sbatch", *FLAGS, "--save-every", "4steps", "--out", out,
                            f"@{flags}", env={"XC_LAUNCHER": "mpirun"})
    until(lambda: list(out.glob("checkpoints/step-*")), "a checkpoint")
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=lost")
    until(lambda: not ranks(cluster, number), "the end of the ranks")
    cluster.run("scontrol", "update", "nodename=n2", "state=resume")
    last = steps_of(out) + 3
    flags.write_text(f"--steps {last}\n")
    ended(cluster, number, restarts=1)
    assert losses(out) == unbroken(last)


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_ranks_have_the_cores_of_a_task_and_see_all_gpus(launcher, cluster, tmp_path):
    script = tmp_path / "job.sbatch"
    script.write_text("#!/usr/bin/env bash\n. slurm/launch.sh\n"
                      "choose_launcher; run_ranks bash -c 'hostname; echo $OMP_NUM_THREADS $CUDA_VISIBLE_DEVICES'\n")
    number = cluster.submit("-N", 2, "--ntasks-per-node", 2, "-c", 2, "--gpus-per-node=2", "-J", "job", "-o",
                            tmp_path / "log", script, env={"XC_LAUNCHER": launcher})
    ended(cluster, number)
    logs = [cluster.checkout / f"slurm/logs/job-{number}/rank-{rank}.log" for rank in range(4)]
    assert [log.read_text() for log in logs] == [f"{node}\n2 0,1\n" for node in ("n1", "n1", "n2", "n2")]


def log_of_ranks(cluster, tmp_path, launcher, *command, code):
    """Run a command on two ranks as the templates do, which must end with this exit code; the job's log."""
    script = tmp_path / "job.sbatch"
    script.write_text("#!/usr/bin/env bash\n. slurm/launch.sh\nchoose_launcher\n"
                      f"run_ranks {shlex.join(command)}\nexit $code\n")
    number = cluster.submit(*ONE_NODE, "-o", tmp_path / "log", script, env={"XC_LAUNCHER": launcher})
    return ended(cluster, number, state="FAILED", code=code)


@pytest.mark.parametrize("launcher, fault, code", [("srun", "kill", "137:0"), ("mpirun", "value", "2:0")])
def test_the_code_of_the_rank_at_fault_is_the_jobs(launcher, fault, code, cluster, tmp_path):
    """Bad input that one rank meets on its way is a mistake. tests/slurm/test_templates.py has other codes."""
    log = log_of_ranks(cluster, tmp_path, launcher, "python", "-m", "tests.mpi.programs.failure", fault, code=code)
    assert fault == "kill" or "error: rank 1: record 7 is broken" in log


@pytest.mark.parametrize("offer, chosen", [("pmix", "srun"), ("none", "mpirun")])
def test_srun_is_taken_where_it_knows_this_mpi(offer, chosen, cluster, tmp_path):
    """As many ranks as tasks: three, uneven over two nodes. Run folder and logs have the job's number."""
    number = cluster.submit("-N", 2, "-n", 3, "slurm/train.sbatch", *FLAGS, "--steps", 2, env={"XC_SRUN_MPI": offer})
    log = ended(cluster, number)
    assert f"3 ranks on n[1-2] by {chosen}," in log
    assert list(losses(cluster.checkout / f"runs/train-{number}")) == [1, 2]
    assert len(list((cluster.checkout / f"slurm/logs/train-{number}").glob("rank-?.log"))) == 3


def test_a_sweep_of_two(cluster, tmp_path):
    """Both are told to stop, and go back into the queue as tasks of their array."""
    outs = [tmp_path / "first", tmp_path / "second run"]
    (tmp_path / "steps").write_text(f"--steps {ENDLESS}\n")
    lines = tmp_path / "two.lines"
    lines.write_text(f"# lines that do not count\n--out {outs[0]}\n\n --out '{outs[1]}' --seed 5\n")
    number = cluster.submit("--array=1-2", "slurm/sweep.sbatch", lines, *FLAGS, f"@{tmp_path}/steps",
                            env={"XC_LAUNCHER": "mpirun"})
    until(lambda: all(steps_of(out) > 3 for out in outs), "first steps")
    cluster.run("scancel", "--signal=USR1", "--batch", number)
    until(lambda: [job["Restarts"] for job in cluster.jobs(number)] == ["1", "1"], "restarts of both")
    first = [steps_of(out) for out in outs]
    last = max(first) + 3
    (tmp_path / "steps").write_text(f"--steps {last}\n")
    jobs = cluster.wait(number)
    assert [(job["JobState"], job["Restarts"]) for job in jobs] == [("COMPLETED", "1")] * 2
    assert [list(losses(out)) for out in outs] == [list(range(1, last + 1))] * 2
    assert losses(outs[0])[1] != losses(outs[1])[1]
    for task, step in (1, first[0]), (2, first[1]):
        log = cluster.checkout / f"slurm/logs/sweep-{number}_{task}"
        assert f"step-{step:08d}" in log.with_suffix(".log").read_text() and (log / "rank-0.log").exists()


def test_several_jobs_make_one_pack(cluster, tiny_packs, tmp_path):
    """Whose tasks Slurm starts in any order, on either node. What failed goes on when all is submitted again."""
    flags = ["--shard-mb", 0.002]

    def jobs(tree):
        said = cluster.run("bash", "slurm/pack.sh", 3, "-c", 1, "--", tree, tmp_path / "packs", *flags)
        assert "writes 3 parts" in said
        return [cluster.wait(number) for number in re.findall(r"\d+(?= (?:lists|writes|makes))", said)]

    states = [[job["JobState"] for job in tasks] for tasks in jobs(tmp_path / "nothing")]
    assert states[0] == ["FAILED"] and {state for tasks in states[1:] for state in tasks} == {"CANCELLED"}
    tree = tmp_path / "tree"
    shutil.copytree(tiny_packs.parent / "tree", tree)
    cluster.wait(cluster.submit("slurm/pack.sbatch", "--part", "list/3", tree, tmp_path / "packs", *flags))
    cluster.wait(cluster.submit("slurm/pack.sbatch", "--part", "1/3", tree, tmp_path / "packs", *flags))
    assert [{job["JobState"] for job in tasks} for tasks in jobs(tree)] == [{"COMPLETED"}] * 3
    assert sorted(os.listdir(tmp_path)) == ["packs", "tree"]
    for split, whole in open_splits(tiny_packs).items():
        pack, every = open_splits(tmp_path / "packs")[split], range(len(whole))
        assert pack.verify() == len(whole) and pack.num_shards > 3
        assert pack.read(every)[0] == whole.read(every)[0] and (pack.read(every)[1] == whole.read(every)[1]).all()


def test_a_requeued_pack_goes_on(cluster, tiny_packs, tmp_path):
    """As Slurm does it when a node is lost."""
    tree, out = tiny_packs.parent / "tree", tmp_path / "packs"
    number = cluster.submit("slurm/pack.sbatch", tree, out, "--shard-mb", 1e-4)
    until(lambda: list(tmp_path.glob(".packs.partial-pack/part-0/train/*")), "a shard")
    cluster.run("scontrol", "requeue", number)
    log = ended(cluster, number, restarts=1)
    assert "resuming after" in log
    assert open_splits(out)["train"].verify() == 120


def test_the_other_templates(cluster, tiny_packs, tmp_path):
    """A benchmark on two nodes, a data set packed, and tests on a node: at once."""
    bench = cluster.submit(*TWO_NODES, "slurm/bench.sbatch", "head_step", "--classes", 3001,
                           env={"XC_LAUNCHER": "mpirun"})
    pack = cluster.submit("-c", 2, "slurm/pack.sbatch", tiny_packs.parent / "tree", tmp_path / "packs")
    test = cluster.submit("slurm/test.sbatch", "-q", "tests/gradients/test_topk.py", "tests/test_config.py")
    assert "2 ranks on n[1-2] by mpirun" in (log := ended(cluster, bench)) and '"step_ms"' in log.splitlines()[-1]
    ended(cluster, pack)
    for name in "train", "test":
        files = sorted(path.name for path in (tiny_packs / name).iterdir())
        assert sorted(path.name for path in (tmp_path / "packs" / name).iterdir()) == files
        for file in files:
            assert (tmp_path / "packs" / name / file).read_bytes() == (tiny_packs / name / file).read_bytes()
    assert " passed" in ended(cluster, test)
