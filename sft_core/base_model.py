"""The base model: where its files are and what identifies them (DESIGN 3: a commit, or the hash of its files)."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sft_core.artifacts import MANIFEST
from sft_core.errors import ModelError
from sft_core.fingerprint import hash_file_once, hash_folder, hash_value
from sft_core.recipe import BaseModelConfig

MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".py")
DOUBLES = ("original/*", "consolidated*", "onnx/*")
"""What publishers put beside a model in other formats; also the `.bin` files, where there are `.safetensors`."""
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
"""One of them is there, or transformers loads the `.bin` files."""
COMMIT = re.compile("[0-9a-f]{40}")
DEMO = ".demo/base"
TOKENIZER_PREFIXES = (
    *("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template"),
    *("spiece", "sentencepiece", "tekken"),
)
SMALL_FILES = ("config.json", "generation_config.json", "*.py", *(f"{prefix}*" for prefix in TOKENIZER_PREFIXES))
"""All of a model but its weights, as patterns of names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModelDescription:
    """What a base model is: fingerprints of all of it and of its tokenizer alone, and the hub commit if it has one."""

    fingerprint: str
    tokenizer_fingerprint: str
    commit: str | None


def describe_base_model(config: BaseModelConfig) -> BaseModelDescription:
    """Identify the model without loading it. ModelError if it is neither a folder nor reachable on the hub."""
    folder = Path(config.path)
    if not folder.is_dir():
        commit = _hub_commit(config)
        return BaseModelDescription(fingerprint=commit, tokenizer_fingerprint=commit, commit=commit)
    hashes = _folder_hashes(folder)
    if "config.json" not in hashes:
        raise ModelError(f"base_model.path {folder.resolve()}: no config.json; it must be a Hugging Face model folder")
    tokenizer = {name: value for name, value in hashes.items() if _is_tokenizers(name, config)}
    return BaseModelDescription(
        fingerprint=hash_value(hashes), tokenizer_fingerprint=hash_value(tokenizer), commit=None
    )


def describe_tokenizer(config: BaseModelConfig) -> str:
    """The tokenizer's fingerprint alone, as `describe_base_model` gives it; no weight is read."""
    folder = Path(config.path)
    if not folder.is_dir():
        return _hub_commit(config)
    return hash_value(_folder_hashes(folder, lambda name: _is_tokenizers(name, config)))


def _folder_hashes(folder: Path, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, str]:
    """SHA-256 of the model's files by relative path; a file that stays as it is, is read once a process."""
    return hash_folder(folder, lambda name: _is_models(name) and wanted(name), hash_file_once)


def _is_tokenizers(name: str, config: BaseModelConfig) -> bool:
    """Whether a file decides what a text is as tokens: with trust_remote_code, any code may."""
    return name.startswith(TOKENIZER_PREFIXES) or (config.trust_remote_code and name.endswith(".py"))


def base_fingerprint(hashes: Mapping[str, str]) -> str:
    """What a folder with these files (name, SHA-256) is called as a base model."""
    return hash_value({name: value for name, value in hashes.items() if _is_models(name)})


def _is_models(name: str) -> bool:
    """A merged artifact's manifest holds times and is no part of the model."""
    return name.endswith(MODEL_SUFFIXES) and name != MANIFEST


def local_base_model(config: BaseModelConfig, commit: str | None) -> Path:
    """The folder with the model's files, downloaded from the hub at `commit` if it is not a local one."""
    folder = Path(config.path)
    if folder.is_dir():
        return folder.resolve()
    from huggingface_hub import snapshot_download  # slow to import

    def download(suffixes: tuple[str, ...]) -> Path:
        wanted = [f"*{suffix}" for suffix in suffixes]
        return Path(
            snapshot_download(config.path, revision=commit, allow_patterns=wanted, ignore_patterns=list(DOUBLES))
        )

    folder = download(tuple(suffix for suffix in MODEL_SUFFIXES if suffix != ".bin"))
    return folder if any((folder / name).is_file() for name in SAFETENSORS) else download(MODEL_SUFFIXES)


def _hub_commit(config: BaseModelConfig) -> str:
    if config.path.startswith((".", "/", "~")):  # no hub id begins so
        hint = "`sft run demo` makes it" if config.path == DEMO else "name a model folder, or a hub id"
        raise ModelError(f"base_model.path {config.path!r}: no such folder ({Path(config.path).resolve()}); {hint}")
    if COMMIT.fullmatch(config.revision or ""):
        return str(config.revision)
    from huggingface_hub import HfApi  # slow to import

    try:
        commit = HfApi().model_info(config.path, revision=config.revision).sha
    except Exception as error:  # noqa: BLE001 - the hub's client raises its HTTP library's own errors
        raise ModelError(
            f"base_model.path {config.path!r}: no such folder ({Path(config.path).resolve()}), and not reachable as a "
            f"hub id: {type(error).__name__}: {str(error).splitlines()[0].rstrip('.')}. Check the spelling, the "
            "network and, for a gated model, HF_TOKEN; offline: a folder, or a 40-digit revision"
        ) from error
    assert commit is not None, "the hub gives a commit for every revision"
    return commit
