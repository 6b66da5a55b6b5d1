"""`sft data preview` as text, on a byte tokenizer."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cli.preview import preview, preview_text
from sft_core import shard_rows
from sft_core.errors import DataError, ModelError
from sft_core.fetch import cuts
from sft_core.normalize import shard
from sft_core.recipe import resolve

RECIPE = """
name: test
store: {folder}/store
base_model: {{path: {model}}}
datasets: [{{path: {folder}/a.jsonl, map_fn: oasst1}}, {{path: {folder}/b.jsonl, map_fn: oasst1}}]
eval_fraction: 1.0e-9
pack: {{max_length: 100, chat_template: chatml}}
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    for name in "ab":
        rows = [f'{{"text": "### Human: say {name}{i}### Assistant: ü {name}{i}"}}\n' for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows), "utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, model=tiny_model))
    return path


def test_rows_of_every_data_set_with_the_trained_part_marked(recipe: Path) -> None:
    lines = preview_text(resolve(str(recipe), {}), 3).splitlines()
    headings = [line for line in lines if line.startswith("row ")]
    assert [heading.split("/")[-1].split(", ")[0].split(": ")[0] for heading in headings] == ["a.jsonl"] * 2 + [
        "b.jsonl"
    ]
    assert headings[0].endswith("row 1  32 tokens, 6 trained")
    assert lines[1:6] == [
        "<|im_start|>user",
        "say a0<|im_end|>",
        "<|im_start|>assistant",
        "[[ü a0<|im_end|>]]",
        "",
    ]
    assert not (recipe.parent / "store").exists()


def test_a_data_set_that_has_too_few_leaves_its_share_to_the_next(recipe: Path) -> None:
    (recipe.parent / "a.jsonl").write_text('{"other": 1}\n')
    lines = preview_text(resolve(str(recipe), {}), 2).splitlines()
    assert [line.split(", ")[1][:5] for line in lines if line.startswith("row ")] == ["row 1", "row 2"]


def test_shards_behind_the_rows_shown_are_not_normalized(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_rows, "MOST_ROWS", 1)
    monkeypatch.setattr(cuts, "SMALL_FILE_BYTES", 0)
    made: list[Path] = []
    monkeypatch.setattr(shard, "make_shard", lambda work, make=shard.make_shard: made.append(work.path) or make(work))
    preview_text(resolve(str(recipe), {}), 4)
    assert [path.parent.parent.name[-1] + path.stem[-1] for path in made] == ["00", "01", "10", "11"]


def test_refused_and_long_rows_say_so(recipe: Path) -> None:
    long = preview_text(resolve(str(recipe), {"pack": {"max_length": 20}}), 1)
    assert "32 tokens, 6 trained  over pack.max_length 20: quarantine\n" in long
    file = recipe.parent / "asks.jinja"
    file.write_text("{{ raise_exception('not today') }}")
    shown = preview_text(resolve(str(recipe), {"pack": {"chat_template": str(file)}}), 1)
    assert "set aside by pack: template_error: the chat template refuses " in shown
    assert ": not today\n" in shown


THINKING = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if loop.last and message.reasoning_content %}<think>{{ message.reasoning_content.strip() }}</think>
{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_thoughts_are_shown_those_that_the_template_leaves_out_too(recipe: Path) -> None:
    (recipe.parent / "thinking.jinja").write_text(THINKING)
    asks = [{"role": "user", "content": f"q{n}"} for n in range(2)]
    first = {"role": "assistant", "content": "a0", "reasoning": "hm\u001b[2J 0", "weight": 0}
    messages = [asks[0], first, asks[1], {"role": "assistant", "content": "a1", "thinking": "\nhm 1\n"}]
    (recipe.parent / "a.jsonl").write_text(json.dumps({"messages": messages}))
    datasets = [{"path": str(recipe.parent / "a.jsonl"), "map_fn": "messages"}]
    set_ = {"datasets": datasets, "pack": {"chat_template": str(recipe.parent / "thinking.jinja")}}
    lines = preview_text(resolve(str(recipe), set_), 1).splitlines()
    assert lines[0].endswith(" trained, 2 thoughts")
    assert lines[1:] == [
        "<|im_start|>user",
        "q0<|im_end|>",
        "<|im_start|>assistant",
        "a0<|im_end|>",
        "<|im_start|>user",
        "q1<|im_end|>",
        "<|im_start|>assistant",
        "[[<think>hm 1</think>",
        "a1<|im_end|>]]",
        "",
        "the thought of messages[1] is in no text above",
        "hm␛[2J 0",
        "",
    ]


def test_control_characters_are_shown_not_sent(recipe: Path) -> None:
    (recipe.parent / "a.jsonl").write_text('{"text": "### Human: q\\u001b[2J### Assistant: a"}\n')
    assert "q␛[2J" in preview_text(resolve(str(recipe), {}), 2)


def test_faults_are_those_of_a_run(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="base_model.path"):
        preview_text(resolve(str(recipe), {"base_model": {"path": str(tmp_path)}}), 1)
    for name in "ab":
        (recipe.parent / f"{name}.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(DataError, match="missing_column"):
        preview_text(resolve(str(recipe), {}), 1)


def test_command_without_and_with_colours(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(preview)
    plain = CliRunner().invoke(app, [str(recipe), "--rows", "1"])
    assert plain.exit_code == 0
    assert "[[ü a0<|im_end|>]]" in plain.output
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    colour = CliRunner().invoke(app, [str(recipe), "--rows", "1"])
    assert "\x1b[1;32mü a0<|im_end|>\x1b[0m" in colour.output
    assert "[[" not in colour.output
