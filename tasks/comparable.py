"""Whether the present champion can be compared with: asked before anything is trained, not after.

In: a registered model's name. Out: nothing, or a RegistryError that says what the champion lacks. Names of files are
listed and one small file is read; no weight is. Where the place of its files does not answer, the run goes on.
"""

import json
import logging

import mlflow

from sft_core.errors import RegistryError, SftError
from tasks.model_files import MODEL, WEIGHTS
from tasks.patience import first_line, patiently
from tasks.registry import find_champion

NEEDED = {
    "config.json": ("/config.json",),
    "weights": WEIGHTS,
    "tokenizer": ("/tokenizer.json", "/vocab.json", ".model"),
}
"""What an evaluation loads, each by the ends of the names that it may have."""
TEMPLATES, TOKENIZER_CONFIG = ("chat_template.jinja", "chat_template.json"), "tokenizer_config.json"
WAY_OUT = "take the alias champion from it, or set register.model_name to another name"


def require_comparable_champion(model_name: str) -> None:
    """RegistryError if the champion is another tool's, or lacks a file that an evaluation loads."""
    champion = find_champion(model_name)
    if champion is None:
        return
    where = f"models:/{model_name}/{champion.number}"
    try:
        lacks = _lacks(where)
    except SftError:
        raise
    except Exception as error:  # noqa: BLE001 - every place of artifacts has its own errors
        logging.getLogger(__name__).warning("%s: its files cannot be listed: %s", where, first_line(error))
        return
    if lacks is not None:
        raise RegistryError(f"{where}, the champion, has no {lacks}: nothing can be compared with it; {WAY_OUT}")


def _lacks(where: str) -> str | None:
    """What is not among a version's files."""
    folder = f"{where}/{MODEL}"
    names = _names(folder)
    if not names:  # by reference: the files lie beside MLflow's description
        folder, names = where, _names(where)
    for what, ends in NEEDED.items():
        if not any(name.endswith(ends) for name in names):
            return what
    if any(name.endswith(TEMPLATES) for name in names):
        return None
    told = json.loads(patiently(mlflow.artifacts.load_text, f"{folder}/{TOKENIZER_CONFIG}"))
    return None if told.get("chat_template") else "chat template"


def _names(folder: str) -> list[str]:
    return [f"/{file.path}" for file in patiently(mlflow.artifacts.list_artifacts, folder)]
