"""The Slurm templates without Slurm: srun, squeue and scontrol are stand-ins, and so is train.py, which ends as it is
told. tests/slurm/test_jobs.py has the real ones."""

import json
import os
import shlex
import shutil
import subprocess

import pytest

from tests.support.checkout import copy_checkout
from tests.support.launch import ENVIRONMENT, ROOT, default_signals

# Starts the ranks; one that fails ends the others, and the highest code of all is srun's (--kill-on-bad-exit).
SRUN = """
while [[ $1 == --* ]]; do shift; done
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do SLURM_PROCID=$rank setsid "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do
    found=0
    wait -n || found=$?
    [ "$found" -le "$code" ] || code=$found
    [ "$found" = 0 ] || for pid in "${pids[@]}"; do kill -TERM -- "-$pid" 2>/dev/null; done
done
exit "$code"
"""
# Ends with the codes in the file `codes`, one after the other; after + it has written a checkpoint.
TRAIN = """
import json, pathlib, sys
from xc import config
calls = pathlib.Path("calls")
before = calls.read_text().splitlines() if calls.exists() else []
calls.write_text("\\n".join([*before, json.dumps(sys.argv[1:])]))
code = pathlib.Path("codes").read_text().split()[len(before)]
if code[0] == "+":
    folder = pathlib.Path(config.parse(sys.argv[1:]).out) / "checkpoints" / f"step-{len(before):08d}"
    folder.mkdir(parents=True)
    (folder / "meta.json").touch()
sys.exit(int(code))
"""


