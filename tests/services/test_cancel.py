"""A retraining is cancelled, and its training once it goes on, in another work pool and with two ranks."""

from tests.services.long_training import (
    SAVE_STEPS,
    TRAINING,
    attempts,
    mlflow_statuses,
    newest_step,
    processes,
    store_of,
    times_saved,
    wait_for_part,
    wait_for_step,
    wait_gone,
    write_long_recipe,
)
from tests.services.stack import RUN_SECONDS, Stack, wait_until

CANCELLING = {"state": {"type": "CANCELLING"}, "force": False}
NAME = "cancelled"


def test_cancelling_the_parent_or_the_training_cancels_both_and_the_next_run_goes_on(stack: Stack) -> None:
    recipe = write_long_recipe(stack, NAME, num_processes=2)
    store = store_of(stack, NAME)
    parent = stack.run_deployment("retrain/on-demand", {"recipe": recipe})
    wait_for_step(store, SAVE_STEPS)
    train = wait_for_part(stack, parent, "train")
    assert len(processes(stack, TRAINING)) == 3  # torchrun and two ranks
    cancel(stack, parent)
    assert_both_ended(stack, parent, train["id"])
    first = times_saved(store)
    assert first > 0
    saved = newest_step(store)

    parent = stack.run_deployment("retrain/on-demand", {"recipe": recipe})
    train = wait_for_part(stack, parent, "train")
    went_on = f"resuming from checkpoint-{saved} of"
    wait_until(lambda: any(went_on in line for line in stack.logs(train["id"])), RUN_SECONDS)
    wait_for_step(store, saved + 1)
    cancel(stack, train["id"])  # as the button in the UI does
    assert_both_ended(stack, parent, train["id"])
    assert times_saved(store) == 2 * first
    assert newest_step(store) > saved
    saved = newest_step(store)

    again = stack.run_deployment("retrain/on-demand", {"recipe": recipe})
    assert stack.wait_final(again)["state_type"] == "COMPLETED"
    (last,) = attempts(stack, again, "train")
    assert any(f"resuming from checkpoint-{saved} of" in line for line in stack.logs(last["id"]))
    assert all(statuses == ["FINISHED"] for statuses in mlflow_statuses(stack, NAME).values())


def cancel(stack: Stack, run_id: str) -> None:
    stack.api("POST", f"/flow_runs/{run_id}/set_state", CANCELLING)


def assert_both_ended(stack: Stack, parent: str, train: str) -> None:
    """Cancelled, with nothing left at work for them and no MLflow run left open."""
    assert stack.wait_final(parent)["state_type"] == "CANCELLED"
    assert stack.wait_final(train)["state_type"] == "CANCELLED"
    wait_gone(stack, TRAINING)
    wait_gone(stack, "prefect.engine")
    assert [run["id"] for run in attempts(stack, parent, "train")] == [train]
    wait_until(lambda: "RUNNING" not in str(mlflow_statuses(stack, NAME)), 60)
    assert mlflow_statuses(stack, NAME)["train"] == ["KILLED"]
