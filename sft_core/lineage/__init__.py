"""Where a model comes from, told by manifests alone: its ancestry, its rows, what changed, whether it comes out again.

In: manifests, recipe and plan as a retraining recorded them; for rows also the store. Knows nothing of MLflow.
"""

from sft_core.lineage.ancestry import Link, Recorded, walk_ancestry
from sft_core.lineage.difference import Difference, compare_recorded
from sft_core.lineage.reproduction import Compared, reproduce
from sft_core.lineage.rows import RowUse, is_row_id, row_ids_of, trained_row_ids, use_of_row

__all__ = [
    "Compared",
    "Difference",
    "Link",
    "Recorded",
    "RowUse",
    "compare_recorded",
    "reproduce",
    "is_row_id",
    "row_ids_of",
    "trained_row_ids",
    "use_of_row",
    "walk_ancestry",
]
