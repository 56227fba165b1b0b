"""The doctor, `python train.py --check` with the flags of a run: what is wrong here, before a run finds out late.

Every rank looks at its own place, all see the list of these facts, and each finding becomes a line: what was found and,
where it is not as it should be, what to do. Lines appear as they are found, so the last one tells where a network
hangs. What goes wrong on one rank becomes a line, too: no rank waits for it.
"""

import hashlib
import ipaddress
import os
import secrets
import shutil
import socket
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from xc import data, run_folder
from xc.config import UserError
from xc.memory_plan import ON_HOST, Network, Plan
from xc.schedule import Schedule
from xc.traffic import sent_all_reduce

_MIB = 2**20
_SHARED_MEMORY = {"cpu": 8 * _MIB, "cuda": 64 * _MIB}  # a rank; Open MPI 4 takes 4 MiB, what NCCL takes is our guess
_SMALL, _LARGE = 1, 8 * _MIB  # numbers of an all-reduce
_SLOW_BYTES = 500 * _MIB  # per second between hosts; 10 Gbit/s are 1,192
_CLOCK_SECONDS = 1.0
_WRITTEN = 64 * _MIB
_RECORDS = 256  # read by one thread
_FULL = 0.9  # share of the free memory above which others, and what is lost between blocks, decide


class Report:
    """Findings, printed as they come where that is asked for.

    findings  [(state, name, value, remedy)], state: ok | warning | wrong; a remedy where there is one
    """

    def __init__(self, prints=False):
        self.findings, self._prints = [], prints
        if prints:
            print(f"{'state':8} {'finding':14} value -> remedy", flush=True)

    def __call__(self, name, value, state="ok", remedy=""):
        self.findings.append((state, name, value, remedy))
        if self._prints:
            print(f"{state:8} {name:14} {value}" + (f" -> {remedy}" if remedy else ""), flush=True)

    def judge(self, name, value, fault, remedy, state="warning"):
        """A finding that is a fault or not; `fault` says which one."""
        self(name, f"{value}: {fault}" if fault else value, *((state, remedy) if fault else ()))

    def look(self, name, function, *arguments):
        """What function(report, *arguments) returns; None where it raises a UserError, which is a finding."""
        try:
            return function(self, *arguments)
        except UserError as error:
            self(name, str(error), "wrong")

    def conclusion(self):
        """(exit code, last line)."""
        counts = {state: sum(found == state for found, *_ in self.findings) for state in ("wrong", "warning")}
        return 2 * bool(counts["wrong"]), f"{counts['wrong']} wrong, {counts['warning']} with a warning"


def check(cfg, world):
    """Print all findings on rank 0; returns (exit code, last line), 2 if something is wrong. Collective.

    Without --data or --out, what these are needed for is left out.
    """
    report = Report(world.rank == 0)
    if facts := report.look("host", host_facts, world):
        report.look("ranks", ranks, facts, cfg)
        report.look("MPI", libraries, world)
        report.look("software", software, world)
        report.look("threads", threads, facts)
        report.look("interfaces", interfaces, facts)
        report.look("shared memory", shared_memory, facts)
        report.look("GPUs", gpus, facts)
        report.look("agreement", agreement, world)
        report.look("network", network, world, facts)
        report.look("clocks", clocks, world)
        examples = cfg.data and report.look("data", data_set, cfg, world)
        plan = examples and report.look("memory", memory, cfg, world, facts, examples)
        if cfg.out:
            report.look("run folder", folder, cfg, world, plan)
    code, text = report.conclusion()
    left_out = ["data and memory (--data)"] * (not cfg.data) + ["run folder (--out)"] * (not cfg.out)
    return code, text + (f"; not looked at: {', '.join(left_out)}" if left_out else "")


def of_all(world, look):
    """[look() of every rank]; what goes wrong in it on any of them becomes the same UserError on all. Collective."""
    found = error = None
    try:
        found = look()
    except Exception as e:
        error = " ".join(str(e).split()) or repr(e)
    found, errors = zip(*world.everyone.all_gather_object((found, error)), strict=True)
    for rank, error in enumerate(errors):
        if error is not None:
            raise UserError(error if len(set(errors)) == 1 else f"rank {rank}: {error}")
    return list(found)


def of_first(world, look):
    """look() of rank 0, as `of_all`."""
    return of_all(world, lambda: look() if world.rank == 0 else None)[0]


