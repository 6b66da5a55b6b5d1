"""What `sft models` prints: versions, chains, differences as lines and tables."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from sft_core.lineage import Compared, Difference, Link, Recorded, RowUse

if TYPE_CHECKING:
    from tasks.registry import RegisteredVersion

MARKS = {True: " ", False: "!"}


def versions_table(name: str, versions: "Sequence[RegisteredVersion]") -> Table:
    """One line a version."""
    from tasks.approval import read_approval  # imports mlflow

    table = Table("version", "aliases", "merged model", "verdict", title=name, title_justify="left", box=None)
    for version in versions:
        aliases = " ".join(f"@{alias}" for alias in version.aliases)
        barred, approval = version.tags.get("sft.barred"), read_approval(version)
        verdict = f"barred: {barred}" if barred else version.verdict
        if approval is not None and not barred:
            verdict = f"approval: {approval.outcome}. {verdict}"
        table.add_row(version.number, aliases, version.merged_fingerprint[:12], escape(verdict))
    return table


def lineage_lines(name: str, version: "RegisteredVersion", recorded: Recorded, links: Iterable[Link]) -> Iterator[str]:
    """The chain, newest first, each link with what it was made by."""
    aliases = "".join(f" @{alias}" for alias in version.aliases)
    yield f"{name} version {version.number}{aliases}: {version.verdict}"
    yield f"  recipe {recorded.recipe['name']}, project commit {recorded.commit or 'not recorded'}"
    versions: dict[str, str] = {}
    for link in links:
        yield f"{MARKS[link.sound]} <- {link.key or link.step:17} {link.kind:17} {link.fingerprint}"
        if link.step == "base_model":
            yield f"     {recorded.recipe['base_model']['path']}"
        elif link.manifest is None:
            yield "     named as an input, and not recorded"
        else:
            yield from (f"     {line}" for line in _facts(link))
            versions = link.manifest.versions
    if versions:
        yield "  libraries: " + ", ".join(f"{library} {number}" for library, number in versions.items())


def _facts(link: Link) -> Iterator[str]:
    manifest = link.manifest
    assert manifest is not None, "only links with a manifest have facts"
    if not link.sound:
        yield "altered: the fingerprint is not that of the recorded parts and inputs"
    made = f"step version {manifest.parts.get('version', '-')}, {manifest.device}, {manifest.started[:19]}Z"
    moved = "; ".join(f"{unit} {entry['in']:,} in, {entry['out']:,} out" for unit, entry in manifest.ledger.items())
    yield made + (f"; {moved}" if moved else "")
    if link.step == "evaluate":
        yield ", ".join(f"{name} {value:.4f}" for name, value in manifest.facts["metrics"].items() if value is not None)
    if link.step == "fetch":
        yield f"source {manifest.facts.get('source')}, commit {manifest.facts.get('commit') or 'none'}"


def row_table(found: "Iterable[tuple[RegisteredVersion, RowUse]]") -> Table:
    """One line a version and row_id."""
    table = Table("version", "aliases", "row_id", "", box=None)
    for version, use in found:
        table.add_row(version.number, " ".join(f"@{alias}" for alias in version.aliases), use.row_id, _words(use))
    return table


def _words(use: RowUse) -> str:
    return f"{use.use}, through {use.through}" if use.through else use.use


def difference_lines(difference: Difference, shown: int) -> Iterator[str]:
    """Rows, recipe, libraries, scores."""
    for words, rows in (("rows added", difference.added), ("rows removed", difference.removed)):
        if rows is None:
            yield f"{words}: not known, the packed rows of a version are not in its store"
            continue
        yield f"{words}: {len(rows)}"
        yield from (f"  {row_id}" for row_id in rows[:shown])
        if len(rows) > shown:
            yield f"  and {len(rows) - shown} more"
    yield f"recipe: {len(difference.recipe)} keys differ"
    yield from (f"  {line}" for line in difference.recipe)
    yield from (f"library {line}" for line in difference.versions)
    yield "scores" + ("" if difference.same_held_out else " (of different held-out rows: they cannot be compared)")
    for name, (old, new) in difference.scores.items():
        yield f"  {name}: {_figure(old)} -> {_figure(new)}"


def compared_line(compared: Compared) -> str:
    """One step of a reproduction."""
    result = f"equal, {compared.files} files" if compared.equal else f"DIFFERS: {'; '.join(compared.different)}"
    return f"{compared.key}: {result}" + (f" ({compared.note})" if compared.note else "")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
