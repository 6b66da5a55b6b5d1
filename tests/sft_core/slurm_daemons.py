"""A Slurm of one machine: munged, slurmctld and slurmd, all files in one folder. Needs root and Debian's slurm-wlm.

In: an empty folder. Out: the environment in which `srun` finds it. Source: slurm.conf(5).
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sft_core.train.launchers import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo")
START_TIMEOUT = 180
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"no {', '.join(absent)} (Debian: slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    return "srun -n 2 needs two cores" if (os.cpu_count() or 1) < 2 else None


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Running until the end of the block."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    ports = [free_port(), free_port()]
    text = CONF.format(host=host, folder=folder, ports=ports, cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(text)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    own = [f"--{name}={folder}/munge.{ending}" for name, ending in MUNGE_FILES.items()]
    commands = [["munged", "--force", "--foreground", *own], ["slurmctld", "-D"], ["slurmd", "-D"]]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("wb") as out:
                daemons.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            if command[0] == "munged":
                _await(lambda: (folder / "munge.socket").exists())
        _await(lambda: b"idle" in _output(["sinfo", "-h", "-o", "%T"], environment))
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(START_TIMEOUT)


MUNGE_FILES = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


def _output(command: list[str], environment: dict[str, str]) -> bytes:
    return subprocess.run(command, env=environment, capture_output=True, timeout=START_TIMEOUT).stdout


def _await(ready: object) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not ready():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError("Slurm did not start; see the .out files")
        time.sleep(0.2)
