"""All files of a merged model beside its weights: configuration, stop tokens, tokenizer, model card.

In: base folder, adapter folder, chat template. Out: files that make the folder load, chat and stop as trained.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from sft_core.base_check.generation import saveable_generation
from sft_core.convert.tokenizer import copy_tokenizer, has_tokenizer
from sft_core.errors import ModelError
from sft_core.merge import MergeOptions
from sft_core.merge.adapter import Adapter
from sft_core.pack import stop_token_ids


def tokenizer_folder(adapter: Path, base: Path) -> Path:
    """The adapter's tokenizer goes before the base's. ModelError if neither has one."""
    source = adapter if has_tokenizer(adapter) else base
    if not has_tokenizer(source):
        raise ModelError(
            f"no tokenizer in the adapter {adapter} nor in the base {base}; copy the one of the training there"
        )
    return source


def write_companions(
    base: Path, tokenizer: Path | None, out: Path, options: MergeOptions, changes: dict[str, Any]
) -> dict[str, Any]:
    """Write everything but weights and card; the generation configuration as written.

    `tokenizer`: the folder to take it from; None for the base. `changes`: keys of config.json that are not the base's.
    """
    config = {**_read_json(base / "config.json"), **changes}
    config.pop("quantization_config", None)
    if "dtype" in changes:
        config.pop("torch_dtype", None)
    _write_json(out / "config.json", config)
    for code in sorted(base.glob("*.py")):  # models with code of their own
        shutil.copyfile(code, out / code.name)
    copy_tokenizer(tokenizer or tokenizer_folder(base, base), out)
    loaded = load_tokenizer(out, options)
    if options.chat_template is not None:
        (out / "chat_template.jinja").write_text(options.chat_template, "utf-8")
        loaded = load_tokenizer(out, options)
    generation = _generation_config(base, config, loaded)
    _write_json(out / "generation_config.json", generation)
    return generation


def load_tokenizer(folder: Path, options: MergeOptions) -> Any:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)


def write_card(out: Path, adapter: Adapter, facts: dict[str, Any]) -> None:
    """README.md: what the model was made of."""
    certificate = json.dumps(facts["certificate"], indent=2, sort_keys=True)
    measured = facts["certificate"]["certified"]
    claim = (
        "Certified: the merged model against the adapter on the base it was trained on, on held-out rows."
        if measured
        else "Not certified: the merged model was not measured against the adapter on the base it was trained on."
    )
    text = f"""---
{adapter.base.metadata()}library_name: transformers
tags: [sft-flows, lora, merged]
---

A LoRA adapter merged into its base model by sft-flows.

- base model: {adapter.base.words()}
- adapter: `{adapter.fingerprint}` (SHA-256)
- base weights: {facts["base_weights"]}
- tensors: {facts["merged"]} merged of {facts["tensors"]}, {facts["saved"]} trained whole, {facts["dequantized"]} \
dequantised
- merged by: {facts["merged_by"]}

{claim}

```json
{certificate}
```
"""
    (out / "README.md").write_text(text, "utf-8")


def _generation_config(base: Path, config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The base's, in a form that can be saved again, with every token that may end a turn. `_from_model_config` would
    have transformers ignore it."""
    generation, _ = saveable_generation(base)
    generation.pop("_from_model_config", None)
    template = tokenizer.chat_template
    ends = stop_token_ids(tokenizer, template) if isinstance(template, str) else [tokenizer.eos_token_id]
    stops = [*_as_list(generation.get("eos_token_id", config.get("eos_token_id"))), tokenizer.eos_token_id, *ends]
    unique = list(dict.fromkeys(stop for stop in stops if stop is not None))
    if unique:
        generation["eos_token_id"] = unique if len(unique) > 1 else unique[0]
    if generation.get("bos_token_id") is None and tokenizer.bos_token_id is not None:
        generation["bos_token_id"] = tokenizer.bos_token_id
    if generation.get("pad_token_id") is None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.get("pad_token_id")
        generation["pad_token_id"] = pad if pad is not None else next(iter(unique), None)
    return generation


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); it must be part of a Hugging Face model folder") from None
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
