"""Scores of one model: checked against transformers' own loss and a model that is made to know the answer."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_core.errors import DataError, ModelError
from sft_core.evaluate import EvaluatedModel, evaluate_model, read_report
from sft_core.evaluate.examples import Example, read_examples
from sft_core.evaluate.generation import Answer, generate_answers
from sft_core.evaluate.scoring import score_sequences
from sft_core.pack import Sequence, encode_conversation, load_chat_template
from sft_core.recipe import EvaluateConfig

CONFIG = EvaluateConfig(max_new_tokens=4, max_generated_rows=3, batch_size=4)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory, write_conversations: Callable[..., Path]) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "c", 0, 9)


def model_of(folder: Path, max_length: int = 128, template: str = "chatml") -> EvaluatedModel:
    return EvaluatedModel(folder=folder, max_length=max_length, chat_template=load_chat_template(template))


def example_of(tiny_model: Path, messages: list[dict[str, Any]]) -> Example:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sequences = encode_conversation(messages, tokenizer, load_chat_template("chatml"))
    return Example("r", "d", [], sequences, messages)


def test_loss_equals_transformers_own_and_does_not_depend_on_the_batch(tiny_model: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    sequences = [
        Sequence([5, 6, 7, 8], [-100, -100, 7, 8]),
        Sequence([9, 10], [-100, 10]),
        Sequence([3] * 9, [-100] + [3] * 8),
    ]
    scores = score_sequences(network, sequences, 2)
    assert [score.tokens for score in scores] == [2, 1, 8]
    for sequence, score in zip(sequences, scores, strict=True):
        with torch.no_grad():
            expected = network(
                input_ids=torch.tensor([sequence.input_ids]), labels=torch.tensor([sequence.labels])
            ).loss
        assert score.loss_sum / score.tokens == pytest.approx(float(expected), abs=1e-5)
    assert score_sequences(network, sequences, 1)[0].loss_sum == pytest.approx(scores[0].loss_sum, abs=1e-5)


def test_the_report_holds_every_held_out_row_and_the_same_again(
    tiny_model: Path, conversations: Path, tmp_path: Path
) -> None:
    outcome = evaluate_model(model_of(tiny_model), conversations, CONFIG, 42, tmp_path / "a")
    evaluate_model(model_of(tiny_model), conversations, CONFIG, 42, tmp_path / "b")
    assert outcome.ledger["rows"] == {"in": 9, "out": 9, "set_aside": {}}
    assert (tmp_path / "a/scores.parquet").read_bytes() == (tmp_path / "b/scores.parquet").read_bytes()
    report = read_report(tmp_path / "a")
    assert len(report.scores) == 9
    for key in ("answer", "exact_match", "rouge_l"):
        assert sum(getattr(score, key) is not None for score in report.scores) == 3
    assert {score.ended for score in report.scores if score.answer is None} == {None}
    answered = [score for score in report.scores if score.answer is not None]
    assert [score.ended for score in answered] == [False] * 3  # a random model, four tokens
    assert [score.reference_tokens for score in answered] == [len(s.reference) + 1 for s in answered]  # and <|im_end|>
    assert (outcome.facts["ended_rows"], outcome.facts["generated_rows"]) == (0, 3)
    assert outcome.facts["metrics"]["ended"] == 0.0
    assert report.metrics() == outcome.facts["metrics"]
    assert all(score.reference.endswith("!") for score in report.scores)
    ids = {row["row_id"] for path in (conversations / "heldout").glob("*") for row in pq.read_table(path).to_pylist()}
    assert {score.row_id for score in report.scores} == ids
    assert json.loads((tmp_path / "a/report.json").read_text())["identity"] == outcome.facts["identity"]


def test_bytes_are_the_texts_own_and_encodings_tell_templates_apart(
    tiny_model: Path, conversations: Path, tmp_path: Path
) -> None:
    for template in ("chatml", "vicuna"):
        evaluate_model(model_of(tiny_model, template=template), conversations, CONFIG, 42, tmp_path / template)
    a, b = (read_report(tmp_path / template) for template in ("chatml", "vicuna"))
    assert [s.num_bytes for s in a.scores] == [s.num_bytes for s in b.scores]
    assert [s.num_bytes for s in a.scores] == [len(s.reference.encode()) for s in a.scores]
    assert all(x.encoding != y.encoding for x, y in zip(a.scores, b.scores, strict=True))
    assert a.identity.tokenizer == b.identity.tokenizer
    assert a.identity.chat_template != b.identity.chat_template


def test_rows_over_max_length_are_set_aside_and_counted(tiny_model: Path, conversations: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"of 9 held-out conversations none can be scored .*'overlong': 9"):
        evaluate_model(model_of(tiny_model, max_length=5), conversations, CONFIG, 42, tmp_path)


def test_a_model_without_any_template_is_an_error_that_says_what_to_do(
    tiny_model: Path, conversations: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="set pack.chat_template in the recipe"):
        evaluate_model(EvaluatedModel(folder=tiny_model, max_length=64), conversations, CONFIG, 42, tmp_path)


def test_an_answer_ends_at_the_stop_token_whatever_its_neighbours_do(tiny_model: Path) -> None:
    class Scripted(torch.nn.Module):
        """Continues each prompt with the tokens after its last one: 70, 71, 72, ..."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def generate(self, input_ids: Any, max_new_tokens: int, **_: Any) -> Any:
            new = input_ids[:, -1:] + 1 + torch.arange(max_new_tokens)
            return torch.cat([input_ids, new], dim=1)

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefg"]
    assert ids == list(range(ids[0], ids[0] + 7))
    options = {"max_new_tokens": 5, "batch_size": 2}
    answers = generate_answers((Scripted(), tokenizer), [[ids[0]], [0, ids[2]], [ids[1]]], options, [ids[4]])
    assert answers == [Answer("bcd", True), Answer("d", True), Answer("cd", True)]
    answers = generate_answers(
        (Scripted(), tokenizer), [[ids[0]], [ids[2]]], {**options, "max_new_tokens": 3}, [ids[4]]
    )
    assert answers == [Answer("bcd", False), Answer("d", True)]  # the stop token would have been the fourth


