"""The gate's figures as a Markdown table: what a person reads before they approve a version.

In: a verdict. Out: Markdown: the words, a line a comparison, then the slices that got worse and the notes.
"""

from collections.abc import Iterator

from sft_core.markdown import as_text
from sft_core.register.comparison import Comparison
from sft_core.register.judge import Verdict

HEAD = ("against", "metric", "tuned", "the other", "gain, 95 % interval", "p (needed)", "rows", "left out")


def verdict_table(verdict: Verdict) -> str:
    """Markdown."""
    return "\n".join(_lines(verdict))


def _lines(verdict: Verdict) -> Iterator[str]:
    passed = "The gate would promote it" if verdict.manual else "The gate promotes it"
    yield f"**{passed if verdict.promote else 'The gate does not promote it'}.**\n"
    yield f"| {' | '.join(HEAD)} |"
    yield "|---" * len(HEAD) + "|"
    for comparison in verdict.comparisons:
        yield f"| {' | '.join(_cells(comparison))} |"
    for result in verdict.slices:
        if result.blocks:
            yield f"\n- {as_text(result.words)}"
    for note in verdict.notes:
        yield f"\n- {as_text(note)}"


def _cells(comparison: Comparison) -> tuple[str, ...]:
    return (
        comparison.against,
        comparison.metric,
        f"{comparison.tuned:.4f}",
        f"{comparison.other:.4f}",
        f"{comparison.gain:+.4f} ({comparison.low:+.4f} to {comparison.high:+.4f})",
        f"{comparison.p:.2g} ({comparison.level:.2g})",
        f"{comparison.rows:,}",
        f"{comparison.excluded:,}",
    )
