"""One training rank: `python -m sft_core.train.worker SPEC.json DDP_TIMEOUT`, started by `sft_core.train.launch`.

In: a `TrainSpec`. Out: Trainer checkpoints below `spec.checkpoints`, `metrics.jsonl`, progress lines on stdout. Knows
neither Prefect nor MLflow. Exit status: 0 done; 1 a fault, named by a line `fault: ...`; 75 stopped by SIGTERM, all
finished optimizer steps saved.
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

from sft_core.children import PR_SET_PDEATHSIG

EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: state was saved, the same command goes on from there."""
FAULT = "fault: "
"""Begins the line that names a user's fault; a JSON text follows."""
LOST = "lost: "
"""Begins the line of a rank that waited for others in vain; a JSON text follows."""
STOPPED = "stopped: "
"""Begins a rank's last line after EXIT_STOPPED, which torchrun would hide behind a status of its own."""


def main(spec_path: str, ddp_timeout: float) -> int:
    """Train to the end, or to a SIGTERM. Ranks wait for one another for `ddp_timeout` seconds at most."""
    _die_with_parent(spec_path)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which asks for a stop
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from sft_core.errors import SftError  # after the environment is set
    from sft_core.memory_faults import ADVICE, memory_fault
    from sft_core.quiet import quiet_libraries
    from sft_core.train.launcher import end_without, launcher_of
    from sft_core.train.ranks import RANKS, Heart, waited_in_vain
    from sft_core.train.spec import TrainSpec

    quiet_libraries()
    beats = Path(spec_path).parent / RANKS
    heart = Heart(beats, os.environ.get("RANK", "0"), ddp_timeout)  # beats while torch loads
    try:
        spec = TrainSpec.read(Path(spec_path))
        _leave_out(spec)
        end_without(beats / launcher_of(os.environ), spec.silence_seconds, FAULT)
        status = run(spec, heart, ddp_timeout)
        if status == EXIT_STOPPED:
            print(f"{STOPPED}saved", flush=True)
        heart.end()
        return status
    except SftError as error:
        print(FAULT + json.dumps(str(error)), flush=True)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        message = f"{error}; make room there, and the same command goes on from the newest checkpoint"
        print(FAULT + json.dumps(message), flush=True)
        return 1
    except (RuntimeError, MemoryError) as error:
        if (words := memory_fault(error)) is not None:
            print(FAULT + json.dumps(f"{words}; {ADVICE}"), flush=True)
            return 1
        if os.environ.get("WORLD_SIZE", "1") == "1" or not waited_in_vain(error):
            raise
        why = str(error).partition("\n")[0]
        print(LOST + json.dumps(f"rank {os.environ['RANK']} waited for other ranks in vain ({why})"), flush=True)
        return 1


def _leave_out(spec: Any) -> None:
    """What libraries would import because it is installed, and this rank has no use for: seconds of each start."""
    unused = ["mlflow"]
    if not spec.trust_remote_code:  # a model's own code may import what it likes
        unused.append("scipy")
        unused += ["bitsandbytes"] if spec.config.quantization == "none" else []
        unused += ["deepspeed"] if spec.config.deepspeed is None else []
    sys.modules.update(dict.fromkeys(unused, None))  # type: ignore[arg-type]


