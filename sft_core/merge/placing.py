"""Which tensor of the base each edit of an adapter belongs to. Every edit is placed, or it is an error.

In: the base's files, the adapter, the model without data. Out: for each output file its tensors and what is done to
each. Names differ where transformers renames at load (prefixes, `block_sparse_moe`); tied weights have two names and
one tensor, and part ways where the adapter changes one of them.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sft_core.convert.skeleton import published
from sft_core.errors import ModelError
from sft_core.merge.adapter import Adapter, TokenRows, Update
from sft_core.merge.shards import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """What becomes of one tensor: copied if nothing is set."""

    place: Place
    update: Update | None = None
    saved: torch.Tensor | None = None
    rows: TokenRows | None = None
    dequantize: bool = False

    @property
    def copied(self) -> bool:
        """True if the bytes stay."""
        return self.update is None and self.saved is None and self.rows is None and not self.dequantize


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`shards`: file of the base -> name -> edit, in order. `fused`: what the stream cannot place, for PEFT's merge."""

    shards: dict[str, dict[str, Edit]]
    config: dict[str, Any] = field(default_factory=dict)
    fused: str | None = None


def plan_edits(
    shards: dict[str, dict[str, Place]], adapter: Adapter, model: Any, dequantize: frozenset[str], base: Path
) -> Plan:
    """Place every edit. ModelError if the base lacks a weight or has it in another shape."""
    places = {name: place for found in shards.values() for name, place in found.items()}
    names = _Names(model, frozenset(places), base)
    updates = {f"{module}.weight": update for module, update in adapter.updates.items()}
    saved, copies = _tied_in_training(model, adapter)
    both = sorted((updates.keys() & saved.keys()) | (adapter.rows.keys() & {*updates, *saved}))
    if both:
        raise ModelError(f"{adapter.folder}: {both[0]} is trained in two ways at once; only one can be merged")
    fused = [live for live in (*updates, *saved, *adapter.rows, *dequantize) if names.is_fused(live)]
    if fused:
        return Plan(shards={}, fused=f"the base's files hold {fused[0]} in parts")
    for live, copy in copies.items():
        _check_copy(live, copy, places[names.find(_first_name(model, live))], adapter)
    edits: dict[str, Edit] = {}
    untied = _untie(model, names, updates, saved, places)
    for live in sorted({*updates, *saved, *adapter.rows, *dequantize}):
        name = untied.get(live) or names.find(live)
        place = places[names.find(_first_name(model, live)) if live in untied else name]
        edits[name] = _edit(name, place, updates.get(live), saved.get(live), live in dequantize)
        if live in adapter.rows:
            edits[name] = _with_rows(edits[name], name, adapter.rows[live])
    for live, name in untied.items():
        edits.setdefault(name, Edit(place=places[names.find(_first_name(model, live))]))
    planned = {
        shard: {name: edits.get(name) or Edit(place=place) for name, place in found.items()}
        for shard, found in shards.items()
    }
    last = planned[next(reversed(planned))]
    last.update({name: edits[name] for name in untied.values() if not any(name in found for found in planned.values())})
    return Plan(shards=planned, config={"tie_word_embeddings": False} if untied else {})


def _tied_in_training(model: Any, adapter: Adapter) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What is saved, and what is only a copy: a tied weight's second name that holds what its first was trained to
    (PEFT's `ensure_weight_tying`) is saved as well.
    """
    saved, copies = dict(adapter.saved), dict(adapter.copies)
    for second, first in _tied(model).items():
        if second in copies and first in saved and torch.equal(copies[second], saved[first]):
            saved[second] = copies.pop(second)
    return saved, copies


def _check_copy(live: str, copy: torch.Tensor, place: Place, adapter: Adapter) -> None:
    if copy.shape != place.shape or not torch.equal(copy, place.read().to(copy.dtype)):
        raise ModelError(
            f"{adapter.folder}: holds {live} {tuple(copy.shape)}, which modules_to_save does not name and which is not "
            "the base's: it would be lost in the merge, or the adapter is of another base"
        )


def _edit(name: str, place: Place, update: Update | None, saved: torch.Tensor | None, dequantize: bool) -> Edit:
    shape = update.shape if update is not None else saved.shape if saved is not None else place.shape
    if tuple(shape) != place.shape:
        raise ModelError(
            f"base: {name}: the adapter's tensor is for shape {tuple(shape)}, the weight has {place.shape}; the "
            "adapter was trained on another model"
        )
    if not place.dtype.is_floating_point or place.dtype.itemsize < 2:
        raise ModelError(f"base: {name} is stored as {place.dtype}; take the base model that is not quantised on disk")
    return Edit(place=place, update=update, saved=saved, dequantize=dequantize)


def _with_rows(edit: Edit, name: str, rows: TokenRows) -> Edit:
    shape = edit.place.shape
    if len(shape) != 2 or rows.values.shape[1] != shape[1] or not all(0 <= number < shape[0] for number in rows.ids):
        raise ModelError(
            f"base: {name}: the adapter has rows of width {rows.values.shape[1]} up to number {max(rows.ids)}, the "
            f"weight is {shape}; the adapter was trained on another model"
        )
    return replace(edit, rows=rows)


def _tied(model: Any) -> dict[str, str]:
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _first_name(model: Any, live: str) -> str:
    return _tied(model).get(live, live)


def _untie(
    model: Any, names: "_Names", updates: dict[str, Update], saved: dict[str, torch.Tensor], places: dict[str, Place]
) -> dict[str, str]:
    """Second names that need a tensor of their own: live name -> name in the output. Equal pairs stay tied."""
    untied = {}
    for second, first in _tied(model).items():
        if second in saved and first in saved and torch.equal(saved[second], saved[first]):
            del saved[second]
        elif {second, first} & {*updates, *saved}:
            untied[second] = second
        if second in untied and names.find(first) not in places:
            raise ModelError(f"base {names.base}: has no {first}")
    return untied


@dataclass(slots=True)
class _Names:
    """The model's names -> the names in the base's files."""

    model: Any
    known: frozenset[str]
    base: Path
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    def find(self, live: str) -> str:
        """ModelError if neither the model nor its files have it."""
        parts = self._parts(live)
        found = [name for name in parts if name in self.known]
        if len(found) != 1 or len(parts) != 1:
            raise ModelError(
                f"base {self.base}: has no {live}; the adapter was trained on another model, or the base lacks a file"
            )
        return found[0]

    def is_fused(self, live: str) -> bool:
        """True if the files hold it, in several tensors."""
        parts = self._parts(live)
        return len(parts) > 1 and all(name in self.known for name in parts)

    def _parts(self, live: str) -> tuple[str, ...]:
        if live in self.known:
            return (live,)
        if live not in self.shapes:
            return ()
        named = published(self.model, {live: torch.empty(self.shapes[live], device="meta")})
        prefix = f"{self.model.base_model_prefix}."
        return tuple(name if name in self.known else name.removeprefix(prefix) for name in named)
