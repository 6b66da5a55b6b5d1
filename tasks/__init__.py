"""One Prefect task a step: a decorator, one call into `sft_core`, a record in MLflow, the artifact reference back."""

from sft_core.own_packages import let_users_first

let_users_first()
