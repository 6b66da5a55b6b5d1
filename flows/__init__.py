"""The DAGs. `retrain` is the parent; `prepare`, `train` and `publish` are its three parts."""

from sft_core.own_packages import hold_names

hold_names()  # `tasks` too is ours from here on, whatever lies in the user's folder
