"""A PEFT folder as edits of weights. Sources: LoRA, arXiv 2106.09685; rank-stabilised scale, arXiv 2312.03732; DoRA,
arXiv 2402.09353; PEFT's `tuners/lora/layer.py` for the forms of embeddings and of Conv1D.

In: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`). Out: for each weight of the base what is
added to it, or what it is replaced by; and what a stream over the base's tensors cannot do, in words.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sft_core.base_check.identity import BaseIdentity, foreign_identity, recorded_identity
from sft_core.convert.reader import read_pickle
from sft_core.convert.skeleton import token_modules, transposed_modules
from sft_core.convert.trained import all_finite
from sft_core.errors import ModelError
from sft_core.fingerprint import hash_folder, hash_value
from sft_core.merge.vocabulary import require_untied_updates, resized_rows

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
"""PEFT's name before safetensors, and today's with `safe_serialization=False`."""
QUANTIZATION = "quantization.json"
PREFIX = "base_model.model."
KEY = re.compile(r"(?P<module>.+)\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<table>[AB])|(?P<m>magnitude_vector))")
ROWS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
BEYOND = (
    "lora_bias",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "megatron_config",
)
"""Settings under which the update is something other than a low-rank sum on whole modules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """W -> W + left @ right, fp32; the scale is in `left`. `magnitude` (DoRA): length of each output's row."""

    left: torch.Tensor  # (rows of W, r)
    right: torch.Tensor  # (r, columns of W)
    magnitude: torch.Tensor | None = None  # (outputs,)
    outputs: int = 0  # the axis of W that counts outputs

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight it belongs to."""
        return self.left.shape[0], self.right.shape[1]

    def transpose(self) -> "Update":
        """The same update of a weight that is stored the other way round."""
        left, right = self.right.T.contiguous(), self.left.T.contiguous()
        return Update(left=left, right=right, magnitude=self.magnitude, outputs=1 - self.outputs)


@dataclass(frozen=True, slots=True)
class TokenRows:
    """`values` (tokens, width) take the place of the rows `ids` of a weight."""

    ids: tuple[int, ...]
    values: torch.Tensor

    def put(self, first: int, rows: torch.Tensor) -> None:
        """Into `rows` of the weight, the first of which is its row `first`."""
        for place, number in enumerate(self.ids):
            if first <= number < first + len(rows):
                rows[number - first] = self.values[place].to(rows.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """`updates`: module name -> Update. `saved`: parameter name -> the tensor that takes its place. `rows`: parameter
    name -> the rows that take the place of single ones. `copies`: parameter name -> what PEFT saved of the untrained
    base (its embeddings, where they are targets), to be found there again.

    `beyond`: the settings that PEFT's own merge must see to; None if the stream can. `vocabulary`: token rows in
    training, where they are not the base's.
    """

    updates: dict[str, Update]
    saved: dict[str, torch.Tensor]
    rows: dict[str, TokenRows]
    copies: dict[str, torch.Tensor]
    beyond: str | None
    vocabulary: int | None
    quantization: dict[str, Any] | None
    fingerprint: str
    base: BaseIdentity
    """Of the base it was trained on."""
    folder: Path


def load_adapter(folder: Path, model: Any) -> Adapter:
    """Read and check a PEFT folder for the base `model` (without data). ModelError for anything but LoRA, or for a
    tensor that cannot be placed.

    Which weights are stored (in, out) is the model's to say (Conv1D in GPT-2), not the configuration's
    `fan_in_fan_out`: PEFT sets it by whichever module came last.
    """
    config = _read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA" or not config.get("r") or not config.get("lora_alpha"):
        raise ModelError(
            f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}; only LoRA with r and lora_alpha is merged"
        )
    if config.get("layer_replication"):
        raise ModelError(
            f"{folder / CONFIG}: layer_replication is set: the model has more layers than the base; only PEFT loads it"
        )
    weights, tensors = _read_tensors(folder)
    vocabulary = resized_rows(tensors, model, PREFIX, weights)
    resized = f"a vocabulary of {vocabulary} rows" if vocabulary else None
    reasons = (_beyond(config), _rows_beyond(config, tensors, model, vocabulary), resized)
    beyond = ", ".join(filter(None, reasons)) or None
    if beyond:
        _check_numbers(tensors, weights)
        require_untied_updates(tensors, model, PREFIX, weights)
    rows = {} if beyond else _take_rows(tensors, config, weights)
    edits = _edits(tensors, config, weights, transposed_modules(model)) if not beyond else ({}, {}, {})
    updates, saved, copies = edits
    quantization = folder / QUANTIZATION
    recorded = (QUANTIZATION,) if quantization.is_file() else ()
    return Adapter(
        updates=updates,
        saved=saved,
        rows=rows,
        copies=copies,
        beyond=beyond,
        vocabulary=vocabulary,
        quantization=_read_json(quantization) if recorded else None,
        fingerprint=hash_value(hash_folder(folder, {CONFIG, weights.name, *recorded}.__contains__)),
        base=recorded_identity(folder) or foreign_identity(str(config.get("base_model_name_or_path"))),
        folder=folder,
    )


def _read_tensors(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The file of the weights, and what it holds. A `.bin` file is a pickle and is read as data only."""
    if not (folder / WEIGHTS).is_file() and (folder / PICKLED).is_file():
        path, tensors = folder / PICKLED, read_pickle(folder / PICKLED)
        other = next((name for name, value in tensors.items() if not isinstance(value, torch.Tensor)), None)
        if other is not None:
            raise ModelError(f"{path}: {other} is no tensor; save the adapter as safetensors")
    else:
        path = folder / WEIGHTS
        try:
            tensors = load_file(path)
        except (SafetensorError, FileNotFoundError) as error:
            raise ModelError(f"{path}: missing or torn ({error}); convert the checkpoint again") from None
    if not tensors:
        raise ModelError(f"{path}: holds no tensors")
    return path, tensors


