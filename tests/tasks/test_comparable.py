"""A champion that nothing can be compared with is refused before anything is trained."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from sft_core.errors import RegistryError
from tasks.comparable import require_comparable_champion
from tasks.model_files import ModelFolder, log_folder
from tasks.model_version import create
from tests.commands import Commands
from tests.tasks.models_project import READER, RECIPE, empty_registry, write_rows

__all__ = ["empty_registry"]
pytestmark = pytest.mark.slow
FINGERPRINT = "f" * 64


def champion_of(client: MlflowClient, source: str, tags: dict[str, str] | None = None) -> None:
    client.create_registered_model("orders")
    version = client.create_model_version("orders", source, tags=tags)
    client.set_registered_model_alias("orders", "champion", version.version)


def test_without_a_champion_there_is_nothing_to_refuse(empty_registry: MlflowClient) -> None:
    require_comparable_champion("orders")


def test_a_champion_of_another_tool_is_refused(empty_registry: MlflowClient, tmp_path: Path) -> None:
    champion_of(empty_registry, str(tmp_path))
    with pytest.raises(RegistryError, match=r"models:/orders/1 was not registered by sft-flows .*register\.model_name"):
        require_comparable_champion("orders")


@pytest.fixture
def logged(empty_registry: MlflowClient, tiny_model: Path, tmp_path: Path) -> Path:
    """The files of a champion that this project registered."""
    folder = shutil.copytree(tiny_model, tmp_path / "merged")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    experiment = empty_registry.create_experiment("orders", artifact_location=(tmp_path / "artifacts").as_uri())
    run = empty_registry.create_run(experiment).info.run_id
    source = log_folder(ModelFolder(folder, FINGERPRINT, "orders", 5), run)
    number = create("orders", source, run, {"sft.merged_fingerprint": FINGERPRINT})
    empty_registry.set_registered_model_alias("orders", "champion", number)
    return next((tmp_path / "artifacts").rglob("model/config.json")).parent


def test_a_champion_that_is_whole_is_accepted(logged: Path) -> None:
    require_comparable_champion("orders")
    (logged / "chat_template.jinja").unlink()
    config = json.loads((logged / "tokenizer_config.json").read_text())
    (logged / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    require_comparable_champion("orders")


@pytest.mark.parametrize(
    ("gone", "what"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "weights"),
        ("tokenizer.json", "tokenizer"),
        ("chat_template.jinja", "chat template"),
    ],
)
def test_a_champion_that_lacks_a_file_is_refused_by_its_name(logged: Path, gone: str, what: str) -> None:
    (logged / gone).unlink()
    with pytest.raises(RegistryError, match=f"models:/orders/1, the champion, has no {what}: nothing can be compared"):
        require_comparable_champion("orders")


def test_a_run_ends_before_it_prepares_anything(
    empty_registry: MlflowClient, tiny_model: Path, tmp_path: Path, commands: Commands
) -> None:
    champion_of(empty_registry, str(tmp_path))
    shutil.copytree(tiny_model, tmp_path / "base")
    (tmp_path / "reader.py").write_text(READER)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    write_rows(tmp_path, range(60))
    done = commands.run(tmp_path, "run", "recipe.yaml", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert done.returncode == 1
    assert "models:/orders/1 was not registered by sft-flows" in done.stderr
    assert not (tmp_path / "store").exists()