class Site:
    """A checkout, and a folder of stand-ins that come first on the PATH."""

    def __init__(self, folder):
        self.checkout, self._bin = copy_checkout(folder / "checkout"), folder / "bin"
        self._bin.mkdir()
        self.command("srun", SRUN)
        self.command("squeue", 'echo "${STATE:-RUNNING}"')
        self.command("scontrol", 'echo "$@" >>scontrol.log')
        (self.checkout / "train.py").write_text(TRAIN)

    def command(self, name, script):
        (self._bin / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (self._bin / name).chmod(0o755)

    def job(self, script, *arguments, expect=0, ranks=1, **env):
        """Run a template as Slurm runs it; all that it says."""
        slurm = {"PATH": f"{self._bin}:{ENVIRONMENT['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1",
                 "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": str(ranks), "XC_LAUNCHER": "srun", "XC_CHECK": "0",
                 "SLURM_JOB_NAME": str(script).split("/")[-1].removesuffix(".sbatch")}
        with default_signals():
            done = subprocess.run(["bash", script, *map(str, arguments)], cwd=self.checkout, text=True, timeout=100,
                                  env=os.environ | ENVIRONMENT | slurm | env, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT)
        assert done.returncode == expect, done.stdout
        return done.stdout

    def train(self, codes, *flags, **options):
        """The template for training, where train.py ends with these codes, one a call."""
        (self.checkout / "calls").unlink(missing_ok=True)
        (self.checkout / "codes").write_text(codes)
        return self.job("slurm/train.sbatch", "--data", "d", *flags, **options)

    @property
    def calls(self):
        """Arguments of every call of train.py by the last job."""
        path = self.checkout / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def requeued(self):
        """How often the job was put back into the queue."""
        path = self.checkout / "scontrol.log"
        return path.read_text().count("requeue 7") if path.exists() else 0


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


@pytest.mark.parametrize("code, restarts, requeued", [
    (0, "", 0), (2, "", 0), (0, "1", 0), (2, "1", 1), (75, "", 1), (137, "", 1), (1, "", 1)])
def test_what_is_not_complete_goes_back_into_the_queue(code, restarts, requeued, site):
    """A mistake ends the first start; at a restart it may pass by itself."""
    log = site.train(f"{code}", expect=code, **({"SLURM_RESTART_COUNT": restarts} if restarts else {}))
    assert site.requeued == requeued == log.count(f"exit code {code}, back into the queue; goes on from: ")
    assert site.calls == [["--out", "runs/train-7", "--resume", "auto", "--data", "d"]]


def test_a_job_that_never_gets_on_is_given_up(site):
    """A new checkpoint begins the count anew."""
    log = site.train("+1", expect=1, XC_MAX_RESTARTS="1")
    assert "goes on from: runs/train-7/checkpoints/step-00000000" in log
    for requeued in 2, 2:
        log = site.train("1", expect=1, XC_MAX_RESTARTS="1", SLURM_RESTART_COUNT="1")
        assert site.requeued == requeued
    assert "error: exit code 1, and 1 restarts in a row brought no new checkpoint" in log


def test_a_checkpoint_to_begin_with_is_left_for_a_newer_one(site):
    """The user names one; the job goes on from its own once it has written one."""
    flags = ["--resume", "elsewhere/step-00000004"]
    site.train("1", *flags, expect=1)
    site.train("+1", *flags, expect=1, SLURM_RESTART_COUNT="1")
    assert site.calls[0][-2:] == flags
    site.train("0", *flags, SLURM_RESTART_COUNT="2")
    assert site.calls[0][-4:] == [*flags, "--resume", "auto"]


def test_a_cancelled_job_does_not_come_back(site):
    assert "back into the queue" not in site.train("75", expect=75, STATE="COMPLETING")
    assert site.requeued == 0


@pytest.mark.parametrize("codes, calls, code", [("0 0", [True, False], 0), ("2", [True], 2), ("1", [True], 1)])
def test_a_job_is_checked_before_it_trains(codes, calls, code, site):
    site.train(codes, expect=code, XC_CHECK="1")
    assert [call[-1] == "--check" for call in site.calls] == calls
    site.train("0", XC_CHECK="1", SLURM_RESTART_COUNT="1")  # and not once more
    assert "--check" not in site.calls[0]


@pytest.mark.parametrize("end, code", [("exit 2", 2), ("exit 75", 75), ("kill -9 $$", 137)])
def test_the_code_of_the_rank_at_fault_is_the_jobs(end, code, site):
    """Not that of the other, which srun ends for it."""
    rank = f"if [ $SLURM_PROCID = 1 ]; then until [ -e up ]; do sleep 0.1; done; {end}; fi; touch up; sleep 1000"
    (site.checkout / "job.sbatch").write_text(
        f". slurm/launch.sh\nchoose_launcher\nrun_ranks bash -c {shlex.quote(rank)}\nexit $code\n")
    site.job("job.sbatch", expect=code, ranks=2)


@pytest.mark.parametrize("script, arguments, env, text", [
    ("sweep", ["{lines}"], {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "7"},
     "has no line 3, where empty ones and those that begin with #"),
    ("sweep", ["{lines}.no"], {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7"}, "is no file to read"),
    ("sweep", ["{lines}"], {}, "submit it with --array=1-N"),
    ("pack", ["src", "packs"], {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_MIN": "0",
                                "SLURM_ARRAY_TASK_MAX": "2", "SLURM_ARRAY_TASK_COUNT": "2"}, "this array have gaps"),
    ("bench", ["head_stop"], {}, "there is no benchmark 'head_stop'; there are: best_accuracy.py "),
    ("train", [], {"XC_MAX_RESTARTS": "three"}, "XC_MAX_RESTARTS=three is not allowed: a number, 0 or more"),
    ("train", [], {"XC_MAX_RESTARTS": "-1"}, "XC_MAX_RESTARTS=-1 is not allowed: a number, 0 or more"),
    ("train", [], {"XC_CHECK": "yes"}, "XC_CHECK=yes is not allowed: 0 or 1"),
    ("train", ["--data", "d", "--hed", "knn"], {}, "unknown argument --hed; did you mean --head?"),
    ("train", ["--data", "d"], {"XC_LAUNCHER": "poe"}, "XC_LAUNCHER=poe is not known"),
    ("train", ["--data", "d"], {"XC_LAUNCHER": "horovodrun", "SLURM_JOB_NUM_NODES": "2"}, "is for one node"),
])
def test_a_mistake_about_a_template_is_one_line(script, arguments, env, text, site, tmp_path):
    (tmp_path / "lines").write_text("# two runs\n--steps 1\n\n--steps 2\n")
    arguments = [argument.replace("{lines}", str(tmp_path / "lines")) for argument in arguments]
    log = site.job(f"slurm/{script}.sbatch", *arguments, expect=2, **env)
    assert text in log and len(log.splitlines()) == 1
    assert not site.calls


# Stands in for sbatch: writes down what it was given, and names a job.
SBATCH = 'echo "$@" >>submitted; echo "$((40 + $(wc -l <submitted)));cluster"'


def test_several_jobs_wait_for_each_other(site):
    """The options of sbatch go to all of them; words keep their spaces."""
    site.command("sbatch", SBATCH)
    said = site.job("slurm/pack.sh", 16, "-c", 32, "--account=a", "--", "my photos", "packs", "--shard-mb", 5)
    common, flags = "--parsable --kill-on-invalid-dep=yes -c 32 --account=a", "my photos packs --shard-mb 5"
    assert (site.checkout / "submitted").read_text().splitlines() == [
        f"{common} slurm/pack.sbatch --part list/16 {flags}",
        f"{common} --dependency=afterok:41 --array=0-15 slurm/pack.sbatch {flags}",
        f"{common} --dependency=afterok:42 slurm/pack.sbatch --part merge/16 {flags}"]
    assert said == "submitted: 41 lists the images, 42 writes 16 parts, 43 makes the pack\n"


@pytest.mark.parametrize("arguments", [
    [], ["0", "--", "a", "b"], ["x"], ["16", "a", "b"], ["16", "--", "a"], ["99999"]])
def test_several_jobs_want_a_number_and_two_places(site, arguments):
    site.command("sbatch", SBATCH)
    said = site.job("slurm/pack.sh", *arguments, expect=2)
    assert said.startswith("error: ") and said.count("\n") == 1 and "as bash slurm/pack.sh 16 -c 32 -- " in said
    assert not (site.checkout / "submitted").exists()


SCRIPTS = [path for folder in ("slurm", ".ci") for path in sorted((ROOT / folder).iterdir()) if path.is_file()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(path):
    subprocess.run(["bash", "-n", path], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here")
    done = subprocess.run(["shellcheck", "-x", path], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout
