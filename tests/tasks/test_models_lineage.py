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
from sft_core.base_model import describe_base_model
from sft_core.errors import DataError
from sft_core.lineage import Recorded, compare_recorded, reproduce, row_ids_of, use_of_row, walk_ancestry
from sft_core.recipe import BaseModelConfig
from sft_core.store import Store
from tasks import lineage
from tasks.lineage import find_row_uses, read_recorded, read_trained_rows
from tasks.registry import RegisteredVersion, read_version
from tasks.tracking import download_model
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
    assert use_of_row(recorded_of("1"), Store(str(tmp_path)), row_id(20)) == "unknown"
    with pytest.raises(DataError, match=r"no map_fn of the recipe orders reads this row: .*KeyError"):
        row_ids_of(recorded_of("1").recipe, '{"text": "hi"}')
    with pytest.raises(DataError, match="neither a row_id"):
        row_ids_of(recorded_of("1").recipe, "say w1")


@pytest.mark.parametrize("copied", [False, True])
def test_a_version_tuned_from_another_was_trained_on_its_rows_too(registry: MlflowClient, copied: bool) -> None:
    """Version 2 says that version 1's merged model was its base: in the store, or a copy of its files elsewhere."""
    uses = {number: find_row_uses("orders", row_id(number)) for number in range(5)}
    (number, _) = next((n, found) for n, found in uses.items() if [u.use for _, u in found] == ["trained", "absent"])
    first = registry.get_model_version("orders", "1")
    if copied:
        folder = Path(download_model("models:/orders/1"))
        fingerprint = describe_base_model(BaseModelConfig(path=str(folder))).fingerprint
        assert fingerprint == first.tags["sft.as_base_model"]
        registry.set_model_version_tag("orders", "2", "sft.base_model_fingerprint", fingerprint)
    else:
        registry.set_model_version_tag("orders", "2", "sft.base_model", f"/s/merge/{first.tags['sft.merge']}")
    use = {version.number: use for version, use in find_row_uses("orders", json.dumps(row(number)))}["2"]
    assert (use.use, use.through) == ("trained", "orders/1")


def test_a_recipe_that_reads_the_row_names_it_for_those_that_do_not(
    registry: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 1's map_fn reads another kind of row; the command still answers for both."""
    read = lineage.read_recorded

    def read_other(model_name: str, version: RegisteredVersion) -> Recorded:
        recorded = read(model_name, version)
        other = {**recorded.recipe, "datasets": [{**d, "map_fn": "alpaca"} for d in recorded.recipe["datasets"]]}
        return replace(recorded, recipe=other) if version.number == "1" else recorded

    expected = find_row_uses("orders", row_id(20))
    monkeypatch.setattr(lineage, "read_recorded", read_other)
    assert find_row_uses("orders", json.dumps(row(20))) == expected


def test_a_version_whose_record_is_gone_is_unknown_and_the_others_answer(registry: MlflowClient) -> None:
    expected = find_row_uses("orders", row_id(20))[1]
    registry.set_model_version_tag("orders", "1", "sft.mlflow_run_id", "0" * 32)
    (_, first), second = find_row_uses("orders", json.dumps(row(20)))
    assert (first.use, second) == ("unknown", (read_version("orders", "2"), expected[1]))


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
