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
    """Drop tracebacks from every console handler that Prefect configured."""
    import prefect.logging.configuration
    from prefect.logging.handlers import PrefectConsoleHandler

    prefect.logging.configuration.setup_logging()
    names = ["prefect", *(n for n in logging.root.manager.loggerDict if n.startswith("prefect"))]
    handlers = {h for name in names for h in logging.getLogger(name).handlers if isinstance(h, PrefectConsoleHandler)}
    for handler in handlers:
        if handler.formatter is not None and not isinstance(handler.formatter, _WithoutTraceback):
            handler.setFormatter(_WithoutTraceback(handler.formatter))
