"""Settings of libraries that must be in the environment before they are imported. What the user set stays."""

import logging
import os
import warnings

DEFAULTS = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # 20 is too short for a cold start on two cores
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes for what is not used here
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


DEBUG = "SFT_DEBUG"


def debugging() -> bool:
    """Whether `--debug` was given: errors then show their traceback."""
    return DEBUG in os.environ


def set_defaults() -> None:
    """Telemetry off, servers as this project needs them, no progress bars in logs."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def quiet_libraries() -> None:
    """Silence what libraries say about themselves at every start; their errors stay."""
    warnings.filterwarnings("ignore", message='Field name "register"')  # a section is called so, in the flow's form too
    for name in ("mlflow.store.db.utils", "mlflow.transformers", "bitsandbytes.backends.cpu.ops", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # it sets its own level