def host_facts(report, world):
    """[{name: value} of every rank]: what the findings below go by."""
    device = world.device.type
    found = of_all(world, lambda: world.facts() | {
        "cores": sorted(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "addresses": _addresses(),
        "shared_memory": shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0,
        "memory": memory_available(), "taken": psutil.Process().memory_info().rss, "device": device,
        "gpu": _gpu() if device == "cuda" else None})
    if fault := _differing([{"device": of_rank["device"]} for of_rank in found]):
        raise UserError(f"{fault}: take hosts that all have a GPU, or --device cpu")
    return found


def by_host(facts):
    """{host: [facts of its ranks]}"""
    return {host: [of_rank for of_rank in facts if of_rank["host"] == host]
            for host in dict.fromkeys(of_rank["host"] for of_rank in facts)}


def ranks(report, facts, cfg):
    counts = {host: len(on_host) for host, on_host in by_host(facts).items()}
    uneven = len(set(counts.values())) > 1
    report.judge("ranks", f"{len(facts)} on {_shown(f'{host} ({count})' for host, count in counts.items())}",
                 uneven and "not as many on every host",
                 "launch as many on each, or the fullest host sets the pace; --exchange dgc-hier needs it",
                 "wrong" if cfg.exchange == "dgc-hier" else "warning")


def libraries(report, world):
    try:
        found = of_all(world, world.libraries)
    except UserError as error:
        report("MPI", f"cannot be loaded: {error}", "wrong", "make setup, and load the modules that it was made with")
        return
    first = found[0]
    level = first["thread_level"]
    value = (f"{first['mpi']}, {f'thread level {level}' if level else 'not started: one process'}; Horovod built with "
             f"{', '.join(first['horovod'])}")
    fault = _differing(found) or ("mpi" not in first["horovod"] and "Horovod without MPI")
    report.judge("MPI", value, fault, "make setup where the modules of the job are loaded, the same on every host",
                 "wrong")
    if world.device.type == "cuda" and "nccl" not in first["horovod"]:
        report("NCCL", "not in this Horovod: CUDA tensors are staged through host memory", "warning",
               "HOROVOD_GPU_OPERATIONS=NCCL make setup")


def software(report, world):
    found = of_all(world, lambda: run_folder.versions() | {"code": _digest()})
    text = ", ".join(f"{name} {version}" for name, version in found[0].items())
    report.judge("software", text, _differing(found), "run the same checkout and .venv on every host", "wrong")


def threads(report, facts):
    for host, on_host in by_host(facts).items():
        cores = len({core for of_rank in on_host for core in of_rank["cores"]})
        wanted = sum(of_rank["threads"] for of_rank in on_host)
        if len(on_host) > cores:
            remedy = (f"at most {cores} rank(s) there; where there are more cores, do not bind ranks to them: export "
                      "OMPI_MCA_hwloc_base_binding_policy=none")
        else:
            remedy = f"export OMP_NUM_THREADS={cores // len(on_host)}"
        report.judge("threads", f"{wanted} of {len(on_host)} rank(s) on {cores} core(s) of {host}",
                     wanted > cores and "they take turns", remedy)


def interfaces(report, facts):
    hosts = by_host(facts)
    names = [f"{name} {address}" for name, address in facts[0]["addresses"]]
    settings = facts[0]["settings"]
    wanted = settings.get("OMPI_MCA_btl_tcp_if_include")
    chosen = [f"{name.removeprefix('OMPI_MCA_')}={value}" for name, value in settings.items() if "OMPI_MCA" in name]
    value = f"{_shown(names) or 'none but loopback'} on {facts[0]['host']}; MPI told {_shown(chosen) or 'nothing'}"
    lacking = [host for host, on_host in hosts.items() if wanted and not _has(on_host[0]["addresses"], wanted)]
    owners = {}
    for host, on_host in hosts.items():
        for _, address in on_host[0]["addresses"]:
            owners.setdefault(address, []).append(host)
    shared = [f"{address} on {_shown(owner)}" for address, owner in owners.items() if len(owner) > 1]
    if lacking:
        report.judge("interfaces", value, f"{wanted} is not on {_shown(lacking)}",
                     "name one that every host has, or its subnet, in OMPI_MCA_btl_tcp_if_include", "wrong")
    else:
        report.judge("interfaces", value, bool(shared and not wanted) and f"the same address {_shown(shared)}",
                     "give the subnet that joins the hosts: export OMPI_MCA_btl_tcp_if_include=10.0.0.0/8, or the like")


def shared_memory(report, facts):
    for host, on_host in by_host(facts).items():
        free, needed = on_host[0]["shared_memory"], len(on_host) * _SHARED_MEMORY[on_host[0]["device"]]
        value = f"{_size(free)} free in /dev/shm of {host}, {_size(needed)} for {len(on_host)} rank(s)"
        report.judge("shared memory", value, free < needed and "too little",
                     "delete what other runs left in /dev/shm; a container takes --shm-size=1g")


def gpus(report, facts):
    if facts[0]["device"] == "cpu":
        report("GPUs", "none used: this is a run on CPUs")
        return
    for host, on_host in by_host(facts).items():
        gpu, count = on_host[0]["gpu"], len(on_host)
        value = f"{gpu['count']} of {gpu['name']} on {host}, {_size(gpu['free'])} free, {count} rank(s)"
        report.judge("GPUs", value, count != gpu["count"] and "not one rank on each",
                     "launch as many ranks as there are GPUs; NCCL takes no more",
                     "wrong" if count > gpu["count"] else "warning")


def agreement(report, world):
    """That a sum over all ranks is one, through MPI and through Horovod."""
    if world.size == 1:
        report("agreement", "one rank: nothing to agree on")
        return
    sums = [int(world.everyone.all_reduce(torch.ones(1, device=world.device)).item()),
            int(world.all_reduce_async(torch.ones(1, device=world.device), "doctor")().item())]
    wrong = any(of_all(world, lambda: sums != [world.size, world.size]))
    report.judge("agreement", f"MPI and Horovod both sum over {world.size} rank(s)", wrong and f"they found {sums}",
                 "build both against the MPI whose mpirun launches them: make setup", "wrong")


def network(report, world, facts):
    if world.size == 1:
        report("network", "one rank: nothing to send")
        return
    hosts = by_host(facts)
    places = [("all ranks", world.everyone)]
    if len(hosts) > 1 and any(len(on_host) > 1 for on_host in hosts.values()):
        places.append(("ranks of a host", world.host))
    for name, group in places:
        found = of_all(world, lambda group=group: _speed(group, world.device) if group.size > 1 else None)
        latency, rate = max(f[0] for f in found if f), min(f[1] for f in found if f)
        slow = group is world.everyone and len(hosts) > 1 and rate < _SLOW_BYTES
        value = (f"between {name} a small all-reduce takes {1e6 * latency:,.0f} us, a large one sends "
                 f"{rate / _MIB:,.0f} MiB/s a rank")
        linked = "OMPI_MCA_btl_tcp_links" in facts[0]["settings"]
        report.judge("network", value, slow and "slow",
                     ("" if linked else "on Ethernet, export OMPI_MCA_btl_tcp_links=2; ")
                     + "--exchange dgc and --feature-bits 16 send less")


def _speed(group, device):
    """(seconds of a small all-reduce, bytes per second that leave this rank in a large one), medians. Collective."""
    def seconds(size, repeats):
        tensor, taken = torch.zeros(size, device=device), []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            group.all_reduce(tensor)
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])  # the first one makes connections

    small = seconds(_SMALL, 30)
    return small, sent_all_reduce(group.size, 4 * _LARGE) / seconds(_LARGE, 3)


