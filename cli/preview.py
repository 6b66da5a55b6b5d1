"""`sft data preview`: rows of a recipe as the model will see them.

In: a recipe. Out: of the first rows of each data set, every token that training will read, the trained ones marked; and
the thoughts that the chat template leaves out.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.run import RecipeArgument, SetOption
from sft_core.terminal import one_line, safe, say

RowsOption = Annotated[int, typer.Option("--rows", min=1, metavar="N", help="Rows to show, over all data sets.")]
TRAINED_STYLE = "bold green"
Piece = tuple[str, bool]
"""A part of a sequence's text, and whether it is trained."""


@dataclass(frozen=True, slots=True)
class Previewed:
    """One sequence of a row, or why the row makes none; or a thought of it that is in no sequence."""

    heading: str
    pieces: tuple[Piece, ...]


def preview(recipe: RecipeArgument, rows: RowsOption = 3, set_: SetOption = None) -> None:
    """Show rows as the model will see them: every token, the trained ones in colour.

    Fetches the recipe's data sets into a temporary folder, so the store is left alone, and renders the first training
    rows with the recipe's chat template. Without colours (a pipe, NO_COLOR) trained text stands in
    [[ ]]. A row that the template cannot render is shown with the reason, as is one longer than pack.max_length.
    Thoughts that the template leaves out are shown behind their row.

    Example: sft data preview demo --rows 5
    """
    from rich.text import Text

    from cli.console import SafeConsole
    from sft_core.recipe import parse_settings, resolve

    resolved = resolve(recipe, parse_settings(set_ or []))
    console = SafeConsole(highlight=False, soft_wrap=True)
    if console.color_system is None or console.no_color:
        say(preview_text(resolved, rows), end="")
        return
    for shown in preview_rows(resolved, rows):
        console.print(Text(shown.heading, "bold"))
        console.print(styled(shown.pieces), end=gap(shown))


def preview_rows(recipe: Any, rows: int) -> Iterator[Previewed]:
    """The first training rows of `recipe`, as many of each data set as of the others. SftError as in a run."""
    from sft_core.pack import template_of

    tokenizer = _tokenizer(recipe.base_model)
    template = template_of(recipe.pack, tokenizer)
    with tempfile.TemporaryDirectory(prefix="sft-preview-") as folder:
        for row in _conversations(recipe, rows, Path(folder)):
            yield from _sequences(row, tokenizer, template, recipe.pack)


def preview_text(recipe: Any, rows: int) -> str:
    """What a terminal without colours shows."""
    return "".join(f"{shown.heading}\n{bracketed(shown.pieces)}{gap(shown)}" for shown in preview_rows(recipe, rows))


def gap(shown: Previewed) -> str:
    """What makes one empty line before the next row."""
    return "\n" if not shown.pieces or shown.pieces[-1][0].endswith("\n") and not shown.pieces[-1][1] else "\n\n"


def bracketed(pieces: tuple[Piece, ...]) -> str:
    """Trained text in [[ ]]."""
    return "".join(f"[[{text}]]" if trained else text for text, trained in pieces)


def styled(pieces: tuple[Piece, ...]) -> Any:
    """Trained text in colour, the rest dim."""
    from rich.text import Text

    return Text.assemble(*[(text, TRAINED_STYLE if trained else "dim") for text, trained in pieces])


def _tokenizer(base: Any) -> Any:
    """The base model's tokenizer; of one on the hub, nothing else is downloaded."""
    from transformers import AutoTokenizer  # imports torch

    from sft_core.base_model import describe_base_model, local_base_model
    from sft_core.errors import ModelError

    local = Path(base.path).is_dir()
    where = local_base_model(base, None) if local else base.path
    revision = None if local else describe_base_model(base).commit
    try:
        return AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=base.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"base_model.path {where}: no tokenizer can be loaded: {str(error).splitlines()[0]}") from None


