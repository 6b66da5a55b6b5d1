"""Rows that a judged model or its ancestor was trained on judge nothing; they are counted. Artifacts of real runs."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

from sft_core.plan import Plan, plan_recipe
from sft_core.recipe import resolve
from sft_core.register.stored import judge_stored
from sft_core.steps import Retraining, run_step
from sft_core.store import Store
from tasks.lineage import read_recorded
from tasks.registry import RegisteredVersion, read_version
from tasks.run_step import Job
from tasks.tracking import PartRun
from tasks.trained_rows import rows_known_to_judged
from tests.tasks.models_project import built_project, registry

__all__ = ["built_project", "registry"]
pytestmark = pytest.mark.slow


@pytest.fixture
def job(registry: MlflowClient) -> Job:
    """The job that made version 2."""
    recorded = read_recorded("orders", read_version("orders", "2"))
    return Job(recipe=resolve(recorded.recipe), plan=Plan.from_dict(recorded.plan), part=PartRun("", ""))


def retraining(job: Job) -> Retraining:
    return Retraining(job.recipe, job.plan, Store(job.recipe.store))


def champion(**tags: str) -> RegisteredVersion:
    return RegisteredVersion("7", "7" * 64, ("champion",), {f"sft.{key}": value for key, value in tags.items()})


def side(folder: Path, name: str) -> set[str]:
    """row_ids of one side of a Conversations folder."""
    return {i for file in (folder / name).glob("*.parquet") for i in pq.read_table(file)["row_id"].to_pylist()}


@pytest.fixture
def wider(job: Job) -> Retraining:
    """Packed rows of a retraining that held out less: it was trained on rows that version 2 is judged by."""
    recipe = resolve({**job.recipe.as_dict(), "eval_fraction": 0.05})
    run = Retraining(recipe, plan_recipe(recipe), Store(recipe.store), lambda _: None)
    for key in ("fetch/0", "normalize", "pack"):
        run_step(run, key)
    return run


def test_rows_that_the_champion_was_trained_on_are_left_out_and_counted(job: Job, wider: Retraining) -> None:
    known = set(rows_known_to_judged(job, champion(pack=wider.plan["pack"].fingerprint)))
    own = retraining(job)
    assert known == side(own.folder("normalize"), "train") | side(wider.folder("normalize"), "train")
    held_out = side(own.folder("normalize"), "heldout")
    shared = held_out & side(wider.folder("normalize"), "train")
    assert 0 < len(shared) < len(held_out)
    (comparison,) = judge_stored(own, 1, against_champion=False, trained_on=known).verdict.comparisons
    assert (comparison.rows, comparison.excluded) == (len(held_out - shared), len(shared))
    assert comparison.notes[0] == (
        f"{len(shared)} held-out rows left out: a model judged, or its ancestor, was trained on them"
    )


def test_rows_of_an_ancestor_of_the_champion_count_too(job: Job, registry: MlflowClient) -> None:
    first = read_version("orders", "1")
    recorded = read_recorded("orders", first)
    before = Retraining(resolve(recorded.recipe), Plan.from_dict(recorded.plan), Store(job.recipe.store))
    base = f"{job.recipe.store}/merge/{first.merged_fingerprint}"
    rows = side(before.folder("normalize"), "train")
    own = side(retraining(job).folder("normalize"), "train")
    assert rows - own
    assert set(rows_known_to_judged(job, champion(base_model=base))) == rows | own
    assert set(rows_known_to_judged(job, champion(base_model="/models/base"))) == own


def test_rows_that_the_store_has_no_more_are_told_of(job: Job) -> None:
    said: list[str] = []
    own = set(rows_known_to_judged(job, champion(pack="0" * 64), said.append))
    assert own == side(retraining(job).folder("normalize"), "train")
    assert said == [
        f"register: the packed rows of orders version 7 are not in {job.recipe.store}; none of them is left out for it"
    ]
