"""Several machines: node 0 prepares the data and publishes; the others wait, then train along.

In: the folder of resumable state, which all machines see under one path. Out: on the others only their ranks' files
there. Node 0's `Heart` says how far it is, so nobody waits for a machine that is gone.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sft_core.errors import TrainError
from sft_core.terminal import say
from sft_core.train.holders import newest_holder
from sft_core.train.launch import run_training
from sft_core.train.launchers import Launch
from sft_core.train.ranks import RANKS, TRAINING, Beat, Heart
from sft_core.train.spec import TrainSpec

NODE_0 = "node-0"
SPEC = "spec.json"


@contextmanager
def leading(work: Path, launch: Launch) -> Iterator[Heart]:
    """Node 0, while it prepares and trains. Tell the heart TRAINING when the data are in the store."""
    for earlier in work.glob(f"*/{SPEC}"):
        earlier.unlink(missing_ok=True)  # of a start before this one; the others would take it
    heart = Heart(work / RANKS, NODE_0, launch.ddp_timeout)
    try:
        yield heart
    finally:
        heart.end()


def train_along(
    work: Path, num_processes: int, launch: Launch, built: Callable[[], bool], on_line: Callable[[str], None] = say
) -> bool:
    """The other nodes: wait for node 0's data, then run this machine's ranks to their end. False if `built` says that
    there is nothing to train. TrainError if node 0 gives no sign of life or the folders are not shared."""
    if not _await_node_0(work, launch, built, on_line):
        return False
    own = newest_holder(work)
    spec = TrainSpec.read(own / SPEC)
    for path in (spec.packed, spec.base_model):
        if not Path(path).exists():
            raise TrainError(
                f"node {launch.node_rank}: {path} is not there, but node 0 has it; the store and the base model must "
                "lie under one path on all machines"
            )
    run_training(own / SPEC, num_processes, own / f"train-node{launch.node_rank}.log", on_line, launch)
    return True


def _await_node_0(work: Path, launch: Launch, built: Callable[[], bool], on_line: Callable[[str], None]) -> bool:
    path = work / RANKS / NODE_0
    first = last = Beat.read(path)
    changed = time.monotonic()
    on_line(f"note: node {launch.node_rank} waits for node 0 to prepare the data")
    while not built():
        beat = Beat.read(path)
        if beat is not None and beat != last:
            last, changed = beat, time.monotonic()
        if last is not None and last != first and last.state == TRAINING and (newest_holder(work) / SPEC).exists():
            return True
        if time.monotonic() - changed > launch.ddp_timeout:
            raise TrainError(
                f"node {launch.node_rank} saw no sign of life of node 0 in {path} for {launch.ddp_timeout:.0f} s: did "
                "NODE_RANK=0 start and is it well? Is the store a folder on a disk that all machines share?"
            )
        time.sleep(min(1.0, launch.ddp_timeout / 10))
    return False
