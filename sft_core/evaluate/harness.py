"""Tasks of EleutherAI's lm-evaluation-harness, by its own runner. Optional: the extra `harness` (package `lm_eval`).

In: a model folder, names of tasks or YAML files of one's own. Out: figures, `task/metric` each. Source: the package's
`simple_evaluate`; a file is found by its `task:` key in the file's folder.
"""

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sft_core.errors import RecipeError
from sft_core.fingerprint import hash_folder
from sft_core.recipe import EvaluateConfig
from sft_core.trust import require_code_file

TASK_KEY = re.compile(r"^task:\s*[\"']?([\w.-]+)", re.MULTILINE)
MISSING = "evaluate.harness_tasks needs lm-evaluation-harness; install the extra: pip install 'sft-flows[harness]'"


def harness_parts(tasks: Sequence[str]) -> dict[str, Any]:
    """For the fingerprint: the library's version, and of a file all that lies in its folder."""
    if not tasks:
        return {}
    try:
        library = version("lm_eval")
    except PackageNotFoundError:
        raise RecipeError(MISSING) from None
    files = {task_name(task): hash_folder(Path(task).parent) for task in tasks if _is_file(task)}
    return {"lm_eval": library, "tasks": [task_name(task) for task in tasks], "files": files}


def run_harness(folder: Path, config: EvaluateConfig, *, trust_remote_code: bool = False) -> dict[str, float]:
    """Run `config.harness_tasks` on the model in `folder`."""
    if not config.harness_tasks:
        return {}
    try:
        import lm_eval  # type: ignore[import-untyped]  # slow to import, and optional
        from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
    except ImportError as error:
        raise RecipeError(MISSING) from error
    names = [task_name(task) for task in config.harness_tasks]
    files = [Path(task).resolve() for task in config.harness_tasks if _is_file(task)]
    manager = TaskManager(
        include_path=sorted({str(file.parent) for file in files}) or None,
        include_defaults=len(files) < len(config.harness_tasks),
    )
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": trust_remote_code},
        tasks=names,
        limit=config.harness_limit,
        batch_size=config.batch_size,
        device=_device(),
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=0,
    )
    return _figures(found["results"])


def task_name(task: str) -> str:
    """The name of a task; of a YAML file the one after its `task:`."""
    if not _is_file(task):
        return task
    path = Path(task)
    if not path.is_file():
        raise RecipeError(f"evaluate.harness_tasks: no file {path} (looked in {Path.cwd()})")
    require_code_file(path, "evaluate.harness_tasks")  # a task's `!function` is code
    found = TASK_KEY.search(path.read_text("utf-8"))
    if found is None:
        raise RecipeError(f"evaluate.harness_tasks: {path} has no line `task: NAME`")
    return found[1]


def _figures(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """`{"mine": {"acc,none": 0.5, "alias": "mine"}}` to `{"mine/acc": 0.5}`.

    >>> _figures({"mine": {"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "mine"}})
    {'mine/acc': 0.5}
    """
    return {
        f"{task}/{key.removesuffix(',none').replace(',', '_')}": float(value)
        for task, figures in results.items()
        for key, value in figures.items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    }


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
