"""The stop on SIGTERM: all ranks at one moment, nothing of a finished optimizer step lost, within about 15 s.

In: the signal, to any rank. Out: a checkpoint of the last finished optimizer step, from which the same command ends
with the bytes of an undisturbed run. Where an optimizer step is short, it is finished first. Where it takes long, what
is there of it is dropped between two micro-batches: random numbers and counts go back to where the step began.
"""

import random
import signal
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import TrainerCallback

LONG_STEP_SECONDS = 5.0
"""From here on, ranks ask one another between micro-batches too; that costs a look at the device each time."""


class Stopping(TrainerCallback):
    """Becomes `asked` on SIGTERM. `trainer`: the one whose counts are taken back."""

    def __init__(self, trainer: Any) -> None:
        self.asked = False
        self._trainer = trainer
        self._counts = trainer.counts  # of the finished optimizer steps
        self._long = True  # nothing is known of the first step
        self._began = time.monotonic()
        self._saved_step = 0
        self._at_step: tuple[Any, ...] = ()
        signal.signal(signal.SIGTERM, self._ask)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What is resumed from is saved already."""
        self._saved_step, self._counts = state.global_step, self._trainer.counts

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first micro-batch of an optimizer step."""
        self._began = time.monotonic()
        if self._long:
            self._at_step = _random_state()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Between two micro-batches: go back to the end of the last optimizer step, save it unless it is, and stop."""
        if self._long and self._agree(args.device):
            _set_random_state(self._at_step)
            self._trainer.counts = self._counts
            control.should_training_stop = True
            control.should_save = state.global_step > self._saved_step
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """After an optimizer step: save and stop."""
        self._long = time.monotonic() - self._began >= LONG_STEP_SECONDS
        self._counts = self._trainer.counts
        if self._agree(args.device):
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """This step's checkpoint is there."""
        self._saved_step = state.global_step

    def _agree(self, device: Any) -> bool:
        """Whether any rank was asked: the signal reaches them at different moments, and all must stop at the same one.
        A step is long if it is for one of them."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            both = torch.tensor([self.asked, self._long], dtype=torch.int32, device=device)
            dist.all_reduce(both, dist.ReduceOp.MAX)
            self.asked, self._long = map(bool, both.tolist())
        return self.asked

    def _ask(self, *_: object) -> None:
        self.asked = True


def _random_state() -> tuple[Any, ...]:
    """All that the Trainer saves of random numbers."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
