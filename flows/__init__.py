"""The DAGs. `retrain` is the parent; `prepare`, `train` and `publish` are its three parts."""

from sft_core.credentials import hide_in_logs
from sft_core.own_packages import let_users_first
from sft_core.quiet import quiet_libraries

let_users_first()
hide_in_logs()
quiet_libraries()  # a worker's process comes in here; pydantic speaks while `retrain` is defined
