"""Register: the reports of tuned, base and champion -> a verdict, and the page that explains it.

In: reports, manifests' ledgers and facts, training metrics. Out: `Verdict`, HTML. Pure: the registry's client is in
`tasks/register.py`.
"""

from sft_core.register.comparison import Comparison, Terms
from sft_core.register.endings import Endings, ended_of, endings_of, endings_words, unfinished_answers
from sft_core.register.judge import Verdict, judge
from sft_core.register.page import Material, render_page
from sft_core.register.sentinels import (
    Finding,
    broken_adapter,
    certificate_over_bound,
    evaluation_rows_in_training,
    no_supervised_tokens,
    read_row_ids,
    refuse,
    strange_scores,
)
from sft_core.register.slices import SliceResult
from sft_core.register.table import verdict_table

__all__ = [
    "Comparison",
    "Endings",
    "Finding",
    "Material",
    "SliceResult",
    "Terms",
    "Verdict",
    "broken_adapter",
    "certificate_over_bound",
    "ended_of",
    "endings_of",
    "endings_words",
    "evaluation_rows_in_training",
    "judge",
    "no_supervised_tokens",
    "read_row_ids",
    "refuse",
    "render_page",
    "strange_scores",
    "unfinished_answers",
    "verdict_table",
]
