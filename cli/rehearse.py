"""`sft run --rehearse`: the retraining flow on a recipe made from the recipe, in a scratch folder.

In: a resolved recipe. Out: a summary of what was rehearsed and what was not, or the error of the step that failed. The
store, Prefect's home and MLflow's database are the scratch folder's; the user's are out of reach meanwhile.
"""

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cli.environment import DEFAULTS
from sft_core import stop
from sft_core.errors import SftError
from sft_core.terminal import say

OWN_SERVERS = ("PREFECT_", "MLFLOW_")
"""Environment variables that name the user's servers, homes and runs begin so."""


def rehearse(recipe: Any, stand_in_rows: Sequence[Path], keep: bool, start: Callable[[str], Any]) -> None:
    """Rehearse `recipe`; `start` runs the retraining of a recipe file. The scratch folder is deleted unless `keep` or a
    failure needs it."""
    from cli.console import SafeConsole

    clock = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="sft-rehearsal-"))
    _say(f"rehearsing {recipe.name} in {scratch}: neither your store, your registry nor a GPU is touched")
    remove = partial(shutil.rmtree, scratch, ignore_errors=True)
    atexit.register(remove)  # before Prefect is imported: at exit, its server is stopped first
    try:
        with scratch_environment(scratch):
            _rehearse(SafeConsole(), recipe, stand_in_rows, scratch, start)
    except BaseException as error:
        keep = keep or ((scratch / "store").exists() and stop.asked() is None)
        if isinstance(error, SftError):
            _say(f"the rehearsal failed after {time.monotonic() - clock:.0f} s")
        raise
    finally:
        if keep:
            atexit.unregister(remove)
            _say(f"kept: {scratch} (the recipe as run, store, base model, databases of MLflow and Prefect)")
    say(f"rehearsed in {time.monotonic() - clock:.0f} s")


@contextmanager
def scratch_environment(scratch: Path) -> Iterator[None]:
    """Prefect and MLflow, imported from here on, know the scratch folder only; CUDA has no device."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(OWN_SERVERS) and name not in DEFAULTS:
            del os.environ[name]
    os.environ |= {
        "PREFECT_HOME": str(scratch / "prefect"),
        "PREFECT_PROFILES_PATH": str(scratch / "prefect" / "profiles.toml"),
        "PREFECT_API_URL": "",  # not the one of a prefect.toml either
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{scratch / 'prefect.db'}",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{scratch / 'mlflow.db'}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _rehearse(
    console: Any, recipe: Any, stand_in_rows: Sequence[Path], scratch: Path, start: Callable[[str], Any]
) -> None:
    from cli.rehearsal_summary import print_rehearsal, print_steps
    from sft_core.plan import plan_recipe
    from sft_core.recipe.show import as_yaml
    from sft_core.rehearse import prepare_rehearsal

    rehearsal = prepare_rehearsal(recipe, scratch, stand_in_rows, _say)
    file = scratch / f"{recipe.name}.yaml"  # the flow run is named by it
    file.write_text(as_yaml(rehearsal.recipe), "utf-8")
    plan = plan_recipe(rehearsal.recipe)
    try:
        result = start(str(file))
    except SftError:
        print_steps(console, rehearsal.recipe, plan, None)
        raise
    print_rehearsal(console, recipe, rehearsal, plan, result)


def _say(line: str) -> None:
    say(line, to_stderr=True)
