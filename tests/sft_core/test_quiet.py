"""In every process of ours libraries do not speak about themselves; errors and our own warnings are shown."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GEMM = "Failed to load CPU gemm_4bit_forward from kernels-community"
SPEAK = """
import logging, warnings
for module in ("torch.distributed", "sft_core.pack"):
    for category in (DeprecationWarning, FutureWarning, UserWarning):
        warnings.warn_explicit(f"said by {module}", category, "file.py", 1, module=module)
for name in ("bitsandbytes.backends.cpu.ops", "DeepSpeed"):
    logging.getLogger(name).warning("a warning")
    logging.getLogger(name).error("%s is broken", name)
"""
SHOWN = """
file.py:1: UserWarning: said by torch.distributed
file.py:1: DeprecationWarning: said by sft_core.pack
file.py:1: FutureWarning: said by sft_core.pack
file.py:1: UserWarning: said by sft_core.pack
bitsandbytes.backends.cpu.ops is broken
DeepSpeed is broken
"""
AVX512 = """
import builtins, sys
load = builtins.__import__

def on_a_processor_with_avx512_bf16(name, *rest, **named):
    module = load(name, *rest, **named)
    functional = sys.modules.get("bitsandbytes.functional")
    if hasattr(functional, "has_avx512bf16"):
        functional.has_avx512bf16 = lambda: True
    return module

builtins.__import__ = on_a_processor_with_avx512_bf16
"""
"""bitsandbytes asks for its kernel there, when it is imported."""
RANK = """
from sft_core.train import worker
try:
    worker.main("/nowhere/spec.json", 1.0)
except OSError:
    pass
"""
QUIET = "from sft_core.quiet import quiet_libraries; quiet_libraries()\n"
BEGINNINGS = {"a command": QUIET, "a worker's flow run": "import flows\n", "a rank": RANK}


def printed(program: str, **settings: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "SFT_DEBUG")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("beginning", list(BEGINNINGS))
def test_only_errors_and_our_own_warnings_are_shown(beginning: str) -> None:
    assert printed(BEGINNINGS[beginning] + SPEAK) == SHOWN.lstrip()


def test_with_debug_all_is_shown() -> None:
    assert printed(QUIET + SPEAK, SFT_DEBUG="1").count("a warning") == 2


def test_bitsandbytes_says_nothing_of_a_kernel_it_could_not_download() -> None:
    assert GEMM in printed(AVX512 + "import bitsandbytes")  # it does, where nothing is done about it
    assert GEMM not in printed(AVX512 + QUIET + "import bitsandbytes")


def test_a_worker_that_loads_the_flows_prints_nothing() -> None:
    assert printed("import flows.retrain") == ""
