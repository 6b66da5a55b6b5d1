"""What a flow-run process imports, the user's folder being first on its `sys.path`: the entrypoints of prefect.yaml."""

from flows.prepare import prepare
from flows.promote import promote, rollback
from flows.publish import publish
from flows.retrain import retrain
from flows.train import train

__all__ = ["prepare", "promote", "publish", "retrain", "rollback", "train"]