def _check_numbers(tensors: dict[str, torch.Tensor], weights: Path) -> None:
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise ModelError(f"{weights}: {name} holds NaN or infinity; convert an earlier checkpoint")


def _take_rows(tensors: dict[str, torch.Tensor], config: dict[str, Any], weights: Path) -> dict[str, TokenRows]:
    """Rows of single tokens, which then are no longer among the tensors. PEFT's rule: a key is the end of a name."""
    given = config.get("trainable_token_indices") or {}
    rows = {}
    for name in [name for name in tensors if ROWS.fullmatch(name)]:
        module, values = name.removesuffix(".token_adapter.trainable_tokens_delta"), tensors.pop(name)
        found = [given] if isinstance(given, list) else [ids for key, ids in given.items() if module.endswith(key)]
        if len(found) != 1 or values.dim() != 2 or len(found[0]) != len(values) or len({*found[0]}) != len(found[0]):
            raise ModelError(f"{weights}: {name} has {len(values)} rows, and trainable_token_indices is {given}")
        if not all_finite(values):
            raise ModelError(f"{weights}: {name} holds NaN or infinity; convert an earlier checkpoint")
        rows[f"{module.removeprefix(PREFIX)}.weight"] = TokenRows(tuple(found[0]), values)
    if given and not rows:
        raise ModelError(f"{weights}: trainable_token_indices is {given}, and no such rows are in it")
    return rows


def _rows_beyond(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], model: Any, vocabulary: int | None
) -> str | None:
    """Where rows of single tokens are more than rows put into one weight each: a resized vocabulary, or a tied pair
    that the adapter changes by more than the embedding's rows."""
    tokens = config.get("trainable_token_indices")
    if not tokens or not (vocabulary or getattr(model, "all_tied_weights_keys", None)):
        return None
    embedding, *others = (f"{PREFIX}{name}." for name in _tables(model))
    touched = [name for name in tensors if name.startswith((embedding, *others))]
    if not vocabulary and all(name.startswith(embedding) and ROWS.fullmatch(name) for name in touched):
        return None
    return f"trainable_token_indices = {tokens!r}"


def _tables(model: Any) -> list[str]:
    """The input embedding first."""
    inputs = model.get_input_embeddings()
    return sorted(token_modules(model), key=lambda name: model.get_submodule(name) is not inputs)


def _beyond(config: dict[str, Any]) -> str | None:
    set_ones = [f"{key} = {config[key]!r}" for key in BEYOND if config.get(key)]
    if config.get("bias") not in (None, "none"):
        set_ones.append(f"bias = {config['bias']!r}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "lora_ga")):
        set_ones.append(f"init_lora_weights = {start!r}")  # the base was changed before training
    return ", ".join(set_ones) or None


def _edits(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], weights: Path, transposed: frozenset[str]
) -> tuple[dict[str, Update], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    saved: dict[str, torch.Tensor] = {}
    copies: dict[str, torch.Tensor] = {}
    _check_numbers(tensors, weights)
    for name, tensor in tensors.items():
        match = KEY.fullmatch(name)
        if not name.startswith(PREFIX):
            raise ModelError(f"{weights}: {name} is no name of PEFT's; it would be lost in the merge")
        if match is None:
            kept = saved if _is_saved(name, config) else copies
            kept[name.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
            continue
        kind = match["side"] or (match["table"] and f"embedding_{match['table']}") or "magnitude"
        parts.setdefault(match["module"].removeprefix(PREFIX), {})[kind] = tensor
    updates = {}
    for module, found in parts.items():
        updates[module] = _update(module, found, config, weights)
        if module in transposed:
            updates[module] = updates[module].transpose()
    return updates, saved, copies


def _is_saved(name: str, config: dict[str, Any]) -> bool:
    """PEFT's rule: the module's name ends in one of `modules_to_save`."""
    return name.rpartition(".")[0].endswith(tuple(config.get("modules_to_save") or ()))


def _update(module: str, found: dict[str, torch.Tensor], config: dict[str, Any], where: Path) -> Update:
    table = "embedding_A" in found or "embedding_B" in found
    sides = ("embedding_A", "embedding_B") if table else ("A", "B")
    wanted = {*sides, "magnitude"} if config.get("use_dora") else set(sides)
    if set(found) != wanted:
        raise ModelError(f"{where}: {module} has lora_{', lora_'.join(sorted(found))} only; the adapter is incomplete")
    a, b = (found[side].float() for side in sides)  # (r, in), (out, r)
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ModelError(f"{where}: {module}: A {tuple(a.shape)}, B {tuple(b.shape)} do not fit r = {rank}")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    magnitude = found["magnitude"].float().reshape(-1) if "magnitude" in found else None
    update = Update(left=b * scale, right=a, magnitude=magnitude)
    return update.transpose() if table else update  # an embedding is stored (in, out)


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that is, or by regular expression matches, the end of the module's name."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); its folder must be a PEFT adapter folder") from None
    return value
