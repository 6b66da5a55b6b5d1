"""Which keys of a recipe name code, and that a recipe from a URL has none of them.

In: a recipe's values as they were read. Out: RecipeError naming the first such key, unless code from elsewhere may run
(`sft_core.trust`). Whoever writes such a recipe is not the one whose rights it runs with.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sft_core.trust import require_remote_code


def is_remote(recipe: str) -> bool:
    """Whether a recipe comes by a URL that is no file of this machine."""
    return "://" in recipe and not recipe.startswith(("file://", "local://"))


def refuse_brought_code(values: Mapping[str, Any], where: str) -> None:
    """To be called with the recipe alone, before whoever runs it sets other values.

    >>> refuse_brought_code({"datasets": [{"path": "a.jsonl", "map_fn": "alpaca"}]}, "https://host/a.yaml")
    """
    for key in code_keys(values):
        require_remote_code(f"{where}: a recipe from a URL sets {key}")


def code_keys(values: Mapping[str, Any]) -> Iterator[str]:
    """Keys that name a function, a file with code, or a model whose code is to run.

    >>> list(code_keys({"evaluate": {"scorer": "a.py:f"}, "datasets": [{"map_fn": "alpaca"}, {"map_fn": "a:f"}]}))
    ['datasets.1.map_fn', 'evaluate.scorer']
    """
    for name in ("datasets", "eval_datasets"):
        for number, source in enumerate(_list(values.get(name))):
            if ":" in str(_section(source).get("map_fn", "")):
                yield f"{name}.{number}.map_fn"
    evaluate = _section(values.get("evaluate"))
    if evaluate.get("scorer") is not None:
        yield "evaluate.scorer"
    if any(str(task).endswith((".yaml", ".yml")) for task in _list(evaluate.get("harness_tasks"))):
        yield "evaluate.harness_tasks"
    if _section(values.get("base_model")).get("trust_remote_code"):
        yield "base_model.trust_remote_code"


def _section(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []
