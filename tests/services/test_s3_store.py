"""A whole retraining with its store on S3, by machines that share nothing else: rows are prepared on one, a training is
killed on a second, and a deployed retraining goes on with a Prefect worker each of `cpu` and `gpu`."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cli.store import gc, verify
from sft_core.artifacts import KIND_OF_STEP, Manifest
from sft_core.errors import StoreError
from sft_core.plan import plan_recipe
from sft_core.recipe import resolve
from sft_core.steps import Retraining, run_step
from sft_core.store import Store, list_files
from sft_core.store_gc import decide
from sft_core.store_survey import COPY, remove, survey
from tasks.store_needs import registered_fingerprints
from tests.services.prepared import begin_with
from tests.services.s3 import BUCKET, S3Server, s3  # noqa: F401 - s3 is a fixture
from tests.services.stack import RECIPE, ROOT, RUN_SECONDS, Stack, wait_until, write_project
from tests.tasks.models_project import connected

STORE = f"s3://{BUCKET}/sft"
STEPS = 400
"""Optimizer steps: enough that checkpoints reach the mirror long before the last."""
ADAPTER = "checkpoint/adapter_model.safetensors"
SETTINGS = {"max_steps: 3": f"max_steps: {STEPS}\n  num_train_epochs: {STEPS}\n  save_steps: 20\n  save_total_limit: 2"}
PREPARE = """
import sys
from sft_core.plan import plan_recipe
from sft_core.recipe import resolve
from sft_core.steps import Retraining, run_step
from sft_core.errors import StoreError
from sft_core.store import Store
recipe = resolve(sys.argv[1])
run = Retraining(recipe, plan_recipe(recipe), Store(recipe.store))
print([run_step(run, key).reused for key in ("fetch/0", "normalize", "pack")])
"""


class Worker:
    """A machine: its own working directory, home and temporary folder. `base` and rows are equal copies."""

    def __init__(self, folder: Path, model: Path, s3: S3Server, store: str = STORE) -> None:  # noqa: F811
        recipe = RECIPE.replace("store: ./store", f"store: {store}")
        for old, new in SETTINGS.items():
            recipe = recipe.replace(old, new)
        self.folder = write_project(folder / "work", model, recipe=recipe)
        keep = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        quiet = ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY")
        self.environment = keep | s3.environment | dict.fromkeys(quiet, "true")
        self.environment |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "SFT_ALLOWED_PATHS": f"s3://{BUCKET}/"}
        for name in ("HOME", "TMPDIR"):
            (folder / name).mkdir(parents=True)
            self.environment[name] = str(folder / name)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, status: int = 0) -> str:
        process = self.start(*arguments)
        try:
            said = process.communicate(timeout=RUN_SECONDS)[0]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == status, said[-4000:]
        return said


@pytest.fixture(scope="module")
def workers(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    s3: S3Server,  # noqa: F811
) -> dict[str, Worker]:
    names = ("preparing", "killed", "cpu", "gpu")
    return {name: Worker(tmp_path_factory.mktemp(name), tiny_model, s3) for name in names}


@pytest.fixture(scope="module")
def stack(workers: dict[str, Worker], prepared: Path) -> Iterator[Stack]:
    """Servers, and a worker of each pool on a machine of its own; that of `gpu` has no rows."""
    cpu, gpu = workers["cpu"], workers["gpu"]
    (gpu.folder / "rows.jsonl").unlink()
    stack = begin_with(Stack(cpu.folder, **cpu.environment), prepared)
    try:
        stack.start()
        stack.worker("cpu")
        own = {"SFT_PROJECT_DIR": str(gpu.folder), "PREFECT_HOME": str(gpu.folder / "prefect")}
        stack.worker("gpu", limit=1, **{**gpu.environment, **own})
        yield stack
    finally:
        stack.stop()


@pytest.fixture
def registry(retrained: str, stack: Stack) -> Iterator[None]:
    """The stack's, for this process."""
    yield from connected(stack.mlflow_url)  # type: ignore[misc]


@pytest.fixture(scope="module")
def retrained(workers: dict[str, Worker], stack: Stack) -> str:
    """Prepared by one machine, trained by a second that is killed, finished by the stack: what its training logged."""
    assert "[False, False, False]" in workers["preparing"].run("-c", PREPARE, "recipe.yaml")
    killed, store = workers["killed"].start("-m", "cli.main", "train", "recipe.yaml"), Store(STORE)
    try:
        wait_until(lambda: killed.poll() is not None or mirrored(store), RUN_SECONDS, 0.1)
        assert killed.poll() is None, killed.communicate()[0]
    finally:
        os.kill(killed.pid, signal.SIGKILL)
        said = killed.communicate(timeout=RUN_SECONDS)[0]
    assert [key for key in ("fetch/0", "normalize", "pack") if f"{key}: reused" in said] == [
        "fetch/0",
        "normalize",
        "pack",
    ]
    assert max(mirrored(store)) < STEPS
    assert not store.manifests("train")
    run_id = stack.run_deployment("retrain/on-demand", {"recipe": "recipe.yaml", "compute": {"train": "train/gpu"}})
    assert stack.wait_final(run_id)["state_name"] == "Completed", stack.logs(run_id)[-5:]
    (training,) = [child["id"] for child in stack.children(run_id) if child["name"] == "train orders"]
    return "\n".join(stack.logs(training))


