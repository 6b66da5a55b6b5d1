"""What every log record of this process goes through before any handler sees it: secrets out, control characters shown.

In: a function that changes a record. Out: nothing; each function is asked once a record, in the order in which they
came, whoever else has set a record factory.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Change = Callable[[logging.LogRecord], None]


def change_records(change: Change) -> None:
    """From now on `change` is done to each record; a second time changes nothing."""
    make = logging.getLogRecordFactory()
    known: tuple[Change, ...] = getattr(make, "changes", ())
    if change in known:
        return

    def made(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = make(*arguments, **options)
        change(record)
        return record

    made.changes = (*known, change)  # type: ignore[attr-defined]
    logging.setLogRecordFactory(made)


def change_message(record: logging.LogRecord, change: Callable[[str], str]) -> None:
    """Put what `change` makes of the record's text in its place."""
    with suppress(TypeError, ValueError, KeyError):  # arguments that do not fit: logging itself says so
        said = record.getMessage()
        if (changed := change(said)) != said:
            record.msg, record.args = changed, None
