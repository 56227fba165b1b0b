"""Preflight: ranks and hosts, libraries, threads, network interfaces, shared memory, GPUs."""

import hashlib
import ipaddress
import os
import shutil
import socket
from pathlib import Path

import psutil
import torch

from xc.errors import UserError
from xc.preflight.report import MIB, listed, on_all_ranks, size_text
from xc.run import folder as run_folder

_SHARED_MEMORY = {"cpu": 8 * MIB, "cuda": 64 * MIB}  # of a rank; Open MPI 4 takes 4 MiB, NCCL's share is a guess


def host_facts(report, world):
    """[{name: value} of every rank]: the facts that the findings are made from. Collective."""
    device = world.device.type
    found = on_all_ranks(world, lambda: world.facts() | {
        "cores": sorted(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "addresses": _addresses(),
        "shared_memory": shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0,
        "memory": memory_available(), "taken": psutil.Process().memory_info().rss, "device": device,
        "gpu": _gpu() if device == "cuda" else None})
    if fault := _differences([{"device": rank_facts["device"]} for rank_facts in found]):
        raise UserError(f"{fault}: use hosts that all have a GPU, or --device cpu")
    return found


def by_host(facts):
    """{host: [facts of each of its ranks]}"""
    return {host: [rank_facts for rank_facts in facts if rank_facts["host"] == host]
            for host in dict.fromkeys(rank_facts["host"] for rank_facts in facts)}


def report_ranks(report, facts, cfg):
    """How many ranks run on each host. Not the same number is a fault."""
    counts = {host: len(on_host) for host, on_host in by_host(facts).items()}
    uneven = len(set(counts.values())) > 1
    report.add_checked("ranks", f"{len(facts)} on {listed(f'{host} ({count})' for host, count in counts.items())}",
                       uneven and "hosts have different numbers of ranks, so the fullest sets the pace",
                       "launch the same number on every host; --exchange dgc-hier requires it",
                       "wrong" if cfg.exchange == "dgc-hier" else "warning")


def report_mpi(report, world):
    """Versions and features of MPI and Horovod. Collective."""
    try:
        found = on_all_ranks(world, world.libraries)
    except UserError as error:
        report.add("MPI", f"cannot be loaded: {error}", "wrong", "run make setup, and load the same modules in the job")
        return
    first = found[0]
    level = first["thread_level"]
    state = f"thread level {level}" if level else "not started, since there is one process"
    value = (f"{first['mpi']}, {state}; Horovod built with "
             f"{', '.join(first['horovod'])}")
    fault = _differences(found) or ("mpi" not in first["horovod"] and "Horovod was built without MPI")
    report.add_checked("MPI", value, fault, "load the modules of the job, the same on every host, and run make setup",
                       "wrong")
    if world.device.type == "cuda" and "nccl" not in first["horovod"]:
        report.add("NCCL", "Horovod was built without it, so CUDA tensors are copied through host memory", "warning",
                   "HOROVOD_GPU_OPERATIONS=NCCL make setup")


def report_software(report, world):
    """Versions of Python, packages and this code. Collective."""
    found = on_all_ranks(world, lambda: run_folder.versions() | {"code": _code_digest()})
    text = ", ".join(f"{name} {version}" for name, version in found[0].items())
    report.add_checked("software", text, _differences(found), "use the same checkout and .venv on every host", "wrong")


def report_threads(report, facts):
    """Threads and cores of every host. More threads than cores is a fault."""
    for host, on_host in by_host(facts).items():
        cores = len({core for rank_facts in on_host for core in rank_facts["cores"]})
        num_threads = sum(rank_facts["threads"] for rank_facts in on_host)
        if len(on_host) > cores:
            remedy = (f"start at most {cores} rank(s) there; if the host has more cores, do not bind ranks to them: "
                      "export OMPI_MCA_hwloc_base_binding_policy=none")
        else:
            remedy = f"export OMP_NUM_THREADS={cores // len(on_host)}"
        report.add_checked("threads", f"{num_threads} of {len(on_host)} rank(s) on {cores} core(s) of {host}",
                           num_threads > cores and "more threads than cores", remedy)


def report_interfaces(report, facts):
    """Network interfaces, and MPI's settings about them. Settings that do not fit the hosts are a fault."""
    hosts = by_host(facts)
    names = [f"{name} {address}" for name, address in facts[0]["addresses"]]
    settings = facts[0]["settings"]
    wanted = settings.get("OMPI_MCA_btl_tcp_if_include")
    chosen = [f"{name.removeprefix('OMPI_MCA_')}={value}" for name, value in settings.items() if "OMPI_MCA" in name]
    value = (f"{listed(names) or 'only loopback'} on {facts[0]['host']}; "
             f"{f'MPI is set to {listed(chosen)}' if chosen else 'MPI has no settings'}")
    hosts_without = [host for host, on_host in hosts.items() if wanted and not _has(on_host[0]["addresses"], wanted)]
    owners = {}
    for host, on_host in hosts.items():
        for _, address in on_host[0]["addresses"]:
            owners.setdefault(address, []).append(host)
    shared = [f"{address} on {listed(owner)}" for address, owner in owners.items() if len(owner) > 1]
    if hosts_without:
        fault, state = f"{wanted} is not on {listed(hosts_without)}", "wrong"
        remedy = "set OMPI_MCA_btl_tcp_if_include to an interface that every host has, or to its subnet"
    else:
        fault, state = not wanted and shared and f"hosts have the same address: {listed(shared)}", "warning"
        remedy = "name the subnet that connects the hosts, as in export OMPI_MCA_btl_tcp_if_include=10.0.0.0/8"
    report.add_checked("interfaces", value, fault, remedy, state)


def report_shared_memory(report, facts):
    """Free shared memory of every host, and what its ranks need. Too little is a fault."""
    for host, on_host in by_host(facts).items():
        free, needed = on_host[0]["shared_memory"], len(on_host) * _SHARED_MEMORY[on_host[0]["device"]]
        value = f"{size_text(free)} free in /dev/shm of {host}, {size_text(needed)} needed by {len(on_host)} rank(s)"
        report.add_checked("shared memory", value, free < needed and "too little",
                           "delete what other runs left in /dev/shm; start a container with --shm-size=1g")


def report_gpus(report, facts):
    """GPUs and ranks of every host. Not one rank for each GPU is a fault."""
    if facts[0]["device"] == "cpu":
        report.add("GPUs", "none used: this run is on CPUs")
        return
    for host, on_host in by_host(facts).items():
        gpu, count = on_host[0]["gpu"], len(on_host)
        value = f"{gpu['count']} of {gpu['name']} on {host}, {size_text(gpu['free'])} free, {count} rank(s)"
        report.add_checked("GPUs", value, count != gpu["count"] and "not one rank for each GPU",
                           "launch one rank for each GPU; NCCL allows no more",
                           "wrong" if count > gpu["count"] else "warning")


def _addresses():
    """[(interface, IPv4 address)] of the interfaces that are up, without loopback."""
    states = psutil.net_if_stats()
    return [(name, address.address) for name, addresses in psutil.net_if_addrs().items() for address in addresses
            if address.family == socket.AF_INET and name in states and states[name].isup
            and not ipaddress.ip_address(address.address).is_loopback]


def _has(addresses, wanted):
    """Whether a host has one of the interfaces or subnets that Open MPI is told to use, separated by commas."""
    for choice in wanted.split(","):
        if "/" not in choice:
            found = choice == "lo" or any(name == choice for name, _ in addresses)
        else:
            try:
                subnet = ipaddress.ip_network(choice, strict=False)
            except ValueError as error:
                raise UserError(f"OMPI_MCA_btl_tcp_if_include={wanted}: {error}") from error
            found = any(ipaddress.ip_address(address) in subnet for _, address in addresses)
        if found:
            return True
    return False


def _gpu():
    """Facts about the GPU of this rank."""
    free, _ = torch.cuda.mem_get_info()
    return {"count": torch.cuda.device_count(), "name": torch.cuda.get_device_name(), "free": free,
            "index": torch.cuda.current_device()}


def _code_digest():
    """Digest of the code that runs. A commit's hash would not show uncommitted changes."""
    library = Path(__file__).parent.parent
    files = [library.parent / "train.py", *sorted(library.rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:10]


def _differences(facts):
    """Text of the values in [{name: value} of every rank] that are not those of rank 0; "" if there are none."""
    return listed(f"rank {rank} has {name} {value}, rank 0 {facts[0].get(name)}"
                  for rank, rank_facts in enumerate(facts)
                  for name, value in rank_facts.items() if value != facts[0].get(name))


def memory_available():
    """Bytes that processes of this host can still allocate, by the machine and by the cgroups of this process."""
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
                free.append(_free_in_cgroup(folder, limit, used, cache))
    return max(1, min(size for size in free if size is not None))


def _free_in_cgroup(group, limit, used, cache):
    """Bytes that a cgroup may still allocate, if cached files are dropped. None without a limit."""
    try:
        stats = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int((group / limit).read_text()) - int((group / used).read_text()) + int(stats.get(cache, 0))
    except (OSError, ValueError):  # files are not visible in a container; the limit is "max"
        return None