def mirrored(store: Store) -> list[int]:
    """Optimizer steps of the checkpoints that are whole in the store."""
    names = store.files.walk(f"{store.files.root}/train")
    return [int(name.split("/")[2].partition("-")[2]) for name in names if name.endswith("/mirrored.json")]


def test_a_worker_of_the_gpu_pool_goes_on_from_the_mirror_to_the_same_bytes(
    retrained: str,
    tmp_path: Path,
    tiny_model: Path,
    s3: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (fetched,) = [line for line in retrained.splitlines() if f"fetched from {STORE}" in line]
    assert "is gone; taking over" in retrained
    step = int(fetched.partition("checkpoint-")[2].split()[0])
    assert f"resuming from checkpoint-{step} of {STEPS} optimizer steps" in retrained
    alone = Worker(tmp_path, tiny_model, s3, store="./store")
    monkeypatch.chdir(alone.folder)
    recipe = resolve("recipe.yaml")
    run = Retraining(recipe, plan_recipe(recipe), Store(recipe.store))
    assert not any(run_step(run, key).reused for key in ("fetch/0", "normalize", "pack", "train"))
    (here,), (there,) = Store(str(alone.folder / "store")).manifests("train"), Store(STORE).manifests("train")
    assert there.files[ADAPTER].sha256 == here.files[ADAPTER].sha256
    assert there.fingerprint == here.fingerprint
    steps = metrics_of(Store(STORE), there)
    assert steps == metrics_of(Store(str(alone.folder / "store")), here) == list(range(1, STEPS + 1))


def metrics_of(store: Store, manifest: Manifest) -> list[int]:
    """Optimizer steps that were logged."""
    folder = store.local(store.artifact("train", manifest.fingerprint))
    return [json.loads(line)["optimizer_step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_nothing_but_artifacts_is_left_and_all_are_sound(retrained: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(STORE)
    assert {step for step in KIND_OF_STEP if store.manifests(step)} == set(KIND_OF_STEP)
    names = [name for step in KIND_OF_STEP for name in store.files.walk(f"{store.files.root}/{step}")]
    assert not [name for name in names if "/checkpoints/" in name or "/publishing/" in name]
    verify(STORE)
    assert "all 8 artifacts are sound" in capsys.readouterr().out


def test_verify_names_a_damaged_artifact(
    retrained: str,
    s3: S3Server,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = Store(STORE)
    (adapter,) = store.manifests("convert")
    path = f"{store.address('convert', adapter.fingerprint)}/adapter_model.safetensors"
    good = store.files.cat_file(path)
    s3.put(path, bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(StoreError, match="1 of 8 artifacts in s3://bucket/sft are damaged"):
        verify(STORE)
    assert f"  s3://{path}: its bytes are not those that were written" in capsys.readouterr().out
    s3.put(path, good)


def test_a_torn_artifact_is_rebuilt_by_another_worker(
    retrained: str,
    workers: dict[str, Worker],
    s3: S3Server,  # noqa: F811
) -> None:
    store = Store(STORE)
    (merged,) = store.manifests("merge")
    s3.delete(f"{store.address('merge', merged.fingerprint)}/config.json")
    assert store.find("merge", merged.fingerprint) is None
    keys = '("fetch/0", "normalize", "pack")'
    said = workers["killed"].run("-c", PREPARE.replace(keys, '("convert", "merge")'), "recipe.yaml")
    assert "[True, False]" in said
    assert store.find("merge", merged.fingerprint) is not None


def test_gc_keeps_what_a_registered_version_was_made_of(
    retrained: str,
    workers: dict[str, Worker],
    tmp_path: Path,
    registry: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, orphan = Store(STORE), "ef" * 32
    (tmp_path / "data").write_text("x")
    store.publish(tmp_path, replace(store.manifests("pack")[0], fingerprint=orphan, files=list_files(tmp_path)))
    gc(STORE, keep_days=30)
    assert "0 entries, 0 bytes, can go" in capsys.readouterr().out
    later = datetime.now(UTC) + timedelta(days=60)
    decisions = decide(survey(store, later), registered_fingerprints(), later, 30)
    kept = [decision for decision in decisions if decision.keep]
    assert [decision.why for decision in kept] == ["orders version 1"] * 8
    going = [decision.entry for decision in decisions if not decision.keep and decision.entry.kind != COPY]
    assert [entry.fingerprint for entry in going] == [orphan]
    assert remove(store, going[0])
    assert store.find("pack", orphan) is None
    verify(STORE)
    assert "all 8 artifacts are sound" in capsys.readouterr().out
