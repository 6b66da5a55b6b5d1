"""The first start of a temporary Prefect server makes its database, and a newer Prefect's first start migrates it.

Two such starts at once fail each other, so they are made one after the other; all others start side by side.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sft_core.file_lock import file_lock


@contextmanager
def migrating_alone() -> Iterator[None]:
    """Around a server's start, until it answers: alone where this Prefect has not yet been at this database."""
    import prefect
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    url = settings.server.database.connection_url
    database = url.get_secret_value() if url is not None else f"sqlite+aiosqlite:///{settings.home}/prefect.db"
    kind, _, place = database.partition(":///")
    if not kind.startswith("sqlite") or not place or ":memory:" in place:
        yield
        return
    file = Path(place.partition("?")[0])
    mark = settings.home / f"migrated-{hashlib.sha256(database.encode()).hexdigest()[:12]}"
    if not _is_migrated(file, mark, prefect.__version__):
        with file_lock(mark.with_suffix(".lock")):
            if not _is_migrated(file, mark, prefect.__version__):
                yield
                mark.write_text(prefect.__version__)
                return
    yield


def _is_migrated(database: Path, mark: Path, version: str) -> bool:
    return database.is_file() and mark.is_file() and mark.read_text() == version
