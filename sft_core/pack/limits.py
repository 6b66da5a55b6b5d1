"""When pack fails: more of the data is lost, in normalize and here together, than the recipe allows.

In: ledgers of both steps. Out: the account in a line, or a DataError that says what, where and what to do.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sft_core.account import account_line, check_account, check_conserved, loss_of
from sft_core.artifacts import Manifest
from sft_core.recipe import PackConfig


def check_lost(
    normalized: Manifest, packed: Mapping[str, Any], config: PackConfig, max_quarantined_fraction: float
) -> str | None:
    """`normalized`: of the conversations, `packed`: pack's ledger. What was lost, in a line; None if nothing was.
    DataError if that is more than the recipe allows."""
    check_conserved(normalized.facts["train_rows"], packed["rows"]["in"])
    losses = (loss_of("normalize", normalized.ledger), loss_of("pack", packed))
    counts = Counter(losses[1].reasons).most_common()
    why = ": " + ", ".join(f"{count:,} {reason}" for reason, count in counts) if counts else ""
    check_account(max_quarantined_fraction, losses, why, _advice(counts[0][0] if counts else "", config))
    return account_line(max_quarantined_fraction, *losses)


def _advice(commonest: str, config: PackConfig) -> str:
    """What to do about the commonest reason."""
    if commonest == "overlong":
        return f"Raise pack.max_length ({config.max_length}), set pack.overlong to split or truncate"
    if commonest == "no_supervised_token":
        return "Look at these rows with sft data preview: no answer in them is trained"
    return "Set another pack.chat_template or its variables (docs/chat-templates.md), or fix these rows"
