"""One training rank: `python -m sft_core.train.worker SPEC.json`, started by `sft_core.train.launch`.

In: a `TrainSpec`. Out: Trainer checkpoints below `spec.checkpoints`, `metrics.jsonl`, progress lines on stdout. Knows
neither Prefect nor MLflow. Exit status: 0 done; 1 a fault, named by a line `fault: ...`; 75 stopped by SIGTERM, saved.
"""

import ctypes
import errno
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: state was saved, the same command goes on from there."""
FAULT = "fault: "
"""Begins the line that names a user's fault; a JSON text follows."""
PR_SET_PDEATHSIG = 1


def main(spec_path: str) -> int:
    """Train to the end, or to a SIGTERM."""
    _die_with_parent()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from sft_core.errors import SftError  # after the environment is set
    from sft_core.train.spec import TrainSpec

    try:
        return run(TrainSpec.read(Path(spec_path)))
    except SftError as error:
        print(FAULT + json.dumps(f"{type(error).__name__}: {error}"), flush=True)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        message = f"TrainError: {error}; make room there, and the same command goes on from the newest checkpoint"
        print(FAULT + json.dumps(message), flush=True)
        return 1


def run(spec: Any) -> int:
    """Build model, data and Trainer for this rank; train; leave a complete checkpoint of the last step."""
    import torch  # slow, and after PDEATHSIG

    _avoid_compiled_ops(torch.cuda.is_available())
    import transformers

    from sft_core.pack import load_packed
    from sft_core.train.arguments import training_arguments
    from sft_core.train.checkpoints import newest_complete
    from sft_core.train.model import load_trainable
    from sft_core.train.run_log import RunLog
    from sft_core.train.stream import PackedStream
    from sft_core.train.trainer import PackedTrainer
    from sft_core.train.watch import StepWatch

    transformers.utils.logging.set_verbosity_error()
    config = spec.config
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    packed = load_packed(Path(spec.packed), cache=Path(spec.checkpoints) / "packed.arrow")  # mapped, shared by ranks
    stream = PackedStream(packed, config.num_train_epochs, world_size * config.per_device_train_batch_size)
    rows_a_step = world_size * config.per_device_train_batch_size * config.gradient_accumulation_steps
    max_steps = config.max_steps or math.ceil(stream.rows / rows_a_step)
    arguments = training_arguments(spec, max_steps)  # before the model: ZeRO-3 partitions while loading
    transformers.set_seed(spec.seed)
    model, notes = load_trainable(spec.base_model, config, spec.trust_remote_code)
    if arguments.process_index == 0:
        print("\n".join(notes), flush=True)
    stop = _StopFlag()
    log = RunLog(spec, max_steps, stop, packs=packed.packing != "none")
    watch = StepWatch(packed, stream, Path(spec.conversations) if spec.conversations else None)
    trainer = PackedTrainer(model, arguments, stream, watch, log)
    with arguments.main_process_first():  # it deletes torn checkpoints
        resume = newest_complete(Path(spec.checkpoints))
    log.start(resume, world_size, speaks=arguments.process_index == 0)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return EXIT_STOPPED if stop.asked and trainer.state.global_step < max_steps else 0


class _StopFlag:
    """Becomes true on SIGTERM; the Trainer then saves after the optimizer step at hand and stops."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def agree(self, device: Any) -> bool:
        """Whether any rank was asked: the signal reaches them at different steps, and all must stop at the same one."""
        import torch

        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            asked = torch.tensor(int(self.asked), device=device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.asked = bool(asked)
        return self.asked

    def _ask(self, *_: object) -> None:
        self.asked = True


def _avoid_compiled_ops(cuda: bool) -> None:
    """On CPU, DeepSpeed would compile a shared-memory op at its first start; without it, gloo does the work."""
    if cuda:
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    vars(deepspeed.ops)["__compatible_ops__"] = {}


def _die_with_parent() -> None:
    """No rank outlives its launcher (torchrun gives each rank a session of its own)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
