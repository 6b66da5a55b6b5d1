"""What libraries say about themselves at every start is left out; their errors, and what we say ourselves, stay.

Called first in every process of ours: the command, a flow run of a Prefect worker, a training rank, a process that
packs shards. With SFT_DEBUG in the environment (`sft --debug`) nothing is left out.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

DEBUG = "SFT_DEBUG"
ABOUT_THEMSELVES = (
    "alembic",
    "bitsandbytes.backends.cpu.ops",  # with AVX512-BF16: a faster kernel could not be downloaded
    "mlflow.store.db.utils",
    "mlflow.transformers",
)
"""Loggers of which errors alone are shown."""
DEVELOPERS = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
"""Warnings for whoever writes the library that gives them."""
OURS = r"(cli|demo|flows|sft_core|tasks)(\.|$)"
FORM_FIELD = 'Field name "register"'
"""A section of the recipe is called so, and a parameter of the flow `retrain` with it."""


def debugging() -> bool:
    """Whether errors show their traceback and libraries say all they have to say."""
    return DEBUG in os.environ


def quiet_libraries() -> None:
    """Set the filters, for this process."""
    if debugging():
        return
    for category in DEVELOPERS:
        warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("default", category=category, module=OURS)
    warnings.filterwarnings("ignore", message=FORM_FIELD)
    for name in ABOUT_THEMSELVES:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # it sets its own level


@contextmanager
def transformers_silent() -> Iterator[None]:
    """Without transformers' progress bars and log: what is tried inside is said by the caller."""
    from transformers.utils import logging as own  # slow to import

    bars, level = own.is_progress_bar_enabled(), own.get_verbosity()
    own.disable_progress_bar()
    own.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        own.set_verbosity(level)
        if bars:
            own.enable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
