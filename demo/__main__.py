"""`python -m demo`: make a tiny base model, then run the whole retraining on it, as `sft run demo` does.

Everything it makes is below `.demo/` of the current directory: base model, store, MLflow and Prefect databases.
"""

import os
import sys
import time
from pathlib import Path

from cli.environment import quiet_libraries, set_defaults

HOME = Path(".demo")
BASE_MODEL = HOME / "base"


def main() -> None:
    """The demo; arguments go to `sft run`, such as `--set train.learning_rate=1e-3`."""
    set_defaults()
    quiet_libraries()
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(HOME / 'mlflow.db').resolve()}")
    os.environ.setdefault("PREFECT_HOME", str((HOME / "prefect").resolve()))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for one another
    if not (BASE_MODEL / "config.json").exists():
        _make_base_model()
    from cli.main import main as sft

    sys.argv = ["sft", "run", "demo", *sys.argv[1:]]
    sft()


def _make_base_model() -> None:
    import torch

    from demo.base_model import make_base_model

    torch.set_num_threads(os.cpu_count() or 1)  # nothing else runs yet
    print("making a tiny base model: pretraining it on plain text (about 20 s)", flush=True)
    clock = time.monotonic()
    unfinished = BASE_MODEL.with_name("base.unfinished")
    make_base_model(unfinished)
    unfinished.rename(BASE_MODEL)
    print(f"made {BASE_MODEL} in {time.monotonic() - clock:.0f} s", flush=True)


if __name__ == "__main__":
    main()
