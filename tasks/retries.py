"""Which failures of a task are worth another try.

In: the state in which a try ended. Out: whether to try again.
"""

from typing import Any

from prefect.client.schemas.objects import State

from sft_core.errors import SftError


def retry_unless_users_fault(task: Any, run: Any, state: State[Any]) -> bool:
    """`retry_condition_fn`: a wrong recipe or a wrong row does not get better by trying again."""
    try:
        state.result()
    except SftError:
        return False
    except Exception:  # noqa: BLE001 - any other failure may be the network's
        return True
    return True
