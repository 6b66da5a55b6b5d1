"""A generation configuration that transformers can save.

In: a generation configuration's keys. Out: the same with the least change after which transformers saves it.
Llama-2-chat and Vicuna have `temperature` and `top_p` without `do_sample`: transformers loads that and refuses to save
it. The publisher means sampling, and servers sample by those numbers; so `do_sample` is set, as transformers advises.
"""

from pathlib import Path
from typing import Any

from sft_core.errors import ModelError
from sft_core.quiet import transformers_silent

FILE = "generation_config.json"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""What means something only where tokens are sampled."""


def saveable_generation(folder: Path) -> tuple[dict[str, Any], str]:
    """The configuration of a model folder, and in words what was changed of the file ('' for nothing). Empty where
    there is no file. ModelError if it cannot be saved whatever is said of sampling.
    """
    from sft_core.base_check import read_json

    path = folder / FILE
    return saveable(read_json(path), str(path)) if path.is_file() else ({}, "")


def saveable(values: dict[str, Any], source: str) -> tuple[dict[str, Any], str]:
    """The same for the keys of `source`, which messages name."""
    why = _refusal(values)
    if not why:
        return values, ""
    pad = values.get("pad_token_id")
    if isinstance(pad, int) and pad < 0:
        values, more = saveable({key: value for key, value in values.items() if key != "pad_token_id"}, source)
        return values, "; ".join(filter(None, (f"{FILE} has pad_token_id {pad}, which is left out", more)))
    flags = [key for key in SAMPLING if values.get(key) is not None]
    sampled = {**values, "do_sample": True}
    named = ", ".join(f"{key} {values[key]}" for key in flags)
    if flags and "do_sample" not in values and values.get("temperature") != 0 and not _refusal(sampled):
        return sampled, f"{FILE} has {named} without do_sample, which transformers refuses to save: do_sample is set"
    greedy = {key: value for key, value in values.items() if key not in (*SAMPLING, "do_sample")}
    if flags and not _refusal(greedy):
        return greedy, f"{FILE} has {named}, which transformers refuses to save: left out, so answers are greedy"
    raise ModelError(f"{source}: transformers refuses to save it ({why}); mend that key, or remove the file")


def _refusal(values: dict[str, Any]) -> str:
    """Why transformers would not save it; '' if it would."""
    from transformers import GenerationConfig

    try:
        with transformers_silent():
            GenerationConfig(**values).validate(strict=True)
    except (ValueError, TypeError) as error:
        lines = [line.strip("- ") for line in str(error).splitlines() if line.strip()]
        return lines[1] if len(lines) > 1 and "`" in lines[1] else (lines or ["no reason given"])[0]
    return ""
