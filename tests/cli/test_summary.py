"""What a run's last lines offer is there."""

import io

import pytest
from rich.console import Console

from cli.summary import Ended, print_summary
from sft_core.plan import Plan
from sft_core.recipe import resolve

RECIPE = {"name": "orders", "base_model": {"path": "b"}, "datasets": [{"path": "d"}]}


@pytest.mark.parametrize(
    ("aliases", "offered"),
    [
        (["champion", "candidate"], "sft chat models:/orders@champion"),
        (["candidate"], "sft chat models:/orders/7"),  # not promoted: there may be no champion
        ([], "sft chat models:/orders/7"),
    ],
)
def test_the_model_that_is_offered_exists(aliases: list[str], offered: str) -> None:
    made = {"model_name": "orders", "version": "7", "aliases": aliases, "verdict": "v", "new": True, "approval": None}
    console = Console(record=True, width=200, file=io.StringIO())
    print_summary(console, resolve(RECIPE), Plan({}, "", None), Ended(made), 1.0)
    (line,) = [line for line in console.export_text().splitlines() if "sft chat" in line]
    assert line.endswith(offered)
