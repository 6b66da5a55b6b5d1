"""The doors by which a process comes in: the `sft` command (`__main__`) and the deployments' flows (`deployments`).

No user has a package of this name, so it is found whatever lies in a user's folder, and then the names that users have
too are ours: `cli`, `demo`, `flows`, `recipes`, `tasks`.
"""

from sft_core.credentials import hide_in_logs
from sft_core.own_packages import hold_names

hold_names()
hide_in_logs()
