"""The whole step on a few rows: files, books, quarantine, facts, and what it refuses."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sft_core.artifacts import check_ledger
from sft_core.errors import DataError, ModelError, RecipeError, StoreError
from sft_core.pack import IGNORE_INDEX as NO
from sft_core.pack import Sequence, TokenizerSource, load_packed, pack_dataset
from sft_core.recipe import PackConfig

WORDS = ["<unk>", "</s>", "\n", "###", "Human", "Assistant", ":", "hi", "yes", "no", "<", "/", "s", ">"]
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.int8())])
ORIGIN = [("dataset", pa.string()), ("file", pa.string()), ("row_number", pa.int64())]
SCHEMA = pa.schema([("row_id", pa.string()), ("messages", pa.list_(MESSAGE)), *ORIGIN])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of a few words, without pad token and chat template."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"###|\w+|[^\w\s]|\n"), "removed", invert=True)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save_pretrained(folder)
    return folder


def ask(question: str, *answers: str, weight: int | None = 1) -> list[dict[str, Any]]:
    said = [{"role": "assistant", "content": answer, "weight": weight} for answer in answers]
    return [{"role": "user", "content": question, "weight": None}, *said]


def write(folder: Path, *shards: list[list[dict[str, Any]]]) -> Path:
    (folder / "train").mkdir(parents=True)
    number = 0
    for k, shard in enumerate(shards):
        rows = []
        for messages in shard:
            rows.append(
                {"row_id": f"r{number}", "messages": messages, "dataset": "d", "file": "f.jsonl", "row_number": number}
            )
            number += 1
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "train" / f"part-{k:05d}.parquet")
    return folder


def quarantine_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "quarantine" / "part-00000.jsonl").read_text().splitlines()]


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


PLAIN = {"chat_template": "plain"}
HI_YES = Sequence([3, 4, 6, 7, 2, 3, 5, 6, 8, 1, 2], [NO] * 8 + [8, 1, NO])
"""### Human : hi \\n ### Assistant : yes </s> \\n"""


def test_files_and_sequences(tokenizer: Path, tmp_path: Path) -> None:
    conversations = write(tmp_path / "in", [ask("hi", "yes"), ask("hi hi", "no")], [ask("hi", "yes")])
    out = tmp_path / "out"
    outcome = pack_dataset(conversations, tokenizer, PackConfig(max_length=24, **PLAIN), 42, out)
    assert hashes(out).keys() == {
        "bins.parquet",
        "quarantine/part-00000.jsonl",
        "sequences/part-00000.parquet",
        "sequences/part-00001.parquet",
        "shards.json",
        "tokenizer/chat_template.jinja",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    }
    packed = load_packed(out)
    assert packed.lengths.tolist() == [11, 12, 11]
    assert packed.sequence(0) == packed.sequence(2) == HI_YES
    assert [packed.row_id(i) for i in range(3)] == ["r0", "r1", "r2"]
    assert (packed.max_length, packed.packing, packed.pad_token_id) == (24, "best_fit", 1)
    written = pq.read_table(out / "bins.parquet")
    assert written.column("bin").to_pylist() == packed.bins(epoch=0)
    assert outcome.facts == {
        "sequences": 3,
        "tokens": 34,
        "supervised_tokens": 6,
        "split_sequences": 0,
        "special_token_text_rows": 0,
        "parted_turns": 0,
        "dropped_thoughts": 0,
        "empty_thoughts": 0,
        "epoch_sequences": 3,
        "epoch_tokens": 34,
        "packed_rows": 2,
        "fill": round(34 / 48, 6),
        "longest": 12,
        "chat_template": "plain",
        "max_length": 24,
        "pad_token": "</s>",
        "pad_token_is_eos": True,
    }
    assert outcome.ledger == {
        "sequences": {"in": 3, "out": 3, "set_aside": {}},
        "tokens": {"in": 34, "out": 34, "set_aside": {}},
        "supervised_tokens": {"in": 6, "out": 6, "set_aside": {}},
        "rows": {"in": 3, "out": 3, "set_aside": {}},
    }
    assert quarantine_of(out) == []


def test_the_saved_tokenizer_renders_as_trained(tokenizer: Path, tmp_path: Path) -> None:
    conversations = write(tmp_path / "in", [ask("hi", "yes")])
    pack_dataset(conversations, tokenizer, PackConfig(**PLAIN), 0, tmp_path / "out")
    saved = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert saved.apply_chat_template(ask("hi", "yes"), return_dict=True)["input_ids"] == HI_YES.input_ids
    assert (saved.pad_token, len(saved)) == ("</s>", len(WORDS))


ROWS = [
    ask("hi", "yes"),
    ask("hi", "yes " * 20),  # 30 tokens, 21 of them trained
    ask("hi " * 20, "yes"),  # 30 tokens, trained ones at the end
    ask("hi", "yes", weight=0),
    [{"role": "critic", "content": "hi", "weight": None}, {"role": "assistant", "content": "no", "weight": 1}],
    ask("hi </s>", "yes"),
]


