"""Settings of libraries that must be in the environment before they are imported. What the user set stays."""

import os

from sft_core.quiet import DEBUG, debugging, quiet_libraries

__all__ = ["DEBUG", "DEFAULTS", "debugging", "quiet_libraries", "set_defaults"]

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


def set_defaults() -> None:
    """Telemetry off, servers as this project needs them, no progress bars in logs."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
