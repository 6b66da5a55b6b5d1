"""Promotion and rollback by hand: serialised, checked by loading, barred for good, with the reason kept."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file

from sft_core import stop
from sft_core.errors import ModelError, RegistryError
from sft_core.load_check import check_loads
from sft_core.pack import load_chat_template
from tasks import models
from tasks.registry import barred_because, find_champion, read_history, read_version
from tasks.tracking import download_model
from tests.tasks.models_project import aliases, built_project, registry

__all__ = ["built_project", "registry"]
pytestmark = pytest.mark.slow


def test_rollback_gives_the_previous_version_bars_the_bad_one_and_keeps_why(registry: MlflowClient) -> None:
    assert aliases(registry) == {"candidate": "2", "champion": "2", "previous": "1"}
    assert models.rollback("orders", "answers in French") == models.Moved("orders", "2", "1")
    assert aliases(registry) == {"candidate": "2", "champion": "1"}
    bad = read_version("orders", "2")
    assert barred_because("orders", bad.merged_fingerprint) == "answers in French"
    assert bad.tags["sft.barred"] == "answers in French"
    assert "rolled back from 2 to 1" in read_history("orders")[-1][1]
    assert read_history("orders")[-1][1].endswith("answers in French")


def test_a_barred_version_never_comes_back(registry: MlflowClient) -> None:
    models.rollback("orders", "answers in French")
    for override_gate in (False, True):
        with pytest.raises(RegistryError, match="stays barred: answers in French"):
            models.promote("orders", "2", "please", override_gate=override_gate)
    with pytest.raises(RegistryError, match="no alias `previous`"):
        models.rollback("orders", "again")
    assert aliases(registry)["champion"] == "1"


def test_the_bar_outlives_the_version(registry: MlflowClient) -> None:
    fingerprint = read_version("orders", "2").merged_fingerprint
    models.rollback("orders", "answers in French")
    registry.delete_model_version("orders", "2")
    assert barred_because("orders", fingerprint) == "answers in French"


def test_promotion_needs_a_verdict_on_the_present_champion_or_an_override(registry: MlflowClient) -> None:
    registry.set_registered_model_alias("orders", "champion", "1")
    registry.set_model_version_tag("orders", "2", "sft.promote", "false")
    with pytest.raises(RegistryError, match="the gate said .*--override-gate"):
        models.promote("orders", "2", "I like it")
    registry.set_model_version_tag("orders", "2", "sft.promote", "true")
    registry.set_model_version_tag("orders", "2", "sft.judged_against", "7")
    with pytest.raises(RegistryError, match="judged against 7, the champion is 1"):
        models.promote("orders", "2", "I like it")
    assert models.promote("orders", "2", "I like it", override_gate=True).after == "2"
    assert aliases(registry) == {"candidate": "2", "champion": "2", "previous": "1"}
    assert read_history("orders")[-1][1].endswith("I like it")


def test_what_does_not_load_never_becomes_champion(
    registry: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded = shutil.copytree(download_model("models:/orders/1"), tmp_path / "model")
    weights = downloaded / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    monkeypatch.setattr(models, "model_folder", lambda *_: downloaded)
    with pytest.raises(ModelError, match=r"model.safetensors"):
        models.rollback("orders", "no reason")
    assert aliases(registry) == {"candidate": "2", "champion": "2", "previous": "1"}
    assert barred_because("orders", read_version("orders", "2").merged_fingerprint) is None


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "does not load"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "does not load"),
        (lambda folder: drop_weight(folder / "model.safetensors"), "weights are missing"),
        (lambda folder: spoil_weight(folder / "model.safetensors"), "logits are not finite"),
    ],
)
def test_each_way_not_to_load(tiny_model: Path, tmp_path: Path, spoil: Callable[[Path], object], words: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(load_chat_template("chatml"))
    check_loads(folder)
    spoil(folder)
    with pytest.raises(ModelError, match=words):
        check_loads(folder)


def drop_weight(path: Path) -> None:
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})


def spoil_weight(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})


def test_nothing_moves_if_the_champion_moved_meanwhile(registry: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_while_another_promotes(*_: object) -> None:
        registry.set_registered_model_alias("orders", "champion", "1")

    monkeypatch.setattr(models, "_check", check_while_another_promotes)
    with pytest.raises(RegistryError, match="moved from 2 to 1 meanwhile"):
        models.rollback("orders", "no reason")
    champion = find_champion("orders")
    assert champion is not None
    assert champion.number == "1"


@pytest.mark.parametrize("wanted", ["9", "nobody"])
def test_an_unknown_version_is_named(registry: MlflowClient, wanted: str) -> None:
    with pytest.raises(RegistryError, match=f"models:/orders/{wanted}: no such version or alias"):
        read_version("orders", wanted)


def test_a_stop_that_something_swallowed_moves_no_alias(registry: MlflowClient) -> None:
    """SIGINT comes within a `__del__`, where Python prints what its handler raises and goes on."""

    class Swallows:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def stopped() -> None:
        with stop.insisting():
            Swallows()
            models.move_champion("orders", "1", find_champion("orders"), "by a stopped run")

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            stopped()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert aliases(registry) == {"candidate": "2", "champion": "2", "previous": "1"}
