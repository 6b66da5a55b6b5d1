"""The DAGs. `retrain` is the parent; `prepare`, `train` and `publish` are its three parts."""

from sft_core.own_packages import hold_names
from sft_core.quiet import quiet_libraries

hold_names()  # `tasks` too is ours from here on, whatever lies in the user's folder
quiet_libraries()  # a worker's process comes in here; pydantic speaks while `retrain` is defined