def test_generation_starts_from_the_ids_of_training(tiny_model: Path) -> None:
    messages = [{"role": "user", "content": "say <|im_end|>"}, {"role": "assistant", "content": "ok", "weight": 1}]
    example = example_of(tiny_model, messages)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.decode(example.prompt_ids) == "<|im_start|>user\nsay <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert example.prompt_ids.count(tokenizer.eos_token_id) == 1  # the typed one is text
    assert example.stop_id == tokenizer.eos_token_id


def test_no_answer_is_asked_for_an_untrained_or_called_last_message(tiny_model: Path) -> None:
    asked = {"role": "user", "content": "a"}
    first = {"role": "assistant", "content": "b", "weight": 1}
    last = {"role": "assistant", "content": "c", "weight": 0}
    whole = example_of(tiny_model, [asked, first, asked, {**last, "weight": 1}])
    assert whole.answer_is_trained
    assert not replace(whole, messages=[asked, first, asked, last]).answer_is_trained
    assert not replace(whole, messages=[asked, {**first, "tool_calls": "[]"}]).answer_is_trained
    assert not replace(whole, messages=[{"role": "text", "content": "d", "weight": 1}]).answer_is_trained


def test_rows_carry_tags(tiny_model: Path, conversations: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    examples, _ = read_examples(conversations, tokenizer, load_chat_template("chatml"), 128)
    assert {tuple(example.tags) for example in examples} == {("one turn",)}


def test_an_answer_ends_at_eos_too_as_a_server_has_it(tiny_model: Path, conversations: Path, tmp_path: Path) -> None:
    """The template ends answers with its own token; the model writes eos."""
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = "<pad>"
    with torch.no_grad():
        network.lm_head.weight.zero_()  # every logit is equal: the first id, <pad>, is taken
    for part in (network, tokenizer):
        part.save_pretrained(tmp_path / "model")
    evaluate_model(model_of(tmp_path / "model"), conversations, CONFIG, 42, tmp_path / "report")
    answered = [score for score in read_report(tmp_path / "report").scores if score.answer is not None]
    assert [(score.answer, score.ended) for score in answered] == [("", True)] * 3


def test_a_report_from_before_answers_were_seen_to_end_is_read(
    tiny_model: Path, conversations: Path, tmp_path: Path
) -> None:
    evaluate_model(model_of(tiny_model), conversations, CONFIG, 42, tmp_path)
    table = pq.read_table(tmp_path / "scores.parquet")
    pq.write_table(table.drop_columns(["ended", "reference_tokens"]), tmp_path / "scores.parquet")
    report = read_report(tmp_path)
    assert {(score.ended, score.reference_tokens) for score in report.scores} == {(None, None)}
    assert "ended" not in report.metrics()
