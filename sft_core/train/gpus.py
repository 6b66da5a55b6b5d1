"""GPUs of this machine as torch sees them: how many, or one clear error where torch cannot use what is there.

In: the environment. Out: a number. torch is asked in a process of its own: it knows visible devices by number, UUID and
MIG name, containers and gVisor, and leaves no context behind. A driver too old for torch's CUDA, a torch without CUDA
or a missing device node would otherwise train on the CPU without a word. `CUDA_VISIBLE_DEVICES=""` means the CPU.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_core.errors import TrainError
from sft_core.train.launchers import elsewhere

VISIBLE = "CUDA_VISIBLE_DEVICES"
NONE = ("", "-1", "NoDevFiles", "none", "void")
"""Of `CUDA_VISIBLE_DEVICES`: no GPU; `NoDevFiles` is Slurm's."""
SIGNS = ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/proc/driver/nvidia/gpus/*")
"""Of a GPU's driver: NVIDIA's nodes (device 0 alone may be missing), WSL2's, AMD's, the kernel module's list."""
LIBRARY = "libcuda.so.1"
"""The driver's own, there also where its kernel module could not be loaded."""
COMPATIBILITY = "/compat/"
"""In the place of the one that images of NVIDIA bring along, GPU or not."""
ASK_SECONDS = 300.0
ASK = """
import json, torch
said = {"count": torch.cuda.device_count(), "fault": None, "torch": torch.__version__}
try:
    torch.cuda.init()
    torch.zeros(1, device="cuda").add_(1).item()
    said["count"] = torch.cuda.device_count()
except Exception as error:
    said["fault"] = str(error)
print("\\n" + json.dumps(said))
"""
MEND = f'install a driver and a torch that fit each other; {VISIBLE}="" trains on the CPU'


def count_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """How many GPUs torch can train on here; 0 where there is none. TrainError where one is there, or asked for by
    `CUDA_VISIBLE_DEVICES`, and torch cannot use it, with torch's own reason."""
    visible = environment.get(VISIBLE)
    if visible is not None and visible.split(",")[0].strip() in NONE:
        return 0
    sign = f"{VISIBLE}={visible}" if visible is not None else sign_of_gpu()
    if sign is None:
        return 0
    said = _ask_torch(environment)
    if said["fault"] is not None:
        raise TrainError(_unusable(f"{sign} speaks of a GPU", said["torch"], said["fault"]))
    return int(said["count"])


def sign_of_gpu(root: Path = Path("/")) -> str | None:
    """What of a GPU's driver is on this machine; None if nothing is."""
    for pattern in SIGNS:
        for path in sorted(root.glob(pattern.lstrip("/"))):
            return str(path)
    try:
        ctypes.CDLL(LIBRARY)
        loaded = Path("/proc/self/maps").read_text("utf-8", errors="replace")
    except OSError:
        return None
    places = {line.split()[-1] for line in loaded.splitlines() if f"/{LIBRARY.partition('.')[0]}.so" in line}
    return next((place for place in sorted(places) if COMPATIBILITY not in place), None)


def check_cuda(expected: bool | None) -> None:
    """In a rank: TrainError if GPUs were counted where the run was started, and torch cannot use one here."""
    import torch  # slow to import

    if not expected or torch.cuda.is_available():
        return
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        reason = "it sees none"
    except (RuntimeError, AssertionError) as error:
        reason = str(error)
    raise TrainError(_unusable("the run was started for GPUs", torch.__version__, reason))


def check_ranks(num_processes: int, gpus: int) -> None:
    """TrainError if this machine would start more ranks than it has GPUs; without one, any number shares the CPU."""
    if gpus and num_processes > gpus:
        raise TrainError(
            f"train.num_processes asks for {num_processes} ranks on this machine, but torch sees {gpus} GPU(s), and "
            f"each rank takes one; set it to {gpus} or null, or look at {VISIBLE}"
        )


def _ask_torch(environment: Mapping[str, str]) -> dict[str, Any]:
    places = os.pathsep.join(elsewhere(environment.get("PYTHONPATH", "")))
    child = {**environment, "PYTHONPATH": places, "PYTHONWARNINGS": "ignore"}
    try:
        found = subprocess.run(
            [sys.executable, "-P", "-c", ASK], env=child, capture_output=True, text=True, timeout=ASK_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise TrainError(
            f"torch gave no answer about GPUs within {ASK_SECONDS:.0f} s: the driver hangs; try nvidia-smi. "
            f'{VISIBLE}="" trains on the CPU'
        ) from None
    try:
        return dict(json.loads("{" + found.stdout.rpartition("\n{")[2]))
    except ValueError:
        words = (found.stderr.strip() or found.stdout.strip() or "it said nothing").splitlines()[-1]
        raise TrainError(
            _unusable("GPUs were looked for", "here", f"exit status {found.returncode}: {words}")
        ) from None


def _unusable(sign: str, version: object, reason: object) -> str:
    driver = _driver()
    known = f" (NVIDIA driver {driver})" if driver else ""
    return f"{sign}, but torch {version} cannot use it{known}: {str(reason).strip().rstrip('.')}; {MEND}"


def _driver(path: Path = Path("/sys/module/nvidia/version")) -> str | None:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return None
