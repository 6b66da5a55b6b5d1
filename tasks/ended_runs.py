"""MLflow runs of processes that could not end them themselves.

In: the part, its resolved recipe and plan. Out: the part's MLflow run and its parent's, no longer RUNNING.
"""

import logging

from mlflow.exceptions import MlflowException

from sft_core.plan import Plan
from sft_core.recipe import Recipe
from tasks.patience import first_line
from tasks.tracking import client, find_run


def end_run(part: str, recipe: Recipe, plan: Plan) -> None:
    """Mark what is left RUNNING as KILLED. A server that does not answer is left alone: it holds nobody up."""
    try:
        for which in (part, None):
            run_id = find_run(recipe, plan, which)
            if run_id is not None and client().get_run(run_id).info.status == "RUNNING":
                client().set_terminated(run_id, "KILLED")
    except MlflowException as error:
        logging.getLogger(__name__).warning("MLflow runs not ended: %s", first_line(error))
