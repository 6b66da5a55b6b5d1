"""The `sft` command: the front door over flows, tasks and the core. Imports lazily, so that `--help` is quick."""

from sft_core.own_packages import let_users_first

let_users_first()
