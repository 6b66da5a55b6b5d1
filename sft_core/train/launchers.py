"""How ranks are started: one process, `torchrun` on one machine or several, Slurm's `srun`.

In: a `Launch`, made where the environment is read. Out: the command and the environment of this machine's ranks.
Sources: torch.distributed.run's options; srun(1), "OUTPUT ENVIRONMENT VARIABLES".
"""

import fcntl
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from sft_core.errors import RecipeError
from sft_core.own_packages import ROOT

DDP_TIMEOUT_SECONDS = 600
"""HF's `ddp_timeout`: how long ranks wait for one another."""
LAUNCHERS = ("torchrun", "slurm", "none")
LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500
SLURM_PORTS = range(20000, 30000)
SIOCGIFADDR = 0x8915
ALLOCATOR_KEYS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""torch's settings of a GPU's memory; the second is the name before torch 2.9, and deprecated since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Where this process stands among those that train. Under Slurm each task is a node of one rank."""

    launcher: str | None = None
    """torchrun, slurm, none; null: torchrun where there are several ranks."""
    nnodes: int = 1
    node_rank: int = 0
    addr: str = LOOPBACK
    """Address of node 0, as the others reach it."""
    port: int | None = None
    """Free on node 0; null picks one, on one machine."""
    local_rank: int = 0
    """Slurm: number of this task on its machine."""
    local_world_size: int = 1
    """Slurm: tasks on this machine."""
    ddp_timeout: float = DDP_TIMEOUT_SECONDS
    """Seconds that ranks wait for one another; half of it without a sign of life ends the run."""

    def local_ranks(self, num_processes: int) -> range:
        """The ranks that this process starts, of `num_processes` on all machines."""
        here = num_processes // self.nnodes
        return range(self.node_rank * here, (self.node_rank + 1) * here)


ONE_MACHINE = Launch()


def training_command(spec: Path, num_processes: int, launch: Launch = ONE_MACHINE) -> list[str]:
    """The command line that starts this machine's ranks."""
    worker = ["-m", "sft_core.train.worker", str(spec), str(launch.ddp_timeout)]
    if not _by_torchrun(num_processes, launch):
        return [sys.executable, *worker]
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes // launch.nnodes}", "--max_restarts=0"]
    if launch.nnodes == 1:
        return [sys.executable, *torchrun, "--standalone", *worker]
    torchrun += [f"--nnodes={launch.nnodes}", f"--node_rank={launch.node_rank}", f"--master_addr={launch.addr}"]
    torchrun += [f"--master_port={launch.port or DEFAULT_PORT}", f"--rdzv_conf=timeout={int(launch.ddp_timeout)}"]
    return [sys.executable, *torchrun, *worker]


def training_environment(
    environment: Mapping[str, str], num_processes: int, launch: Launch = ONE_MACHINE
) -> dict[str, str]:
    """The child's environment: unbuffered, offline telemetry, and without torchrun what it would have set."""
    child = {**environment, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    child["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(int(launch.ddp_timeout))  # ranks that were asked to stop are saving
    here = launch.local_world_size if launch.launcher == "slurm" else num_processes // launch.nnodes
    child.setdefault("OMP_NUM_THREADS", str(max(1, ((os.cpu_count() or 1) - 1) // here)))  # one core for us
    if not any(name in child for name in ALLOCATOR_KEYS):
        child[ALLOCATOR_KEYS[release_of("torch") < (2, 9)]] = "expandable_segments:True"  # rows differ in length
    child["PYTHONSAFEPATH"] = "1"  # `-m` would put the current folder first, where a user's datasets.py may lie
    child["PYTHONPATH"] = os.pathsep.join([str(ROOT), *elsewhere(child.get("PYTHONPATH", ""))])
    interface = interface_towards(launch.addr) if launch.nnodes > 1 else None
    if interface is not None:
        child.setdefault("GLOO_SOCKET_IFNAME", interface)
    if not _by_torchrun(num_processes, launch):
        child.update(
            RANK=str(launch.node_rank),
            WORLD_SIZE=str(num_processes),
            LOCAL_RANK=str(launch.local_rank),
            LOCAL_WORLD_SIZE=str(launch.local_world_size),
            MASTER_ADDR=launch.addr,
            MASTER_PORT=str(launch.port or free_port()),
        )
    return child


def release_of(package: str) -> tuple[int, int]:
    """The first two numbers of an installed package's version."""
    major, minor, *_ = version(package).split(".")
    return int(major), int(minor)


def elsewhere(places: str) -> list[str]:
    """Entries of PYTHONPATH but the current folder, which Prefect puts there: ranks import nothing of the user's."""
    return [place for place in places.split(os.pathsep) if place and Path(place).resolve() != Path.cwd()]


def slurm_launch(environment: Mapping[str, str], ddp_timeout: float = DDP_TIMEOUT_SECONDS) -> Launch:
    """What srun tells each of its tasks. RecipeError where this is not one."""
    try:
        number = {name: int(environment[f"SLURM_{name}"]) for name in ("PROCID", "NTASKS", "LOCALID", "NODEID")}
        nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
        tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment["SLURM_TASKS_PER_NODE"]
        job = int(environment["SLURM_JOB_ID"]) + int(environment.get("SLURM_STEP_ID", "0"))
        here = tasks_per_node(tasks)[number["NODEID"]]
    except (KeyError, ValueError, IndexError) as error:
        raise RecipeError(
            f"--launcher slurm: {error} of srun's environment is missing or no number; start each rank as a task of "
            "srun: srun -n 2 sft train RECIPE --launcher slurm"
        ) from None
    return Launch(
        launcher="slurm",
        nnodes=number["NTASKS"],
        node_rank=number["PROCID"],
        addr=first_host(nodes),
        port=SLURM_PORTS[job % len(SLURM_PORTS)],
        local_rank=number["LOCALID"],
        local_world_size=here,
        ddp_timeout=ddp_timeout,
    )


def first_host(nodes: str) -> str:
    """The first host of a Slurm host list; `scontrol` says it where it is installed.

    >>> first_host("node[01-03,7],other")
    'node01'
    """
    scontrol = shutil.which("scontrol")
    if scontrol:
        found = subprocess.run([scontrol, "show", "hostnames", nodes], capture_output=True, text=True, timeout=60)
        if found.returncode == 0 and found.stdout.strip():
            return found.stdout.split()[0]
    return first_of(nodes)


def first_of(nodes: str) -> str:
    """The same, without Slurm's programs: brackets hold numbers and ranges, and there may be several of them."""
    outside = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", outside.group() if outside else nodes)


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form, one number a node.

    >>> tasks_per_node("2(x3),1")
    [2, 2, 2, 1]
    """
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"SLURM_TASKS_PER_NODE {text!r}")
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def interface_towards(addr: str) -> str | None:
    """Name of the network interface over which `addr` is reached, or None (IPv6, not Linux, no route)."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((addr, 9))  # sends nothing
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                except OSError:  # an interface without an address
                    continue
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    except OSError:
        return None
    return None


def free_port() -> int:
    """One that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _by_torchrun(num_processes: int, launch: Launch) -> bool:
    if launch.launcher == "none" and num_processes > 1:
        raise RecipeError(f"--launcher none starts one rank, but {num_processes} are asked for; take torchrun")
    return launch.launcher == "torchrun" or (launch.launcher is None and num_processes > 1)
