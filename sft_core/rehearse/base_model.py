"""The rehearsal's base model: tiny and random, of the real one's architecture, with its tokenizer and code.

In: the recipe's base model. Out: a model folder. Of a model on the hub only small files are downloaded, never weights.
Where the hub cannot be reached, a stand-in (see `stand_in`); a name that the hub refuses is an error.
"""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_core.base_model import SMALL_FILES
from sft_core.errors import ModelError
from sft_core.recipe import BaseModelConfig
from sft_core.rehearse.stand_in import family_of, stand_in_config, stand_in_tokenizer
from sft_core.rehearse.tiny import shrink, write_tiny_model

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyBase:
    """A tiny model folder. `real_config` is the transformers configuration of the model it rehearses, if known."""

    folder: Path
    architecture: str
    real_config: Any | None
    trust_remote_code: bool
    stand_in: str | None = None
    """Why the tokenizer and the architecture are not the real ones."""
    chat_template: str | None = None
    """Shipped name of the stand-in's own chat template."""


def make_tiny_base(
    base: BaseModelConfig, chat_template: str | None, texts: Iterable[str], seed: int, out: Path
) -> TinyBase:
    """Write the folder `out`. `chat_template`: Jinja text of the recipe, None for the tokenizer's own. ModelError if
    the model is named wrongly, or if transformers cannot build it."""
    source, reason = small_files(base)
    if source is None:
        return _make_stand_in(base.path, chat_template, texts, (seed, out, reason))
    for pattern in SMALL_FILES[1:]:
        for file in source.glob(pattern):
            out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / file.name)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=base.trust_remote_code)
        tiny = shrink(config)
        write_tiny_model(tiny, out, seed, base.trust_remote_code)
    except Exception as error:  # noqa: BLE001 - configurations and remote code raise anything
        raise ModelError(
            f"base_model.path {base.path!r}: no tiny model of this architecture can be built: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}. Where the real one loads, its rehearsal is what lacks"
        ) from error
    return TinyBase(
        folder=out,
        architecture=_architecture(tiny),
        real_config=config,
        trust_remote_code=base.trust_remote_code,
    )


def _make_stand_in(
    name: str, chat_template: str | None, texts: Iterable[str], where: tuple[int, Path, str]
) -> TinyBase:
    seed, out, reason = where
    family = family_of(name)
    tokenizer = stand_in_tokenizer(family, chat_template, texts)
    tiny = shrink(stand_in_config(family, tokenizer))
    write_tiny_model(tiny, out, seed)
    tokenizer.save_pretrained(out)
    return TinyBase(
        folder=out,
        architecture=_architecture(tiny),
        real_config=None,
        trust_remote_code=False,
        stand_in=reason,
        chat_template=family.chat_template,
    )


def small_files(base: BaseModelConfig) -> tuple[Path | None, str]:
    """The folder with the real model's small files, or None and why there is none."""
    folder = Path(base.path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"base_model.path {folder.resolve()}: no config.json; it must be a Hugging Face folder")
        return folder, ""
    if not HUB_ID.fullmatch(base.path):
        raise ModelError(f"base_model.path {base.path!r}: no such folder ({folder.resolve()}), and not a hub id")
    from huggingface_hub import snapshot_download  # slow to import
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(base.path, revision=base.revision, allow_patterns=list(SMALL_FILES))), ""
    except HfHubHTTPError as error:
        raise ModelError(
            f"base_model.path {base.path!r}: the hub refuses it: {type(error).__name__}: "
            f"{str(error).splitlines()[0]}. Check the name and the revision; for a gated model ask for access on the "
            "hub and set HF_TOKEN"
        ) from error
    except Exception as error:  # noqa: BLE001 - the hub's client raises its HTTP library's own errors
        return None, f"it is not on this machine, and the hub cannot be reached ({type(error).__name__})"


def _architecture(config: Any) -> str:
    """For people: `LlamaForCausalLM, 2 layers, hidden size 64`."""
    text = config.get_text_config()
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    of = f", {experts} experts" if experts else ""
    return f"{config.model_type}, {text.num_hidden_layers} layers, hidden size {text.hidden_size}{of}"
