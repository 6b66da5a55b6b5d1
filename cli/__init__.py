"""The `sft` command: the front door over flows, tasks and the core. Imports lazily, so that `--help` is quick."""

from sft_core.own_packages import hold_names

hold_names()  # `tasks` too is ours from here on, whatever lies in the user's folder
