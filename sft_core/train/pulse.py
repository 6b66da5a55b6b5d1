"""The rank's side of `ranks.py`: a Trainer callback that counts what was done, and a bound for waiting.

In: this rank's heart, the seconds ranks may wait for one another. Out: beats that tell what was done; process groups
that give up in time.
"""

import os
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from sft_core.errors import TrainError
from sft_core.train.ranks import SAVING, TRAINING, Beat, Heart

SEEN_WITHIN_SECONDS = 90.0
"""Time in which a new file is seen by all machines: NFS keeps what it knows of a folder for up to 60 s."""


class Pulse(TrainerCallback):
    """Tells the heart what is done. Process groups made after it give up after `ddp_timeout` seconds."""

    def __init__(self, heart: Heart, ddp_timeout: float) -> None:
        self.heart, self._limit = heart, timedelta(seconds=ddp_timeout)
        # DeepSpeed's process groups, and the Trainer's on CPU, take torch's defaults (gloo: 30 minutes).
        vars(dist.distributed_c10d).update(default_pg_timeout=self._limit, default_pg_nccl_timeout=self._limit)
        heart.say(state=TRAINING)

    def join(self, arguments: Any) -> Any:
        """`arguments`, whose making joined the ranks. TrainError if machines do not share the checkpoints."""
        if dist.is_initialized():
            dist.distributed_c10d._set_pg_timeout(self._limit)  # on GPUs the Trainer named its own
            if dist.get_world_size() > int(os.environ["LOCAL_WORLD_SIZE"]):
                check_shared(self.heart, arguments.device)
        return arguments

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A micro-batch is done; a checkpoint, which may follow a stop in mid-step too, may take long."""
        self.heart.say(state=SAVING if control.should_save else TRAINING, moved=True)

    on_step_end = on_substep_end

    def on_save(self, *_: Any, **__: Any) -> None:
        """A checkpoint is written."""
        self.heart.say(state=TRAINING, moved=True)

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """A batch of held-out rows."""
        self.heart.say(moved=True)


def check_shared(heart: Heart, device: torch.device, within: float = SEEN_WITHIN_SECONDS) -> None:
    """TrainError on all ranks if rank 0 does not see what the others write: half of each checkpoint would be lost."""
    token = [uuid.uuid4().hex]
    dist.broadcast_object_list(token, device=device)
    heart.say(token=token[0])
    dist.barrier()
    missing = _unseen(heart.folder, token[0], within) if dist.get_rank() == 0 else []
    answer = [missing]
    dist.broadcast_object_list(answer, device=device)
    if answer[0]:
        raise TrainError(
            f"{heart.folder.parent}: machines do not share this folder: files of rank {', '.join(map(str, answer[0]))} "
            "are not seen by rank 0, and every checkpoint would lack them. Set store to a folder on a shared disk, "
            "under one path on all machines"
        )


def _unseen(folder: Path, token: str, within: float) -> list[int]:
    deadline = time.monotonic() + within
    ranks = list(range(dist.get_world_size()))
    while ranks and time.monotonic() < deadline:
        ranks = [rank for rank in ranks if (beat := Beat.read(folder / str(rank))) is None or beat.token != token]
        if ranks:
            time.sleep(0.5)
    return ranks
