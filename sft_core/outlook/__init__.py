"""Outlook: what can be known of a retraining before it trains, so that a run that cannot end well ends early.

In: a recipe, what normalize and pack wrote, the base model's folder. Out: a DataError where the run can never promote
anything, and warnings where it probably does not do what it is for.
"""

from sft_core.outlook.heldout import check_heldout, check_scorable, heldout_needed, heldout_shortage, why_needed
from sft_core.outlook.training import warnings_before_training
from sft_core.outlook.untrained import UntrainedToken, UsedTokens, Vocabulary, untrained_tokens

__all__ = [
    "UntrainedToken",
    "UsedTokens",
    "Vocabulary",
    "check_heldout",
    "check_scorable",
    "heldout_needed",
    "heldout_shortage",
    "untrained_tokens",
    "warnings_before_training",
    "why_needed",
]
