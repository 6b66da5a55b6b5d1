"""Processes that die with the one that started them, however that ended.

In: a new process. Out: it is killed by the kernel with its parent (PR_SET_PDEATHSIG of prctl(2); Linux). The signal
comes when the parent's thread ends that started it: start such processes from the main thread.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """To be called in the child, first of all. `parent`: the process that must still live; this one exits if not."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
