"""Several "hosts" on one machine, joined by a switch whose ports have a given rate. Linux, root, iproute2.

    with Hosts(2, "1gbit") as hosts:
        hosts.mpirun(1, ["python", "program.py"])      one rank on each host

A host is a network namespace with a host name of its own; MPI reaches the others by TCP alone. Every port is a veth
pair into a bridge, limited at both ends by a token bucket (tc tbf) with a queue of 10 ms, about a switch's.

Two TCP links between hosts (btl_tcp_links), because OpenMPI sends and receives messages of 1 to 20 MB in turns over a
single one: an all-reduce of 44 MB between two ranks at 1 Gbit/s, in pieces of 4 MB, takes 706 ms with one link and 400
with two, where the rate allows 369.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_SUBNET, _QUEUE, _BURST = "10.77.0", "10ms", "256kb"
_ENDS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
_AGENT = """#!/bin/bash
# mpirun's remote shell: AGENT ADDRESS COMMAND...
ns={prefix}${{1##*.}}; shift
exec ip netns exec "$ns" unshare --uts bash -c "hostname $ns; export TMPDIR=\\$(mktemp -d -p {folder}); $*"
"""


class Hosts:
    def __init__(self, count, rate="none"):
        """rate: of tc, as 1gbit or 100mbit; none: no limit."""
        self._count, self._rate, self._prefix = count, rate, f"xc{os.getpid()}n"

    def __enter__(self):
        if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
            raise SystemExit("error: hosts on one machine need root and iproute2 (ip, tc): run as root, or start the "
                             "program on a cluster by srun")
        self.folder = Path(tempfile.mkdtemp())
        for number in _ENDS:  # by an exception, so that the hosts are taken down on the way
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        try:
            self._up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _up(self):
        switch = self._name(0)
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for i in range(1, self._count + 1):
            host = self._name(i)
            _ip("netns", "add", host)
            _ip("link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", f"port{i}", "netns", switch)
            _ip("-n", switch, "link", "set", f"port{i}", "master", "switch", "up")
            _ip("-n", host, "addr", "add", f"{_SUBNET}.{i}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "link", "set", "eth0", "up")
            if self._rate != "none":
                for namespace, device in (host, "eth0"), (switch, f"port{i}"):
                    _run("ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", device, "root", "tbf", "rate",
                         self._rate, "burst", _BURST, "latency", _QUEUE)
        agent = self.folder / "agent"
        agent.write_text(_AGENT.format(prefix=self._prefix, folder=self.folder))
        agent.chmod(0o755)

    def __exit__(self, *error):
        for number in _ENDS:
            signal.signal(number, signal.SIG_IGN)
        for i in range(self._count + 1):
            inside = subprocess.run(["ip", "netns", "pids", self._name(i)], capture_output=True, text=True, check=False)
            for pid in inside.stdout.split():  # ranks of a launch that was interrupted
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", self._name(i)], stderr=subprocess.DEVNULL, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
        for number in _ENDS:
            signal.signal(number, signal.SIG_DFL)

    def _name(self, i):
        return f"{self._prefix}{i}"

    def mpirun(self, ranks_per_host, command, stdout=None):
        """Run a command on all hosts, its standard output into a file or through to ours; CalledProcessError if it
        fails."""
        hosts = ",".join(f"{_SUBNET}.{i}:{ranks_per_host}" for i in range(1, self._count + 1))
        environment = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1",
                       "OMPI_MCA_mpi_yield_when_idle": "1", "OMPI_MCA_hwloc_base_binding_policy": "none",
                       "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        first = ["ip", "netns", "exec", self._name(1), "unshare", "--uts", "bash", "-c",
                 f'hostname {self._name(1)}; exec "$@"', "-"]
        launch = ["mpirun", "--oversubscribe", "--mca", "plm_rsh_agent", f"{self.folder}/agent",
                  "--mca", "btl", "tcp,self", "--mca", "pml", "ob1", "--mca", "btl_tcp_links", "2",
                  "--mca", "btl_tcp_if_include", f"{_SUBNET}.0/24",
                  "--mca", "oob_tcp_if_include", f"{_SUBNET}.0/24",
                  *(word for name in environment for word in ("-x", name)),
                  "-np", str(self._count * ranks_per_host), "-H", hosts]
        subprocess.run([*first, *launch, *map(str, command)], check=True, stdout=stdout,
                       env=os.environ | environment | {"TMPDIR": str(self.folder)})


def link_bytes():
    """Bytes that this process's host has sent through its port so far; 0 on a host that `Hosts` did not make."""
    with open("/proc/self/net/dev") as lines:
        for line in lines:
            name, _, numbers = line.partition(":")
            if name.strip() == "eth0":
                return int(numbers.split()[8])
    return 0


def _ip(*words):
    _run("ip", *words)


def _run(*words):
    subprocess.run(words, check=True)
