"""The weights that a model's files hold, against those that its architecture has.

In: `config.json` and the files' headers. Out: notes, or ModelError. transformers itself loads the model on the meta
device, from tensors without numbers: renamed, joined (experts) and tied weights are judged by the rules of the real
load. Source: `transformers.PreTrainedModel.from_pretrained` with `state_dict` and `output_loading_info`.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from sft_core.base_check.weights import Header
from sft_core.convert.skeleton import skeleton
from sft_core.errors import ModelError
from sft_core.quiet import transformers_silent

AGAIN = "Fetch the base model again, or take a config.json and weights that were saved together"


def compare_weights(model: str, folder: Path, headers: Mapping[str, Header]) -> tuple[list[str], frozenset[str]]:
    """Notes, and the names that the architecture has no place for. ModelError if a weight is missing, stands under
    another name, or has another shape. `model`: what messages call it; `folder` has its config.json.
    """
    for name, header in headers.items():
        header.require_unquantized(model, name)
    built = skeleton(folder, trust_remote_code=False)
    report = _load_without_numbers(built, headers)
    missing, unused = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    whole = len(built.state_dict())
    architecture = type(built).__name__
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"base model {model}: {name} has the shape {_shape(found)} in the files, and {_shape(expected)} by "
            f"config.json ({architecture}). {AGAIN}"
        )
    if missing:
        others = f" They hold {_listed(unused)}, for which it has no place." if unused else ""
        raise ModelError(
            f"base model {model}: its files lack {_listed(missing)} of the {whole} weights of {architecture}, which "
            f"would begin as random numbers.{others} {AGAIN}"
        )
    if report["error_msgs"]:
        raise ModelError(f"base model {model}: {report['error_msgs'][0]} ({architecture}). {AGAIN}")
    if not unused:
        return [], frozenset()
    note = f"base model {model}: its files hold {_listed(unused)}, for which {architecture} has no place: not used"
    return [note], frozenset(unused)


def _load_without_numbers(built: Any, headers: Mapping[str, Header]) -> dict[str, Any]:
    tensors = {name: torch.empty(h.shape, dtype=h.dtype, device="meta") for name, h in headers.items()}
    with transformers_silent():
        _, report = type(built).from_pretrained(
            None,
            config=built.config,
            state_dict=tensors,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    found: dict[str, Any] = report
    return found


def _listed(names: Collection[str]) -> str:
    """`lm_head.weight`, or `a.weight, b.weight and 7 more`."""
    first = list(names)[:2]
    return ", ".join(first) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _shape(shape: Any) -> str:
    return str(tuple(shape))
