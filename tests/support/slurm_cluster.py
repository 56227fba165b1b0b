"""A real Slurm on this machine: munged, slurmctld and two nodes, without systemd.

It lives in namespaces of its own. A process namespace ends with its first process, so nothing outlives the cluster,
and a network namespace keeps its ports and addresses to itself. Each node has a network, a host name and a /dev/shm of
its own, so MPI takes the two for two hosts. That needs root.
"""

import contextlib
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.launch import ENVIRONMENT, ROOT, default_signals

NODES = ("n1", "n2")
CPUS = 4  # of each node; Slurm takes our word for it
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
          "TIMEOUT"}
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter", "ip")
_NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
_UNSHARE = ("unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc")
# A requeued job waits for cred_expire and a second; below 5 that is the default, 120 s.
_CONF = """
ClusterName=test
SlurmctldHost=control(10.1.1.100)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
TmpFS={folder}/tmp-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
KillWait=5
GresTypes=gpu
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def missing():
    """Why there can be no cluster here, or None."""
    if lacking := [program for program in _PROGRAMS if not shutil.which(program)]:
        return f"no {lacking[0]} here (.ci/slurm_packages.sh installs it)"
    if os.getuid():
        return "a cluster on one machine needs root for its namespaces"
    if subprocess.run([*_UNSHARE, "true"], capture_output=True).returncode:
        return "namespaces are not allowed here"


class Cluster:
    """Up from entering to leaving the context. Jobs are submitted from, and run in, the folder `checkout`."""

    def __init__(self, checkout):
        self.checkout = checkout

    def __enter__(self):
        # Not pytest's folder for temporary files: munged wants one whose parents anybody may enter.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        try:
            with open(self.folder / "init.log", "w") as log, default_signals():
                # The pipe to its standard input closes when we end, however that is, and the cluster with it.
                self._process = subprocess.Popen(
                    [*_UNSHARE, sys.executable, "-m", "tests.support.slurm_cluster", self.folder], cwd=ROOT,
                    stdin=subprocess.PIPE, stdout=log, stderr=log)
            self._wait_until(lambda: (self.folder / "ready").exists())
            pid = self._process.pid
            self._init = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
            self._wait_until(lambda: self.run("sinfo", "-hN", "-o", "%t").split() == ["idle"] * len(NODES))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(timeout=30)
        shutil.rmtree(self.folder)

    def _wait_until(self, done, seconds=30):
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline or self._process.poll() is not None:
                logs = [f"--- {path.name}\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log")]
                raise RuntimeError("the cluster does not come up:\n" + "\n".join(logs))
            time.sleep(0.1)

    def run(self, *command, env=None, expect=0):
        """Run a client command of Slurm; its standard output."""
        enter = ["nsenter", "--target", self._init, *_NAMESPACES, f"--wd={self.checkout}"]
        process = subprocess.run(
            [*enter, *map(str, command)], capture_output=True, text=True, timeout=60,
            env=os.environ | ENVIRONMENT | (env or {}) | {"SLURM_CONF": str(self.folder / "slurm.conf")})
        assert expect is None or process.returncode == expect, (command, process.stdout, process.stderr)
        return process.stdout

    def submit(self, *arguments, env=None):
        """sbatch; the job's number."""
        return int(self.run("sbatch", "--parsable", *arguments, env=env))

    def jobs(self, number):
        """What Slurm knows of a job, or of the tasks of an array: a list of dictionaries."""
        lines = self.run("scontrol", "show", "job", "-o", number).splitlines()
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]

    def wait(self, number, seconds=150):
        """Wait for the job's end, and those of an array; their records."""
        deadline = time.monotonic() + seconds
        while True:
            jobs = self.jobs(number)
            if all(job["JobState"] in _ENDED for job in jobs):
                return jobs
            assert time.monotonic() < deadline, f"no end after {seconds} s: {jobs}"
            time.sleep(0.2)

    def cancel_all(self):
        """End all jobs there are."""
        self.run("scancel", "--user=root")
        deadline = time.monotonic() + 30
        while self.run("squeue", "-h"):
            assert time.monotonic() < deadline, self.run("squeue")
            time.sleep(0.1)

    def processes(self, number):
        """Command lines of a job's processes, by process number. Slurm's own, which run its steps, are among them."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "environ").read_bytes().split(b"\0")
                ours = f"SLURM_CONF={self.folder}/slurm.conf".encode() in words
                if ours and f"SLURM_JOB_ID={number}".encode() in words:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found


def _init(folder):
    """The first process in the namespaces: starts the daemons, adopts what they leave, ends with its input."""
    def sh(command):
        subprocess.run(command, shell=True, check=True)

    def daemon(name, *command):
        with open(folder / f"{name}.out.log", "w") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    addresses = {name: f"10.1.1.{i + 1}" for i, name in enumerate(NODES)}
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.1.1.100 control\n" + "".join(
        f"{address} {name}\n" for name, address in addresses.items()))
    nodes = "".join(f"NodeName={name} NodeAddr={address} CPUs={CPUS} RealMemory=4000 Gres=gpu:2\n"
                    for name, address in addresses.items())
    (folder / "slurm.conf").write_text(_CONF.format(folder=folder) + nodes)
    # slurmd does not start where cgroups are not mounted, though nothing here uses them, unless told their version.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    for i in range(2):  # GPUs by name: Slurm asks for a device, which this is
        sh(f"mknod -m 666 {folder}/gpu{i} c 1 3")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")

    sh("hostname control && ip link set lo up && ip link add bridge type bridge && ip link set bridge up && "
       f"ip addr add 10.1.1.100/24 dev bridge && mount --bind {folder}/hosts /etc/hosts")
    daemon("munged", "munged", "--foreground", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
           f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed")
    while not (folder / "munge.socket").exists():
        time.sleep(0.05)
    (folder / "state").mkdir()
    daemon("slurmctld", "slurmctld", "-D")
    while "UP" not in subprocess.run(["scontrol", "ping"], capture_output=True, text=True).stdout:
        time.sleep(0.05)  # a slurmd that comes before it waits for seconds
    for name, address in addresses.items():
        (folder / f"tmp-{name}").mkdir()
        node = daemon(name, "unshare", "--net", "--uts", "--ipc", "--mount", "bash", "-c",
                      f"hostname {name} && mount -t tmpfs tmpfs /dev/shm && "
                      f"until ip link show eth0; do sleep 0.05; done && exec slurmd -D -N {name}")
        while os.readlink(f"/proc/{node.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            time.sleep(0.05)
        inside = f"nsenter --target {node.pid} --net ip"
        sh(f"ip link add {name} type veth peer name {name}-peer && ip link set {name} master bridge up && "
           f"ip link set {name}-peer netns {node.pid} name peer && {inside} addr add {address}/24 dev peer && "
           f"{inside} link set lo up && {inside} link set peer up && {inside} link set peer name eth0")
    (folder / "ready").touch()
    while not select.select([sys.stdin], [], [], 0.2)[0]:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    _init(Path(sys.argv[1]))
