"""Whether `sft up` sees that a run could not load its flow: Prefect's own loader, in processes as runs are."""

import os
from pathlib import Path

import pytest

from cli.loading import finish_loading, our_entrypoints, start_loading
from cli.servers import ServerError

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "flows" / "prefect.yaml"


def load(project: Path, prefect_file: Path) -> None:
    finish_loading(start_loading(project, prefect_file, {**os.environ, "PYTHONPATH": str(ROOT)}), project)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package `flows` and a module `tasks`, where the command is given."""
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").write_text("")
    (tmp_path / "tasks.py").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_shipped_entrypoints_are_loaded_whatever_lies_there(project: Path) -> None:
    load(project, SHIPPED)


def test_an_entrypoint_that_is_hidden_is_an_error_that_names_both_files(project: Path) -> None:
    own = project / "prefect.yaml"
    own.write_text("deployments: [{name: x, entrypoint: flows.retrain.retrain}]")
    with pytest.raises(ServerError) as raised:
        load(project, own)
    first, *rest = str(raised.value).splitlines()
    # An editable install finds our `flows.retrain` in the user's `flows`, and fails at the first import of `tasks`.
    assert first.startswith(
        f"a run in {project} could not load its flow: flows.retrain.retrain: ModuleNotFoundError: No module named '"
    )
    assert rest[0].startswith(
        f"flows is two files: {project / 'flows' / '__init__.py'} (yours) and {ROOT / 'flows' / '__init__.py'} (of"
    )
    assert rest[1].startswith(f"tasks is two files: {project / 'tasks.py'} (yours)")
    assert rest[2] == "Or take the entrypoints of the prefect.yaml that ships: sft_cli.deployments.NAME"


def test_a_flow_that_is_not_there_is_an_error_too(project: Path) -> None:
    own = project / "prefect.yaml"
    own.write_text("deployments: [{name: x, entrypoint: sft_cli.module.retrian}]")
    with pytest.raises(ServerError, match=r"sft_cli\.module\.retrian: MissingFlowError"):
        load(project, own)


def test_a_users_own_entrypoints_are_the_users_affair(tmp_path: Path) -> None:
    own = tmp_path / "prefect.yaml"
    own.write_text("deployments: [{name: x, entrypoint: 'flows/x.py:f'}, {name: y, entrypoint: shop.f}]")
    assert our_entrypoints(own) == []
    own.write_text("deployments:")
    assert our_entrypoints(own) == []
    assert "sft_cli.deployments.rollback" in our_entrypoints(SHIPPED)