def run(spec: Any, heart: Any, ddp_timeout: float) -> int:
    """Build model, data and Trainer for this rank; train; leave a complete checkpoint of the last step."""
    _look_at_device(spec)  # imports torch: slow, and after PDEATHSIG
    import transformers

    from sft_core.pack import load_packed
    from sft_core.train.arguments import training_arguments
    from sft_core.train.best import stopped_early
    from sft_core.train.checkpoints import step_of
    from sft_core.train.evaluation import open_evaluation
    from sft_core.train.machine import naming_limits
    from sft_core.train.pulse import Pulse
    from sft_core.train.run_log import RunLog
    from sft_core.train.sequence_parallel import across_ranks
    from sft_core.train.spec import MAPPED
    from sft_core.train.stopping import Stopping
    from sft_core.train.stream import PackedStream
    from sft_core.train.trainer import PackedTrainer
    from sft_core.train.watch import StepWatch

    transformers.utils.logging.set_verbosity_error()
    pulse = Pulse(heart, ddp_timeout)
    packed = load_packed(Path(spec.packed), cache=Path(spec.checkpoints) / MAPPED)  # mapped, shared by ranks
    spec, split_notes = _settle(spec, packed.max_length, pulse)
    config = spec.config
    rows = config.rows_at_once * (int(os.environ.get("WORLD_SIZE", 1)) // config.sequence_parallel_size)
    stream = PackedStream(packed, config.num_train_epochs, rows)  # all ranks' rows of a micro-batch together
    max_steps = config.max_steps or math.ceil(stream.rows / (rows * config.gradient_accumulation_steps))
    arguments = pulse.join(training_arguments(spec, max_steps))  # before the model: ZeRO-3 partitions while loading
    transformers.set_seed(spec.seed)
    model, loss_way = _load_model(spec, split_notes, speaks=arguments.process_index == 0)
    log = RunLog(spec, max_steps, packs=packed.packing != "none")
    trainer = PackedTrainer(
        model,
        arguments,
        stream,
        StepWatch(packed, stream, Path(spec.conversations) if spec.conversations else None),
        log,
        loss_way,
    )
    stop = Stopping(trainer)
    trainer.across = across_ranks(config.sequence_parallel_size)
    resume = _newest_checkpoint(spec, arguments)
    log.start(resume, speaks=arguments.process_index == 0)
    if arguments.process_index == 0 and (warmup := arguments.get_warmup_steps(max_steps)):
        first = config.learning_rate / (warmup + 1)
        print(f"note: warm-up: {warmup} of {max_steps} optimizer steps, the first at {first:.3g}", flush=True)
    if resume and (step_of(resume) >= max_steps or stopped_early(resume, config.early_stopping_patience)):
        return 0  # it was killed before its result was taken; the Trainer would take one step more
    if config.eval_steps is not None:
        trainer.add_callback(open_evaluation(spec, trainer, packed, max_steps))
    trainer.add_callback(stop)
    trainer.add_callback(pulse)  # last: it looks at what the others ask for
    with naming_limits(config, packed.max_length):
        trainer.train(resume_from_checkpoint=_begin_at(resume, spec))
    return EXIT_STOPPED if stop.asked and trainer.state.global_step < max_steps else 0


def _settle(spec: Any, max_length: int, pulse: Any) -> tuple[Any, list[str]]:
    """The spec with numbers for what the recipe leaves to the run, and notes. Ranks are joined before: they agree."""
    import torch

    from sft_core.train.arguments import training_arguments
    from sft_core.train.settle import is_open, provisional, settle

    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and is_open(spec.config):
        pulse.join(training_arguments(provisional(spec), 1))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    return settle(spec, max_length, device, ranks)


def _load_model(spec: Any, chosen: list[str], speaks: bool) -> tuple[Any, Any]:
    """The model with what is trained of it, and how its loss is taken. `speaks`: say what was chosen, and why, after
    what was `chosen` before."""
    import torch

    from sft_core.train.attention import use_packed_attention
    from sft_core.train.fused_lora import fuse_lora
    from sft_core.train.liger import use_liger
    from sft_core.train.loss import choose_loss
    from sft_core.train.model import load_trainable

    model, notes = load_trainable(spec.base_model, spec.config, spec.trust_remote_code, Path(spec.checkpoints))
    attention, why_attention = use_packed_attention(model, spec.config.sequence_parallel_size)
    kernels = fuse_lora(model) if spec.config.lora is not None and spec.config.fused_lora else ""
    if spec.config.use_liger_kernel and torch.cuda.is_available():
        kernels = ", ".join(filter(None, [kernels, use_liger(model)]))
    loss_way, why_loss = choose_loss(model)
    kernels = f", {kernels}" if kernels else ""
    notes.append(f"note: attention {attention} ({why_attention}), loss {loss_way} ({why_loss}){kernels}")
    if speaks:
        print("\n".join([*notes, *chosen]), flush=True)
    return model, loss_way


def _newest_checkpoint(spec: Any, arguments: Any) -> Path | None:
    """Rank 0 deletes torn ones, of all machines, and makes what another number of ranks begins from."""
    from sft_core.train.checkpoints import newest_complete
    from sft_core.train.world_size import resize

    with arguments.main_process_first(local=False):
        newest = newest_complete(Path(spec.checkpoints))
        if newest and spec.resize and arguments.process_index == 0:
            resize(newest)
    return newest


def _begin_at(newest: Path | None, spec: Any) -> str | None:
    import transformers

    from sft_core.train.checkpoints import step_of
    from sft_core.train.world_size import resized

    if newest is None or not spec.resize:
        return str(newest) if newest else None
    transformers.set_seed(spec.seed + step_of(newest))  # the numbers that were saved are other ranks'
    return str(resized(newest))


def _look_at_device(spec: Any) -> None:
    """Before DeepSpeed is imported: it is there, and DeepSpeed will not stumble over it."""
    import torch

    from sft_core.train.gpus import check_cuda
    from sft_core.train.machine import be_deterministic

    check_cuda(spec.cuda)
    if spec.config.deterministic:
        be_deterministic()
    if spec.config.deepspeed is not None:
        _avoid_compiled_ops(torch.cuda.is_available())
        _avoid_nvml()


def _avoid_compiled_ops(cuda: bool) -> None:
    """On CPU, DeepSpeed would compile a shared-memory op at its first start; without it, gloo does the work."""
    if cuda:
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    vars(deepspeed.ops)["__compatible_ops__"] = {}


def _avoid_nvml() -> None:
    """Where nvidia-ml-py is installed, DeepSpeed takes every entry of CUDA_VISIBLE_DEVICES for a number, and fails on
    UUIDs and MIG names. It asks NVML for free memory alone, and torch where there is no NVML."""
    from deepspeed.accelerator import cuda_accelerator, get_accelerator

    get_accelerator()  # its making looks for NVML
    vars(cuda_accelerator)["pynvml"] = None


def _die_with_parent(spec_path: str) -> None:
    """No rank outlives its launcher (torchrun gives each rank a session of its own)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # it may have ended before that call; its command line names the spec
        parent = Path(f"/proc/{os.getppid()}/cmdline")
        if not parent.exists() or spec_path.encode() not in parent.read_bytes():
            sys.exit(1)


if __name__ == "__main__":
    ended = main(sys.argv[1], float(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)  # all is saved; in the interpreter's own shutdown, threads of libraries were seen to abort it
