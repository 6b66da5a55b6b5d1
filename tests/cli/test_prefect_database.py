"""A temporary server's first start is alone; later ones are not, until the database is gone or Prefect is another."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_HOME, PREFECT_SERVER_DATABASE_CONNECTION_URL, temporary_settings

from cli.prefect_database import migrating_alone
from sft_core.file_lock import LockError, file_lock


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    url = f"sqlite+aiosqlite:///{tmp_path / 'home' / 'prefect.db'}"
    (tmp_path / "home").mkdir()
    with temporary_settings({PREFECT_HOME: tmp_path / "home", PREFECT_SERVER_DATABASE_CONNECTION_URL: url}):
        yield tmp_path / "home"


def is_alone(home: Path) -> bool:
    """Start a server, as it were; whether another start would have had to wait meanwhile."""
    with migrating_alone():
        (home / "prefect.db").touch()
        for lock in home.glob("*.lock"):
            try:
                with file_lock(lock, 0):
                    pass
            except LockError:
                return True
    return False


def test_the_first_is_alone_and_later_ones_are_not(home: Path) -> None:
    assert [is_alone(home) for _ in range(3)] == [True, False, False]


def test_after_an_upgrade_or_without_the_database_it_is_alone_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_alone(home)
    (home / "prefect.db").unlink()
    assert is_alone(home)
    assert not is_alone(home)
    monkeypatch.setattr("prefect.__version__", "99.0")
    assert is_alone(home)


def test_a_start_that_failed_does_not_count(home: Path) -> None:
    (home / "prefect.db").touch()
    with pytest.raises(ZeroDivisionError), migrating_alone():
        _ = 1 / 0
    assert is_alone(home)


def test_a_database_server_is_left_to_itself(tmp_path: Path) -> None:
    url = "postgresql+asyncpg://user:secret@host/prefect"
    with (
        temporary_settings({PREFECT_HOME: tmp_path, PREFECT_SERVER_DATABASE_CONNECTION_URL: url}),
        migrating_alone(),
    ):
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