def clocks(report, world, clock=time.time):
    if world.size == 1:
        report("clocks", "one rank: one clock")
        return
    offsets = clock_offsets(world, clock)
    rank = max(range(world.size), key=lambda rank: abs(sum(offsets[rank])))
    low, high = offsets[rank]
    value = f"rank {rank} is furthest from rank 0, {(low + high) / 2:+.4f} s (+- {(high - low) / 2:.4f})"
    report.judge("clocks", value,
                 max(low, -high) > _CLOCK_SECONDS and "times in logs and of files disagree",
                 "have the hosts' clocks set (chrony, ntp)")


def clock_offsets(world, clock=time.time):
    """[(least, most) seconds that a rank's clock is ahead of rank 0's], by the quickest of a few rounds. Collective.

    Every rank reads its clock between two gatherings that rank 0 takes part in, so at a moment between those at which
    rank 0 began the first and ended the second.
    """
    best = []
    for _ in range(5):
        world.everyone.all_gather_object(None)  # all come together, so that rank 0 does not wait for long below
        begin = clock()
        world.everyone.all_gather_object(None)
        read = world.everyone.all_gather_object(clock())
        end = clock()
        begin, end = world.everyone.all_gather_object((begin, end))[0]
        best.append((end - begin, [(moment - end, moment - begin) for moment in read]))
    return [(0.0, 0.0), *min(best)[1][1:]]


