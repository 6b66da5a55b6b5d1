"""Ancestry: forwards and backwards, from MLflow alone where no row is asked for; what changed; whether it comes out."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from sft_core.artifacts import StoredFile
from sft_core.errors import DataError
from sft_core.lineage import Recorded, compare_recorded, find_row, reproduce, walk_ancestry
from sft_core.store import Store
from tasks.lineage import find_row_uses, read_recorded, read_trained_rows
from tasks.registry import read_version
from tests.tasks.models_project import built_project, registry, row

__all__ = ["built_project", "registry"]
pytestmark = pytest.mark.slow
CHAIN = ["fetch", "normalize", "pack", "train", "convert", "merge"]


def recorded_of(number: str) -> Recorded:
    return read_recorded("orders", read_version("orders", number))


def row_id(number: int) -> str:
    """As docs say: SHA-256 of roles and contents as compact JSON, the first 32 digits."""
    messages = [["user", row(number)["ask"]], ["assistant", row(number)["say"]]]
    return hashlib.sha256(json.dumps(messages, separators=(",", ":")).encode()).hexdigest()[:32]


def test_the_chain_is_whole_and_read_from_mlflow_alone(registry: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_store(*_: object) -> None:
        raise AssertionError("the store was asked")

    monkeypatch.setattr(Store, "__init__", no_store)
    links = walk_ancestry(recorded_of("2").manifests, read_version("orders", "champion").merged_fingerprint)
    assert [link.step for link in links] == ["evaluate"] * 3 + CHAIN[::-1] + ["base_model"]
    assert all(link.sound for link in links)
    made_of = {link.step: link.manifest.inputs for link in links if link.manifest is not None}
    by_step = {link.step: link.fingerprint for link in links}
    assert made_of["merge"]["adapter"] == by_step["convert"]
    assert made_of["train"] == {"packed": by_step["pack"], "base_model": by_step["base_model"]}
    assert all(link.manifest.versions["transformers"] for link in links if link.manifest is not None)


def test_an_altered_or_missing_record_shows(registry: MlflowClient) -> None:
    recorded, merged = recorded_of("1"), read_version("orders", "1").merged_fingerprint
    pack = recorded.manifests["pack"]
    altered = {**recorded.manifests, "pack": replace(pack, parts={**pack.parts, "seed": 1})}
    missing = {key: manifest for key, manifest in recorded.manifests.items() if key != "pack"}
    for manifests in (altered, missing):
        unsound = [link.step for link in walk_ancestry(manifests, merged) if not link.sound]
        assert unsound == ["pack"]


def test_a_row_leads_to_the_versions_trained_on_it(registry: MlflowClient) -> None:
    rows = {number: find_row_uses("orders", json.dumps(row(number))) for number in (0, 20, 65)}
    uses = {number: [use.use for _, use in found] for number, found in rows.items()}
    assert uses[0][1] == "absent"  # only version 1 had the rows 0 to 4
    assert uses[65][0] == "absent"  # only version 2 had the rows 60 to 69
    assert uses[20] in (["trained", "trained"], ["held out", "held out"])
    assert {use.row_id for _, use in rows[20]} == {row_id(20)}
    assert [use.use for _, use in find_row_uses("orders", row_id(20))] == uses[20]


def test_a_row_of_artifacts_that_are_gone_is_not_called_absent(registry: MlflowClient, tmp_path: Path) -> None:
    (use,) = find_row(recorded_of("1"), Store(str(tmp_path)), row_id(20))
    assert use.use == "unknown"
    with pytest.raises(DataError, match=r"no map_fn of the recipe orders reads this row: .*KeyError"):
        find_row(recorded_of("1"), Store(str(tmp_path)), '{"text": "hi"}')
    with pytest.raises(DataError, match="neither a row_id"):
        find_row(recorded_of("1"), Store(str(tmp_path)), "say w1")


def test_the_difference_of_two_versions(registry: MlflowClient) -> None:
    first, second = recorded_of("1"), recorded_of("2")
    difference = compare_recorded(first, second, read_trained_rows(first), read_trained_rows(second))
    assert difference.removed
    assert difference.added
    assert set(difference.removed) <= {row_id(number) for number in range(5)}
    assert set(difference.added) <= {row_id(number) for number in range(60, 70)}
    assert difference.recipe == ("train.max_steps: 3 -> 8",)
    assert difference.scores["loss"] == (first.scores("tuned")["loss"], second.scores("tuned")["loss"])
    assert not difference.same_held_out
    assert compare_recorded(first, second, None, []).added is None


def run_again(recorded: Recorded, folder: Path, first: Path) -> Iterable[Any]:
    return reproduce(recorded, Store(str(folder)), Store(str(first / "store")), lambda _: None)


def test_a_version_comes_out_again_though_its_source_changed(
    registry: MlflowClient, built_project: Path, tmp_path: Path
) -> None:
    compared = list(run_again(recorded_of("1"), tmp_path / "again", built_project))
    assert [(entry.key, entry.different) for entry in compared] == [
        (key, ()) for key in ("fetch/0", *CHAIN[1:], "evaluate/tuned", "evaluate/base")
    ]
    assert "changed since" in compared[0].note
    assert all(not entry.note for entry in compared[1:])


def test_the_first_step_that_differs_is_named(registry: MlflowClient, built_project: Path, tmp_path: Path) -> None:
    recorded = recorded_of("2")
    normalize = recorded.manifests["normalize"]
    name = "train/part-00000.parquet"
    other = {**normalize.files, name: StoredFile(normalize.files[name].size, "0" * 64)}
    altered = replace(
        recorded, manifests={**recorded.manifests, "normalize": replace(normalize, files=other, device="H200")}
    )
    fetched, normalized = islice(run_again(altered, tmp_path / "again", built_project), 2)
    assert fetched.equal
    assert normalized.different == (name, "device: H200 -> cpu")
