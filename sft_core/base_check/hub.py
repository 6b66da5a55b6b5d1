"""A base on the hub, checked without its weights: small files are downloaded, and the headers of the weight files.

In: the recipe's base model. Out: notes, or ModelError. What cannot be reached is no fault here: the weights are checked
again where they are.
"""

import json
from pathlib import Path

from sft_core.base_model import DOUBLES, SAFETENSORS, SMALL_FILES
from sft_core.recipe import BaseModelConfig


def cached_folder(config: BaseModelConfig, commit: str | None) -> Path | None:
    """The snapshot on this disk, if all of its safetensors are there."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                config.path,
                revision=commit or config.revision,
                local_files_only=True,
                allow_patterns=["*.json", "*.safetensors"],
                ignore_patterns=list(DOUBLES),
            )
        )
    except Exception:  # noqa: BLE001 - the hub's client raises its HTTP library's own errors; it is not here
        return None
    single, index = (folder / name for name in SAFETENSORS)
    if single.is_file():
        return folder
    try:
        named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return folder if named and all((folder / name).is_file() for name in named) else None


def check_on_hub(config: BaseModelConfig, commit: str | None) -> tuple[str, ...]:
    """Notes; ModelError if its small files or its headers say that it is not whole."""
    from huggingface_hub import HfApi, snapshot_download

    from sft_core.base_check import REMOTE_CODE, UNREAD, check_small_files

    revision = commit or config.revision
    try:
        folder = Path(snapshot_download(config.path, revision=revision, allow_patterns=list(SMALL_FILES)))
    except Exception as error:  # noqa: BLE001 - as above
        return (f"base model {config.path}: {UNREAD.format(why=type(error).__name__)}",)
    notes = check_small_files(folder, config.trust_remote_code, config.path)
    if config.trust_remote_code:
        return (*notes, f"base model {config.path}: {REMOTE_CODE}")
    try:
        metadata = HfApi().get_safetensors_metadata(config.path, revision=revision)
    except Exception as error:  # noqa: BLE001 - as above
        return (*notes, f"base model {config.path}: {UNREAD.format(why=type(error).__name__)}")
    from sft_core.base_check.architecture import compare_weights
    from sft_core.base_check.weights import Header
    from sft_core.convert.writer import DTYPES
    from sft_core.errors import ModelError

    headers = {}
    for file, found in metadata.files_metadata.items():
        for name, tensor in found.tensors.items():
            if tensor.dtype not in DTYPES:
                raise ModelError(
                    f"base model {config.path}: {name} in {file} is stored as {tensor.dtype}: quantised on disk; take "
                    "the 16-bit model that it was made of"
                )
            headers[name] = Header(file, DTYPES[tensor.dtype], tuple(tensor.shape))
    for name, file in metadata.weight_map.items():
        if name not in headers:
            raise ModelError(f"base model {config.path}: its index says that {name} is in {file}, which lacks it")
    said, _ = compare_weights(config.path, folder, headers)
    return (*notes, *said)