@dataclass(frozen=True)
class Examples:
    """What --data names."""

    num_classes: int
    num_records: int
    input_shape: tuple
    order_bytes: int  # of the order of examples, in memory
    most_rounds: int
    digest: str


def data_set(report, cfg, world):
    """Opens --data on all ranks and reads some of it on rank 0; returns its Examples."""
    splits = {}

    def opened():
        splits.update(data.open_splits(cfg))
        train = splits["train"]
        order_bytes = train.order_bytes if isinstance(train, data.Images) else 0
        most_rounds = Schedule.of(cfg, len(train), world.size).most
        return Examples(train.num_classes, len(train), train.input_shape, order_bytes, most_rounds,
                        train.classes_digest)

    def read():
        train = splits["train"]
        records = train.order(cfg.seed).records(0, min(_RECORDS, len(train)))
        start = time.perf_counter()
        inputs, _ = train.examples(records)
        if world.device.type == "cpu":  # else the GPU does it
            data.prepared(inputs, 0, cfg.augment, cfg.seed)
        return len(records) / (time.perf_counter() - start)

    found = of_all(world, opened)
    if len(set(found)) > 1:
        raise UserError(f"--data {cfg.data} is not the same on all ranks: give one on a shared file system")
    rate = of_first(world, read)
    sizes = " + ".join(f"{len(split):,}" for split in splits.values())
    report("data", f"{found[0].num_classes:,} classes, {sizes} examples ({' + '.join(splits)}), one thread reads "
                   f"{rate:,.0f} a second")
    return found[0]


def memory(report, cfg, world, facts, examples):
    """Whether what a run keeps fits the memory of the rank that has least; returns the Plan."""
    on_cpu = world.device.type == "cpu"
    seen = of_first(world, lambda: Network.of(cfg, examples.input_shape))
    on_host = min(of_rank["memory"] / len(group) for group in by_host(facts).values() for of_rank in group)
    on_gpu = 0 if on_cpu else min(of_rank["gpu"]["free"] / _sharing(of_rank, facts) for of_rank in facts)

    def planned(cfg, num_ranks):
        return Plan.of(cfg, examples.num_classes, num_ranks, seen, order_bytes=examples.order_bytes,
                       most_rounds=examples.most_rounds, on_cpu=on_cpu)

    def load(plan):
        """Shares of the free memory."""
        host = plan.total if on_cpu else sum(plan.parts.get(part, 0) for part in ON_HOST)
        return max(host / on_host, 0 if on_cpu else (plan.total - host) / on_gpu)

    plan = planned(cfg, world.size)
    parts = sorted(plan.parts.items(), key=lambda part: -part[1])
    free = f"{_size(on_host)} free" if on_cpu else f"{_size(on_gpu)} free on the GPU, {_size(on_host)} on the host"
    value = (f"{_size(plan.total)} planned on a rank over the {_size(facts[0]['taken'])} that it has, {free} ("
             + ", ".join(f"{name} {_size(size)}" for name, size in parts if size >= 0.01 * plan.total) + ")")
    if load(plan) <= _FULL:
        report("memory", value)
    else:
        remedies = _that_fit(cfg, world.size, lambda *other: load(planned(*other)) <= _FULL)
        remedies += [f"more memory than {_size(on_host)} for a rank"] * (not remedies)
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


def memory_available():
    """Bytes that processes of this host can still take: of the machine, and of the cgroups that this process is in."""
    free = [psutil.virtual_memory().available]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, used, cache = "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used, cache = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                                        "total_inactive_file")
        else:
            continue
        group = Path(root + path)
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                free.append(_left_in(folder, limit, used, cache))
    return max(1, min(size for size in free if size is not None))


def _left_in(group, limit, used, cache):
    """Bytes that a cgroup may still take, cached files being given up for that. None without a limit."""
    try:
        stats = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int((group / limit).read_text()) - int((group / used).read_text()) + int(stats.get(cache, 0))
    except (OSError, ValueError):  # not seen from inside a container; "max"
        return None


