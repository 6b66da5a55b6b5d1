"""No secret is ever a parameter: recipes are shown in Prefect and MLflow.

In: a recipe's values. Out: RecipeError that names the key of a URL with a secret in it (`sft_core.credentials`).
"""

from collections.abc import Mapping
from typing import Any

from sft_core.credentials import holds_credential
from sft_core.errors import RecipeError


def refuse_credentials(value: Any, where: str, key: str = "") -> None:
    """Look through all texts of `value`. The message holds the key and not the URL.

    >>> refuse_credentials({"datasets": [{"path": "https://me:pw@host/rows.jsonl"}]}, "demo")
    Traceback (most recent call last):
    ...
    sft_core.errors.RecipeError: demo:
      datasets.0.path: the URL holds a credential, and a recipe is shown in Prefect and MLflow. Leave it out and put
      it into the environment of what reads it, the workers (s3://: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            refuse_credentials(inner, where, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            refuse_credentials(inner, where, f"{key}.{index}")
    elif isinstance(value, str) and holds_credential(value):
        raise RecipeError(
            f"{where}:\n  {key}: the URL holds a credential, and a recipe is shown in Prefect and MLflow. Leave it out "
            "and put\n  it into the environment of what reads it, the workers (s3://: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY)"
        )
