"""`sft store gc` against a registry: dry by default, removes with --delete, and not while the registry looks wrong."""

import os
import time
from pathlib import Path

import mlflow
import pytest
from typer.testing import CliRunner

from cli.store import app
from sft_core.artifacts import KIND_OF_STEP, Manifest
from sft_core.errors import StoreError
from sft_core.store import Store, list_files
from tests.tasks.models_project import empty_registry  # noqa: F401 - a fixture

MERGED, UNUSED, PACKED = "aa" * 32, "bb" * 32, "cc" * 32


def publish(store: Store, step: str, fingerprint: str, inputs: dict[str, str]) -> None:
    with store.staging(step) as folder:
        (folder / "data").write_text(step)
        described = {"parts": {}, "ledger": {}, "facts": {}, "versions": {}, "device": "cpu", "took_seconds": 0.0}
        manifest = Manifest(
            kind=KIND_OF_STEP[step],
            step=step,
            name=f"orders:{step}",
            fingerprint=fingerprint,
            inputs=inputs,
            files=list_files(folder),
            started="2026-01-01T00:00:00+00:00",
            **described,  # type: ignore[arg-type]
        )
        store.publish(folder, manifest)


@pytest.fixture
def store(empty_registry: mlflow.MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:  # noqa: F811
    """A merged model, what it was made of, and one that nobody needs: all 40 days old."""
    monkeypatch.setenv("COLUMNS", "200")
    store = Store(str(tmp_path / "store"))
    publish(store, "pack", PACKED, {})
    publish(store, "merge", MERGED, {"conversations": PACKED})
    publish(store, "merge", UNUSED, {})
    then = time.time() - 40 * 86400
    for path in (tmp_path / "store").rglob("*"):
        os.utime(path, (then, then))
    return store


def gc(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["gc", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def left(store: Store) -> set[str]:
    return {manifest.fingerprint for step in KIND_OF_STEP for manifest in store.manifests(step)}


def test_gc_removes_what_no_version_needs_and_only_when_told_to(store: Store) -> None:
    with pytest.raises(StoreError, match=r"sqlite:.*mlflow.db holds no version.*set MLFLOW_TRACKING_URI"):
        gc(store.url, "--delete")
    assert left(store) == {PACKED, MERGED, UNUSED}
    client = mlflow.MlflowClient()
    client.create_registered_model("orders")
    client.create_model_version("orders", "s3://somewhere", tags={"sft.merged_fingerprint": MERGED})
    said = gc(store.url)
    assert "1 entries" in said
    assert "--delete removes them" in said
    rows = {line.split()[3]: line.rstrip() for line in said.splitlines() if line.startswith(("keep", "remove"))}
    assert rows[MERGED[:12]].startswith("keep")
    assert rows[MERGED[:12]].endswith("orders version 1")
    assert rows[PACKED[:12]].endswith(f"made into merge {MERGED[:12]}")
    assert rows[UNUSED[:12]].startswith("remove")
    assert left(store) == {PACKED, MERGED, UNUSED}
    assert gc(store.url, "--keep-days", "50").count("remove ") == 0
    assert "1 entries removed" in gc(store.url, "--delete")
    assert left(store) == {PACKED, MERGED}
    client.delete_model_version("orders", "1")
    assert "2 entries removed" in gc(store.url, "--delete", "--without-registry")
    assert left(store) == set()
