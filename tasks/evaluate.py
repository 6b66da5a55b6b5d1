"""Task of the step evaluate: one model + held-out Conversations -> EvaluationReport."""

from pathlib import Path, PurePosixPath
from typing import Any

from prefect import task

from tasks.run_step import STEP, Job, perform


def _run_name(parameters: dict[str, Any]) -> str:
    recipe, which, version = parameters["job"].recipe, parameters["which"], parameters["version"]
    names = {"tuned": recipe.name, "base": PurePosixPath(recipe.base_model.path).name}
    name = names.get(which) or (f"version {version}" if version else "")
    return f"evaluate {which} ({name})" if name else f"evaluate {which}"


@task(name="evaluate", task_run_name=_run_name, **STEP)  # type: ignore[arg-type]  # its protocol asks for a class
def evaluate(job: Job, which: str, champion: Path | None = None, version: str | None = None) -> Any:
    """Score `tuned`, `base`, or the `champion` whose files are in the folder given; `version` is its number."""
    return perform(job, f"evaluate/{which}", champion)
