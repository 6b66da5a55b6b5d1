"""A retraining is cancelled while its training runs in another work pool, with two ranks."""

from tests.services.long_training import (
    SAVE_STEPS,
    TRAINING,
    attempts,
    mlflow_statuses,
    newest_step,
    processes,
    said_saved,
    store_of,
    wait_for_part,
    wait_for_step,
    wait_gone,
    write_long_recipe,
)
from tests.services.stack import Stack, wait_until

CANCELLING = {"state": {"type": "CANCELLING"}, "force": False}


def test_cancelling_the_parent_cancels_the_training(stack: Stack) -> None:
    recipe = write_long_recipe(stack, "parent", num_processes=2)
    store = store_of(stack, "parent")
    parent = stack.run_deployment("retrain/on-demand", {"recipe": recipe})
    wait_for_step(store, SAVE_STEPS)
    train = wait_for_part(stack, parent, "train")
    assert len(processes(stack, TRAINING)) == 3  # torchrun and two ranks

    stack.api("POST", f"/flow_runs/{parent}/set_state", CANCELLING)

    assert stack.wait_final(parent)["state_type"] == "CANCELLED"
    assert stack.wait_final(train["id"])["state_type"] == "CANCELLED"
    wait_gone(stack, TRAINING)
    wait_gone(stack, "prefect.engine")
    assert len(attempts(stack, parent, "train")) == 1
    assert said_saved(store)
    wait_until(lambda: "RUNNING" not in str(mlflow_statuses(stack, "parent")), 60)
    assert mlflow_statuses(stack, "parent")["train"] == ["KILLED"]


def test_cancelling_the_training_cancels_the_parent_and_the_next_run_goes_on(stack: Stack) -> None:
    recipe = write_long_recipe(stack, "part")
    store = store_of(stack, "part")
    parent = stack.run_deployment("retrain/on-demand", {"recipe": recipe})
    wait_for_step(store, SAVE_STEPS)
    train = wait_for_part(stack, parent, "train")

    stack.api("POST", f"/flow_runs/{train['id']}/set_state", CANCELLING)  # as the button in the UI does

    assert stack.wait_final(train["id"])["state_type"] == "CANCELLED"
    assert stack.wait_final(parent)["state_type"] == "CANCELLED"
    assert len(attempts(stack, parent, "train")) == 1
    wait_gone(stack, TRAINING)
    wait_until(lambda: "RUNNING" not in str(mlflow_statuses(stack, "part")), 60)
    assert said_saved(store)
    saved = newest_step(store)

    again = stack.run_deployment("retrain/on-demand", {"recipe": recipe})
    assert stack.wait_final(again)["state_type"] == "COMPLETED"
    (second,) = attempts(stack, again, "train")
    assert any(f"resuming from checkpoint-{saved} of" in line for line in stack.logs(second["id"]))
    assert all(statuses == ["FINISHED"] for statuses in mlflow_statuses(stack, "part").values())
