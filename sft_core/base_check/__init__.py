"""Whether a base model is whole: its files against its architecture, before anything is trained on it.

In: a model folder, or a model on the hub. Out: notes for a person, or ModelError that says what, where and what to do.
One check for plan, rehearsal, train and merge. Of the weights only headers are read, unless the numbers are asked for.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from sft_core.errors import ModelError
from sft_core.recipe import BaseModelConfig

UNREAD = "its weights are on the hub and were not looked at ({why}); they are when they are here, before training"
REMOTE_CODE = "its architecture is code of its own (trust_remote_code): its weights are compared with it at load alone"


def check_base(config: BaseModelConfig, commit: str | None, *, numbers: bool) -> tuple[str, ...]:
    """Check what can be seen of the recipe's base without downloading weights. Notes; ModelError if it is not whole.

    `commit`: of the hub, None for the recipe's revision. `numbers`: read all weights that are on this disk, for NaN.
    """
    folder = Path(config.path)
    if folder.is_dir():
        return check_folder(folder, config.trust_remote_code, numbers=numbers)
    from sft_core.base_check.hub import cached_folder, check_on_hub

    cached = cached_folder(config, commit)
    if cached is not None:
        return check_folder(cached, config.trust_remote_code, numbers=numbers)
    return check_on_hub(config, commit)


def check_folder(
    folder: Path, trust_remote_code: bool = False, *, numbers: bool = False, whole: bool = True
) -> tuple[str, ...]:
    """Check a model folder: configuration, weights' names and shapes, and if `whole` the tokenizer and the generation
    configuration too. `numbers`: that no weight holds NaN or infinity, which reads all of it. Once a state of the
    folder and a process. Notes; ModelError.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    state = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return _checked(folder, state, trust_remote_code, numbers, whole)


@lru_cache(maxsize=32)
def _checked(
    folder: Path, state: tuple[tuple[str, int, int], ...], trust_remote_code: bool, numbers: bool, whole: bool
) -> tuple[str, ...]:
    from sft_core.base_check.architecture import compare_weights
    from sft_core.base_check.numbers import require_finite
    from sft_core.base_check.weights import weights_in

    notes = list(check_small_files(folder, trust_remote_code)) if whole else []
    found = weights_in(folder)
    if trust_remote_code:
        notes.append(f"base model {folder}: {REMOTE_CODE}")
        unused: frozenset[str] = frozenset()
    else:
        said, unused = compare_weights(str(folder), folder, {name: place.header for name, place in found.items()})
        notes += said
    if numbers:
        require_finite(folder, {name: place for name, place in found.items() if name not in unused})
    return tuple(notes)


def check_small_files(folder: Path, trust_remote_code: bool, name: str | None = None) -> tuple[str, ...]:
    """Configuration, tokenizer and generation configuration of a folder, which need no weights. `name`: what messages
    call the model, the folder by default.
    """
    from sft_core.base_check.generation import saveable_generation
    from sft_core.base_check.vocabulary import check_vocabulary

    name = name or str(folder)
    require_unquantized(name, read_json(folder / "config.json"))
    notes = () if trust_remote_code else check_vocabulary(name, folder)
    said = saveable_generation(folder)[1]
    return (*notes, f"base model {name}: {said}") if said else notes


def require_unquantized(name: str, config: dict[str, Any]) -> None:
    """ModelError if the weights on disk are quantised already."""
    text = config.get("text_config")
    quantized = config.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config"))
    if quantized:
        method = quantized.get("quant_method", "method not named") if isinstance(quantized, dict) else quantized
        raise ModelError(
            f"base model {name}: config.json has quantization_config ({method}): its weights are quantised on disk, so "
            "an adapter could not be merged into them. Take the 16-bit model that it was made of; train.quantization: "
            "nf4 quantises that at load"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the model folder. ModelError if there is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); fetch the base model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds no JSON object; fetch the base model again")
    return value
