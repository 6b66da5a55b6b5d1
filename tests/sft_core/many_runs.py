"""Training ranks that do several trainings one after the other: what a rank imports takes longer than a toy training.

torchrun --nproc_per_node=2 -m tests.sft_core.many_runs SPEC.json...

Each is what `worker.run` does; the process group stays, accelerate and transformers forget the run before.
"""

import os
import sys
from pathlib import Path

LIMIT_SECONDS = 600.0


def main(specs: list[str]) -> None:
    """AssertionError unless each ends well."""
    sys.modules.update(dict.fromkeys(("mlflow", "scipy")))  # type: ignore[arg-type]  # as the worker leaves them out
    from sft_core.quiet import quiet_libraries
    from sft_core.train.ranks import RANKS, Heart
    from sft_core.train.spec import TrainSpec
    from sft_core.train.worker import run

    quiet_libraries()
    as_started = dict(os.environ)
    for spec in map(Path, specs):
        heart = Heart(spec.parent / RANKS, os.environ.get("RANK", "0"), LIMIT_SECONDS)
        assert run(TrainSpec.read(spec), heart, LIMIT_SECONDS) == 0, spec
        heart.end()
        os.environ.clear()
        os.environ.update(as_started)
        forget()


def forget() -> None:
    """What accelerate and transformers keep of a run, whose DeepSpeed is not the next one's."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as the worker ends