def _conversations(recipe: Any, rows: int, folder: Path) -> Iterator[dict[str, Any]]:
    """The first training rows of each data set, as evenly as they go. Shards are normalized until there are enough."""
    from sft_core.fetch import fetch_dataset
    from sft_core.normalize import NormalizeSource, normalize_dataset

    sources, left = [], rows
    for number, dataset in enumerate(recipe.datasets):
        fetched = folder / f"fetch-{number}"
        fetch_dataset(dataset, fetched)
        sources.append(NormalizeSource(rows=fetched, map_fn=dataset.map_fn, name=dataset.path, weight=dataset.weight))
        share = -(-left // (len(recipe.datasets) - number))
        for row in islice(_training_rows(sources[-1], recipe), share):
            left -= 1
            yield row
    if left == rows:  # say why, as a run does
        normalize_dataset(sources, recipe.normalize, recipe.eval_fraction, recipe.seed, folder / "normalize")


def _training_rows(source: Any, recipe: Any) -> Iterator[dict[str, Any]]:
    from io import BytesIO

    from sft_core.normalize.dataset import plan_shards
    from sft_core.normalize.shard import TRAIN, make_shard
    from sft_core.shard_rows import read_shard

    for job in plan_shards([source], recipe.eval_fraction, recipe.seed):
        made = make_shard(job.argument)
        if TRAIN in made.files:
            yield from read_shard(BytesIO(made.files[TRAIN]), job.place)


def _sequences(row: dict[str, Any], tokenizer: Any, template: str, pack: Any) -> Iterator[Previewed]:
    """The sequences of one row and the thoughts in none of them; one without text if the template refuses it."""
    from sft_core.errors import RowError
    from sft_core.pack.encoding import IGNORE_INDEX, encode_renderings
    from sft_core.pack.rendering import render_conversation
    from sft_core.pack.renders import tools_of

    heading = one_line(f"row {row['row_id']}  {row['dataset']}: {row['file']}, row {row['row_number']}")
    try:
        renderings = render_conversation(row["messages"], tokenizer, template, tools=tools_of(row))
    except RowError as error:
        yield Previewed(one_line(f"{heading}  set aside by pack: {error}"), ())
        return
    sequences, thoughts, seen = encode_renderings(renderings, tokenizer), _thoughts(row["messages"]), ""
    for number, sequence in enumerate(sequences, 1):
        trained = [label != IGNORE_INDEX for label in sequence.labels]
        which = f"  sequence {number} of {len(sequences)}" if len(sequences) > 1 else ""
        counts = f"  {len(trained)} tokens, {sum(trained)} trained{_counted(thoughts)}"
        long = f"  over pack.max_length {pack.max_length}: {pack.overlong}" if len(trained) > pack.max_length else ""
        pieces = _pieces(tokenizer, sequence.input_ids, trained)
        seen += "".join(text for text, _ in pieces)
        yield Previewed(heading + which + counts + long, pieces)
    for place, thought in thoughts.items():
        if _bare(thought) not in _bare(seen):
            yield Previewed(f"the thought of messages[{place}] is in no text above", ((thought, False),))


def _thoughts(messages: list[dict[str, Any]]) -> dict[int, str]:
    """Thoughts by the place of their message, as a terminal may show them."""
    thoughts = [message.get("reasoning_content") for message in messages]
    return {place: safe(thought) for place, thought in enumerate(thoughts) if thought}


def _counted(thoughts: dict[int, str]) -> str:
    return f", {len(thoughts)} thought{'s'[: len(thoughts) > 1]}" if thoughts else ""


def _bare(text: str) -> str:
    """The text without white space, which templates and tokenizers change."""
    return "".join(text.split())


def _pieces(tokenizer: Any, ids: list[int], trained: list[bool]) -> tuple[Piece, ...]:
    """The decoded text, cut where training begins and ends. Cut after decoding: pieces by themselves lose spaces."""
    ends = [end for end in range(1, len(ids) + 1) if end == len(ids) or trained[end] != trained[end - 1]]
    pieces, before = [], ""
    for end in ends:
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append((safe(text[len(before) :]), trained[end - 1]))
        before = text
    return tuple(pieces)
