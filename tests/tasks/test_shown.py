"""Texts that a run shows: ledger, report, links, names. How they look in the UIs is tested in tests/services."""

import base64
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen
from xml.etree import ElementTree

import pytest
from prefect.exceptions import ObjectNotFound
from prefect.logging import disable_run_logger

from cli.servers import HOST, free_port
from sft_core.artifacts import Manifest
from sft_core.lineage.card import scores_table
from tasks import evaluate, fetch, shown

REGISTERED = {
    "model_name": "orders",
    "version": "3",
    "aliases": ["candidate", "champion"],
    "verdict": "promoted: is better than the base by 0.3; is better than the champion by 0.1; a note",
}
NOTHING = Manifest(
    kind="RawDataset",
    step="fetch",
    name="orders:fetch/0",
    fingerprint="0" * 64,
    parts={},
    inputs={},
    files={},
    ledger={},
    facts={},
    versions={},
    device="cpu",
    started="2026-01-01T00:00:00",
    took_seconds=1.0,
)


def test_the_ledger_has_a_row_a_step_and_unit_with_the_commonest_reason_first() -> None:
    raw = replace(
        NOTHING,
        ledger={"rows": {"in": 12000, "out": 12000, "set_aside": {}}},
        facts={"source": "https://me:secret@host/d/rows.jsonl?sig=secret"},
    )
    aside = {"duplicate": 3, "too_long": 1200, "empty_answer": 3}
    normal = replace(NOTHING, step="normalize", ledger={"rows": {"in": 12000, "out": 10794, "set_aside": aside}})
    packed = replace(NOTHING, step="pack", ledger={"supervised_tokens": {"in": 7, "out": 7, "set_aside": {}}})
    rows = shown.ledger_rows({"fetch/0": raw, "normalize": normal, "pack": packed})
    assert [list(row.values()) for row in rows] == [
        ["fetch rows.jsonl", "rows", "12,000", "12,000", "0", ""],
        ["normalize", "rows", "12,000", "10,794", "1,206", "too_long 1,200, duplicate 3, empty_answer 3"],
        ["pack", "supervised tokens", "7", "7", "0", ""],
    ]


def test_scores_say_how_many_answers_ended_where_that_was_counted() -> None:
    old = replace(NOTHING, step="evaluate", facts={"metrics": {"loss": 2.0}, "generated_rows": 9})
    new = replace(old, facts={"metrics": {"loss": 1.0, "ended": 0.875}, "generated_rows": 8, "ended_rows": 7})
    assert scores_table({"evaluate/tuned": new, "evaluate/base": old}).split("\n") == [
        "| held out | base | tuned |",
        "|---|---|---|",
        "| answers that ended by themselves | - | 7 of 8 |",
        "| loss | 2.0000 | 1.0000 |",
    ]
    assert "ended" not in scores_table({"evaluate/base": old})


def test_the_report_says_the_verdict_in_words_and_each_reason_on_its_own_line() -> None:
    text = shown.report_text(REGISTERED, "| held out | tuned |", [(1.0, 5.5), (2.0, 0.25)], "[MLflow](http://m)")
    assert text.startswith("# orders version 3: promoted\n\n- is better than the base by 0.3\n- is better than the cha")
    assert "\n- a note\n\n[MLflow](http://m)\n\n## Scores on held-out rows\n\n| held out | tuned |\n\n" in text
    assert text.endswith("\n\n5.5 at optimizer step 1, 0.25 at 2")


@pytest.mark.parametrize("losses", [[], [(1.0, 5.5)]])
def test_what_there_is_nothing_to_say_about_is_left_out(losses: list[tuple[float, float]]) -> None:
    bare = {**REGISTERED, "verdict": "not promoted: tie"}
    assert shown.report_text(bare, "", losses, "") == "# orders version 3: not promoted\n\n- tie"


def test_the_loss_curve_is_a_picture_of_its_own() -> None:
    text = shown.curve_image([(1.0, 4.0), (2.0, 2.0), (3.0, 1.0)])
    found = re.search(r"\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)", text)
    assert found is not None
    root = ElementTree.fromstring(base64.b64decode(found[1]))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    lines = root.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [3]


@pytest.mark.parametrize("name", ["orders", "My_Model.v2", "Größe", "-x-", "模型"])
def test_a_key_is_one_that_prefect_takes(name: str) -> None:
    assert re.fullmatch("report(-[a-z0-9]+)*", shown.artifact_key("report", name))


@pytest.mark.parametrize(
    ("tracking", "page"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000/#/models/orders"),
        ("https://me:secret@host/mlflow/", "https://host/mlflow/#/models/orders"),
        ("sqlite:///mlflow.db", None),
    ],
)
def test_a_page_of_mlflow_is_where_the_server_is_and_has_no_credentials(
    tracking: str, page: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    assert shown.mlflow_page("models/orders") == page


def test_a_server_that_is_not_there_costs_a_warning_and_a_fault_of_ours_is_not_hidden() -> None:
    with disable_run_logger():
        with shown.only_shown("x"):
            urlopen(f"http://{HOST}:{free_port()}", timeout=5)
        with shown.only_shown("x"):
            raise ObjectNotFound(ValueError())
        with pytest.raises(KeyError), shown.only_shown("x"):
            raise KeyError("version")


@pytest.mark.parametrize(
    ("which", "version", "name"),
    [
        ("tuned", None, "evaluate tuned (orders)"),
        ("base", None, "evaluate base (Llama-3.1-8B)"),
        ("champion", "3", "evaluate champion (version 3)"),
        ("champion", None, "evaluate champion"),
    ],
)
def test_an_evaluation_says_which_model_it_scores(which: str, version: str | None, name: str) -> None:
    recipe = SimpleNamespace(name="orders", base_model=SimpleNamespace(path="meta-llama/Llama-3.1-8B"))
    parameters = {"job": SimpleNamespace(recipe=recipe), "which": which, "version": version, "champion": Path()}
    assert _run_name(evaluate.evaluate, parameters) == name


def test_a_fetch_says_its_source_and_no_secret() -> None:
    sources = ["data/rows.jsonl", "s3://key:secret@bucket/a/b-*.parquet", "org/name", "gs://bucket"]
    names = [_run_name(fetch.fetch, {"job": None, "index": 0, "source": source}) for source in sources]
    assert names == ["fetch rows.jsonl", "fetch b-*.parquet", "fetch name", "fetch bucket"]


def _run_name(task: Any, parameters: dict[str, Any]) -> str:
    return str(task.task_run_name(parameters=parameters))
