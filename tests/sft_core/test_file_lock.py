"""The lock keeps others out while it is held, is freed by a killed holder, and is waited for no longer than allowed."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sft_core.file_lock import LockError, file_lock

ROOT = Path(__file__).parents[2]
HOLD = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from sft_core.file_lock import file_lock
import subprocess
with file_lock(Path(sys.argv[1])):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    time.sleep(600)
"""


def test_it_keeps_others_out_and_a_killed_holder_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "below" / "x.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(LockError, match=r"x\.lock: held by another process for 0 s"), file_lock(path, 0.2):
            pass
        holder.kill()
        holder.wait()
        with file_lock(path, 60):  # although a child of the holder lives on
            pass
    finally:
        import os

        os.kill(child, signal.SIGKILL)


def test_it_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), file_lock(tmp_path / "x"):
        _ = 1 / 0
    with file_lock(tmp_path / "x", 0):
        pass
