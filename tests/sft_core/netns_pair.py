"""Two network namespaces with an address each, joined by a veth pair: two machines, as far as sockets can tell.

In: nothing; needs root and `ip`. Out: the addresses, and the beginning of a command line that runs inside each.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

IP_TIMEOUT = 30


@dataclass(frozen=True, slots=True)
class Machine:
    """One namespace."""

    addr: str
    enter: tuple[str, ...]


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Gone afterwards, with the link between them. PermissionError where namespaces cannot be made."""
    names = [f"sft{os.getpid()}-{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "va", "netns", names[0], "type", "veth", "peer", "name", "vb", "netns", names[1])
        for name, link, addr in zip(names, ("va", "vb"), ("10.77.0.1", "10.77.0.2"), strict=True):
            ip("-n", name, "address", "add", f"{addr}/24", "dev", link)
            for device in (link, "lo"):
                ip("-n", name, "link", "set", device, "up")
        a, b = (("ip", "netns", "exec", name) for name in names)
        yield Machine("10.77.0.1", a), Machine("10.77.0.2", b)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=IP_TIMEOUT)


def ip(*arguments: str) -> None:
    """One `ip` command. PermissionError with what it said if it fails."""
    if shutil.which("ip") is None:
        raise PermissionError("no program `ip` (iproute2)")
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=IP_TIMEOUT)
    if done.returncode != 0:
        raise PermissionError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