def test_quarantine_and_ledger(tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = PackConfig(max_length=20, **PLAIN)
    outcome = pack_dataset(write(tmp_path / "in", ROWS), tokenizer, config, 0, out)
    check_ledger("pack", outcome.ledger)
    assert outcome.ledger == {
        "sequences": {
            "in": 6,
            "out": 2,
            "set_aside": {"no_supervised_token": 1, "overlong": 2, "template_error": 1},
        },
        "tokens": {"in": 97, "out": 26, "set_aside": {"no_supervised_token": 11, "overlong": 60}},
        "supervised_tokens": {"in": 27, "out": 4, "set_aside": {"overlong": 23}},
        "rows": {"in": 6, "out": 2, "set_aside": {"no_supervised_token": 1, "overlong": 2, "template_error": 1}},
    }
    assert [(row["row_id"], row["reason"], row["tokens"]) for row in quarantine_of(out)] == [
        ("r4", "template_error", 0),
        ("r1", "overlong", 30),
        ("r2", "overlong", 30),
        ("r3", "no_supervised_token", 11),
    ]
    assert quarantine_of(out)[1] == {
        "row_id": "r1",
        "dataset": "d",
        "file": "f.jsonl",
        "row_number": 1,
        "reason": "overlong",
        "tokens": 30,
    }
    assert outcome.facts["special_token_text_rows"] == 1
    assert load_packed(out).sequence(1).input_ids[3:8] == [7, 10, 11, 12, 13]  # hi < / s >


def test_truncate_keeps_the_head(tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = PackConfig(max_length=20, overlong="truncate", **PLAIN)
    outcome = pack_dataset(write(tmp_path / "in", ROWS[:3]), tokenizer, config, 0, out)
    check_ledger("pack", outcome.ledger)
    assert outcome.ledger["sequences"]["set_aside"] == {"no_supervised_token": 1}
    assert outcome.ledger["tokens"]["set_aside"] == {"no_supervised_token": 30, "truncated": 10}
    assert outcome.ledger["supervised_tokens"]["set_aside"] == {"no_supervised_token": 2, "truncated": 9}
    assert load_packed(out).lengths.tolist() == [11, 20]
    assert [row["row_id"] for row in quarantine_of(out)] == ["r2"]


def test_error_names_the_row(tokenizer: Path, tmp_path: Path) -> None:
    config = PackConfig(max_length=20, overlong="error", **PLAIN)
    with pytest.raises(DataError, match=r"d, f.jsonl, row 1: 30 tokens, pack.max_length is 20"):
        pack_dataset(write(tmp_path / "in", ROWS), tokenizer, config, 0, tmp_path / "out")


def test_nothing_left_is_an_error(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is left to train on: 2 overlong, 1 no_supervised_token"):
        pack_dataset(
            write(tmp_path / "in", ROWS[1:4]), tokenizer, PackConfig(max_length=20, **PLAIN), 0, tmp_path / "o"
        )


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{{ eos_token }}{% else %}{{ m.content }}{% endif %}\n{% endfor %}",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}",
    ],
    ids=["marks without the end token", "no end token", "an end token that the tokenizer lacks"],
)
def test_an_answer_without_end_token_is_refused(tokenizer: Path, tmp_path: Path, template: str) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(template)
    config = PackConfig(chat_template=str(path))
    says = r"takes none of the conversations; (no_stop|unmarked_turn): d, f.jsonl, row 0: message 1: .*"
    with pytest.raises(DataError, match=says):
        pack_dataset(write(tmp_path / "in", [ask("hi", "yes")]), tokenizer, config, 0, tmp_path / "out")


def test_other_tokens_after_loading_are_refused(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_core.pack import tokenizer as module

    load = module.load_tokenizer

    def altered(source: TokenizerSource) -> Any:
        loaded = load(source)
        if Path(source.path).name == "tokenizer":
            loaded.chat_template = loaded.chat_template.replace("### Human", "###Human:")
        return loaded

    monkeypatch.setattr(module, "load_tokenizer", altered)
    module.load_saved_tokenizer.cache_clear()
    with pytest.raises(DataError, match="row 0: training would see other tokens than serving: from token 3 on"):
        pack_dataset(write(tmp_path / "in", [ask("hi", "yes")]), tokenizer, PackConfig(**PLAIN), 0, tmp_path / "out")
    module.load_saved_tokenizer.cache_clear()


def test_clear_errors_for_missing_things(tokenizer: Path, tmp_path: Path) -> None:
    conversations = write(tmp_path / "in", [ask("hi", "yes")])
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        pack_dataset(conversations, tmp_path / "in", PackConfig(**PLAIN), 0, tmp_path / "a")
    with pytest.raises(RecipeError, match="has no chat template of its own"):
        pack_dataset(conversations, tokenizer, PackConfig(), 0, tmp_path / "b")
    with pytest.raises(DataError, match="no part-"):
        pack_dataset(tmp_path, tokenizer, PackConfig(**PLAIN), 0, tmp_path / "c")
    with pytest.raises(StoreError, match="not a packed folder"):
        load_packed(tmp_path)


def test_mapped_table_reads_the_same(tokenizer: Path, tmp_path: Path) -> None:
    conversations = write(tmp_path / "in", [ask("hi", "yes no " * n) for n in range(1, 9)], [ask("hi", "yes")])
    pack_dataset(conversations, tokenizer, PackConfig(max_length=64, **PLAIN), 7, tmp_path / "out")
    plain = load_packed(tmp_path / "out")
    for _ in range(2):  # made, then found
        mapped = load_packed(tmp_path / "out", cache=tmp_path / "tokens.arrow")
        assert mapped.lengths.tolist() == plain.lengths.tolist()
        assert [mapped.sequence(i) for i in range(9)] == [plain.sequence(i) for i in range(9)]
