"""A rehearsal: a recipe made from a recipe, to be run by the same flow and code on a CPU in under a minute.

In: a resolved recipe and a scratch folder. Out: `Rehearsal`: the recipe to run (tiny random base model of the same
architecture with the real tokenizer, the first rows of every source, a few optimizer steps, a scratch store), and what
was replaced. Every other key is the recipe's own. The flow is started by `cli/rehearse.py`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from sft_core.base_check import check_base
from sft_core.errors import SourceError
from sft_core.pack import load_chat_template
from sft_core.recipe import DatasetConfig, Recipe, resolve
from sft_core.recipe.resolve import merge_keys
from sft_core.rehearse.base_model import TinyBase, make_tiny_base
from sft_core.rehearse.changes import changed_sections
from sft_core.rehearse.rows import SampledRows, sample_rows, texts_of
from sft_core.terminal import say
from sft_core.train.limits import check_training

__all__ = ["ROWS", "Rehearsal", "SampledRows", "TinyBase", "prepare_rehearsal"]
ROWS = 200
"""Rows taken of each source."""
UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What to run, and what it stands for. `samples` are of the recipe's datasets, then of its eval_datasets."""

    recipe: Recipe
    base: TinyBase
    samples: tuple[SampledRows, ...]
    replaced: tuple[str, ...]
    """Lines for a person."""


def prepare_rehearsal(
    recipe: Recipe, scratch: Path, stand_in_rows: Sequence[Path] = (), on_line: Callable[[str], None] = say
) -> Rehearsal:
    """Write rows and base model below `scratch`. SftError for what a real run would refuse as well.

    `stand_in_rows`: files whose rows stand in, in order, for sources that cannot be reached; the last one for all
    further ones.
    """
    check_training(recipe.train)
    on_line(f"looking at {recipe.base_model.path}: names, shapes and numbers of its weights, its tokenizer")
    for note in check_base(recipe.base_model, None, numbers=True):
        on_line(f"note: {note}")
    template = load_chat_template(recipe.pack.chat_template) if recipe.pack.chat_template is not None else None
    on_line(f"taking the first {ROWS} rows of every source")
    samples, notes = _sample(recipe, scratch / "rows", list(stand_in_rows))
    on_line(f"making a tiny {recipe.base_model.path}")
    texts = texts_of([sample.file for sample in samples])
    base = make_tiny_base(recipe.base_model, template, texts, recipe.seed, scratch / "base")
    notes.append(f"base model: {recipe.base_model.path} -> random weights, {base.architecture}")
    if base.stand_in is not None:
        notes[-1] += f", guessed from the name: {base.stand_in}"
        notes.append(
            "tokenizer: not the real one but made of the sampled rows, with the chat template's special tokens"
        )
        if template is None:
            notes.append(f"chat template: not the model's own but the shipped {base.chat_template}, which is near")
    changes, more = changed_sections(recipe, scratch, sum(s.rows for s in samples[: len(recipe.datasets)]))
    changes["max_quarantined_fraction"] = 1.0  # all steps are rehearsed; the summary says what would fail
    counted = len(recipe.datasets)
    changes["base_model"] = {"path": str(base.folder), "revision": None, "trust_remote_code": base.trust_remote_code}
    changes["datasets"] = _datasets(recipe.datasets, samples[:counted])
    changes["eval_datasets"] = _datasets(recipe.eval_datasets, samples[counted:])
    rehearsed = resolve(merge_keys(recipe.as_dict(), changes))
    return Rehearsal(recipe=rehearsed, base=base, samples=tuple(samples), replaced=(*notes, *more))


def _sample(recipe: Recipe, folder: Path, stand_ins: list[Path]) -> tuple[list[SampledRows], list[str]]:
    folder.mkdir(parents=True)
    samples, notes = [], []
    for number, dataset in enumerate((*recipe.datasets, *recipe.eval_datasets)):
        out = folder / f"{number}-{UNSAFE.sub('-', PurePath(dataset.path).stem)}.jsonl"
        try:
            sample = sample_rows(dataset, out, ROWS)
            notes.append(f"rows: the first {sample.rows:,}{_of_all(sample)} of {dataset.path}")
        except SourceError as error:
            if not stand_ins:
                raise SourceError(
                    f"{str(error).rstrip('.')}. To rehearse without this source, give rows of its shape: "
                    "--rehearse-rows FILE"
                ) from error
            file = stand_ins.pop(0) if len(stand_ins) > 1 else stand_ins[0]
            taken = sample_rows(DatasetConfig(path=str(file)), out, ROWS)
            sample = SampledRows(source=dataset.path, file=out, rows=taken.rows, total=None, counted=False)
            notes.append(f"rows: {dataset.path} cannot be reached -> {taken.rows:,} rows of {file}")
        samples.append(sample)
    return samples, notes


def _of_all(sample: SampledRows) -> str:
    if sample.total is None:
        return ""
    return f" of {sample.total:,}" if sample.counted else f" of about {sample.total:,}"


def _datasets(datasets: Sequence[DatasetConfig], samples: Sequence[SampledRows]) -> list[dict[str, object]]:
    """The same data sets, each reading its sampled rows."""
    local = {"source": None, "name": None, "split": "train", "revision": None}
    return [
        {**dataset.model_dump(mode="json"), **local, "path": str(sample.file)}
        for dataset, sample in zip(datasets, samples, strict=True)
    ]
