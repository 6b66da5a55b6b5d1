"""Scores of one model: checked against transformers' own loss and a model that is made to know the answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_core.errors import DataError, ModelError
from sft_core.evaluate import EvaluatedModel, evaluate_model, read_report
from sft_core.evaluate.generation import generate_answers
from sft_core.evaluate.scoring import score_sequences
from sft_core.pack import Sequence, encode_conversation, load_chat_template
from sft_core.recipe import EvaluateConfig

CONFIG = EvaluateConfig(max_new_tokens=4, max_generated_rows=3, batch_size=4)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory, write_conversations: Callable[..., Path]) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "c", 0, 9)


def model_of(folder: Path, max_length: int = 128) -> EvaluatedModel:
    return EvaluatedModel(folder=folder, max_length=max_length, chat_template=load_chat_template("chatml"))


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
    assert sum(score.answer is not None for score in report.scores) == 3
    assert report.metrics() == outcome.facts["metrics"]
    assert all(score.reference.endswith("!") for score in report.scores)


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
    assert answers == ["bcd", "d", "cd"]


def test_generation_starts_from_the_ids_of_training(tiny_model: Path) -> None:
    from sft_core.evaluate import _prompt_ids

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    messages = [{"role": "user", "content": "say <|im_end|>"}, {"role": "assistant", "content": "ok"}]
    (sequence,) = encode_conversation(messages, tokenizer, load_chat_template("chatml"))
    prompt = _prompt_ids(sequence)
    assert tokenizer.decode(prompt) == "<|im_start|>user\nsay <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert prompt.count(tokenizer.eos_token_id) == 1  # the typed one is text