def folder(report, cfg, world, plan):
    """Writes into the run folder, or into the one that it would be made in, and takes it away again."""
    place = Path(of_first(world, lambda: _make_place(cfg)))
    try:
        problems = of_all(world, lambda: _try_place(place, world.rank))
        free, kept, rate, unseen = of_first(world, lambda: _measure_place(place, world.size, Path(cfg.out)))
    finally:
        if world.rank == 0:
            shutil.rmtree(place, ignore_errors=True)
    problems = [f"rank {rank} {problem}" for rank, problem in enumerate(problems) if problem]
    problems += [f"rank 0 does not see what rank {rank} writes" for rank in unseen]
    value = f"{cfg.out}: {rate / _MIB:,.0f} MiB/s to the disk, {_size(free)} free"
    report.judge("run folder", value, _shown(problems), "take a folder on a file system that all hosts share, and may "
                 "write to", "wrong")
    if plan:
        count = cfg.keep + 2  # the best one, and one that is being written
        value = f"{count} of {_size(plan.on_disk)} at most, {plan.on_disk / rate:,.1f} s each if one rank wrote all"
        report.judge("checkpoints", value, count * plan.on_disk > free + kept and f"more than the {_size(free)} free",
                     "another --out, or a lower --keep", "wrong")


def _make_place(cfg):
    run_folder.check(cfg)
    base = Path(cfg.out).absolute()
    while not base.is_dir():
        if base.exists():
            raise UserError(f"--out {cfg.out} cannot be made: {base} is not a folder")
        base = base.parent
    try:
        place = Path(tempfile.mkdtemp(prefix=".check-", dir=base))
    except OSError as error:
        raise UserError(f"--out {cfg.out} cannot be written to ({error}): name another folder") from error
    return place


def _try_place(place, rank):
    """What is wrong with it for this rank, "" if nothing."""
    try:
        if not place.is_dir():
            return "does not see what rank 0 writes"
        (place / f"{rank}").touch()
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return ""


def _measure_place(place, size, out):
    """(bytes free, bytes of checkpoints that are there, bytes per second that reach the disk, ranks of which no file is
    seen here)."""
    block = secrets.token_bytes(_MIB)  # that no file system makes small
    start = time.perf_counter()
    with open(place / "speed", "wb") as file:
        for _ in range(_WRITTEN // _MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    rate = _WRITTEN / (time.perf_counter() - start)
    kept = sum(file.stat().st_size for file in out.glob("checkpoints/*/*"))
    unseen = [rank for rank in range(size) if not (place / f"{rank}").exists()]
    return shutil.disk_usage(place).free + _WRITTEN, kept, rate, unseen


def _addresses():
    """[(interface, IPv4 address)] of those that are up, without loopback."""
    states = psutil.net_if_stats()
    return [(name, address.address) for name, addresses in psutil.net_if_addrs().items() for address in addresses
            if address.family == socket.AF_INET and name in states and states[name].isup
            and not ipaddress.ip_address(address.address).is_loopback]


def _has(addresses, wanted):
    """Whether a host has one of the interfaces or subnets in a list of Open MPI's."""
    for one in wanted.split(","):
        if "/" not in one:
            found = one == "lo" or any(name == one for name, _ in addresses)
        else:
            try:
                subnet = ipaddress.ip_network(one, strict=False)
            except ValueError as error:
                raise UserError(f"OMPI_MCA_btl_tcp_if_include={wanted}: {error}") from error
            found = any(ipaddress.ip_address(address) in subnet for _, address in addresses)
        if found:
            return True
    return False


def _gpu():
    free, _ = torch.cuda.mem_get_info()
    return {"count": torch.cuda.device_count(), "name": torch.cuda.get_device_name(), "free": free,
            "index": torch.cuda.current_device()}


def _digest():
    """Of the code that runs: a commit would not tell what was changed since."""
    files = [Path(__file__).parent.parent / "train.py", *sorted(Path(__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:10]


def _differing(found):
    """Which values of [{name: value} of every rank] are not those of rank 0, "" if none."""
    return _shown(f"rank {rank} has {name} {value}, rank 0 {found[0].get(name)}" for rank, of_rank in enumerate(found)
                  for name, value in of_rank.items() if value != found[0].get(name))


def _shown(texts, most=4):
    """The first of them, and how many there are."""
    texts = list(texts)
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def _size(number):
    return f"{number / _MIB:,.0f} MiB" if number < 10 * 2**30 else f"{number / 2**30:,.1f} GiB"
