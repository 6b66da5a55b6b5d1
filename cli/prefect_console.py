"""Prefect's console output for a person: the message of an error, not its traceback (not called with `--debug`)."""

import logging


class _WithoutTraceback(logging.Formatter):
    """The handler's own formatter, minus exception text. Records stay whole for the API handler."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """Format a copy that carries no exception."""
        bare = logging.makeLogRecord({**record.__dict__, "exc_info": None, "exc_text": None, "stack_info": None})
        return self._inner.format(bare)


def quiet_tracebacks() -> None:
    """Drop tracebacks from the console handler that Prefect puts on the root logger."""
    import prefect.main  # noqa: F401 - sets logging up
    from prefect.logging.handlers import PrefectConsoleHandler

    for handler in logging.root.handlers:
        if isinstance(handler, PrefectConsoleHandler) and handler.formatter is not None:
            handler.setFormatter(_WithoutTraceback(handler.formatter))
