"""One Prefect task a step: a decorator, one call into `sft_core`, a record in MLflow, the artifact reference back."""
