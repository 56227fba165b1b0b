"""Preflight: hosts, ranks, libraries, threads, interfaces, shared memory, GPUs."""

import hashlib
import ipaddress
import os
import shutil
import socket
from pathlib import Path

import psutil
import torch

from xc.errors import UserError
from xc.preflight.report import MIB, of_all, shown, size_text
from xc.run import folder as run_folder

_SHARED_MEMORY = {"cpu": 8 * MIB, "cuda": 64 * MIB}  # a rank; Open MPI 4 takes 4 MiB, what NCCL takes is our guess


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
    report.judge("ranks", f"{len(facts)} on {shown(f'{host} ({count})' for host, count in counts.items())}",
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
    value = f"{shown(names) or 'none but loopback'} on {facts[0]['host']}; MPI told {shown(chosen) or 'nothing'}"
    lacking = [host for host, on_host in hosts.items() if wanted and not _has(on_host[0]["addresses"], wanted)]
    owners = {}
    for host, on_host in hosts.items():
        for _, address in on_host[0]["addresses"]:
            owners.setdefault(address, []).append(host)
    shared = [f"{address} on {shown(owner)}" for address, owner in owners.items() if len(owner) > 1]
    if lacking:
        report.judge("interfaces", value, f"{wanted} is not on {shown(lacking)}",
                     "name one that every host has, or its subnet, in OMPI_MCA_btl_tcp_if_include", "wrong")
    else:
        report.judge("interfaces", value, bool(shared and not wanted) and f"the same address {shown(shared)}",
                     "give the subnet that joins the hosts: export OMPI_MCA_btl_tcp_if_include=10.0.0.0/8, or the like")


def shared_memory(report, facts):
    for host, on_host in by_host(facts).items():
        free, needed = on_host[0]["shared_memory"], len(on_host) * _SHARED_MEMORY[on_host[0]["device"]]
        value = f"{size_text(free)} free in /dev/shm of {host}, {size_text(needed)} for {len(on_host)} rank(s)"
        report.judge("shared memory", value, free < needed and "too little",
                     "delete what other runs left in /dev/shm; a container takes --shm-size=1g")


def gpus(report, facts):
    if facts[0]["device"] == "cpu":
        report("GPUs", "none used: this is a run on CPUs")
        return
    for host, on_host in by_host(facts).items():
        gpu, count = on_host[0]["gpu"], len(on_host)
        value = f"{gpu['count']} of {gpu['name']} on {host}, {size_text(gpu['free'])} free, {count} rank(s)"
        report.judge("GPUs", value, count != gpu["count"] and "not one rank on each",
                     "launch as many ranks as there are GPUs; NCCL takes no more",
                     "wrong" if count > gpu["count"] else "warning")


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
    library = Path(__file__).parent.parent
    files = [library.parent / "train.py", *sorted(library.rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:10]


def _differing(found):
    """Which values of [{name: value} of every rank] are not those of rank 0, "" if none."""
    return shown(f"rank {rank} has {name} {value}, rank 0 {found[0].get(name)}" for rank, of_rank in enumerate(found)
                  for name, value in of_rank.items() if value != found[0].get(name))


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
