"""Evaluation, the certificate and the chat within a GPU's memory: counted on a CPU."""

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from sft_core import chat
from sft_core.devices import placement
from sft_core.errors import MemoryFault
from sft_core.evaluate import EvaluatedModel, _load, scoring
from sft_core.evaluate.generation import generate_answers
from sft_core.evaluate.scoring import score_sequences
from sft_core.merge.certificate import _logits
from sft_core.pack import Sequence
from tests.sft_core.architectures import SMALL, VOCABULARY

FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has 8 GiB of which 1 is free. More"
)


def tiny() -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **SMALL)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model


def sequence(length: int, supervised: int) -> Sequence:
    ids = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return Sequence(ids, [-100] * (length - supervised) + ids[length - supervised :])


SEQUENCES = [sequence(9, 4), sequence(20, 3), sequence(5, 1), sequence(12, 12), sequence(7, 0)]


def scores_by_hand(model: Any) -> list[tuple[int, int, float]]:
    """From whole logits, one sequence at a time."""
    expected = []
    for one in SEQUENCES:
        ids, labels = torch.tensor([one.input_ids]), torch.tensor(one.labels)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        pairs = [(logits[i], int(labels[i + 1])) for i in range(len(labels) - 1) if labels[i + 1] != -100]
        loss = sum(float(-row.log_softmax(-1)[target]) for row, target in pairs)
        expected.append((len(pairs), sum(int(row.argmax()) == target for row, target in pairs), loss))
    return expected


@pytest.mark.parametrize("old_form", [False, True])
def test_scores_come_from_supervised_logits_alone(old_form: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", 3)
    model, made = tiny(), []
    model.lm_head.register_forward_hook(lambda _, inputs, output: made.append(output.shape[:-1].numel()))
    forward = model.forward
    if old_form:
        monkeypatch.setattr(
            model, "forward", lambda input_ids, attention_mask, use_cache: forward(input_ids, attention_mask)
        )
    found = score_sequences(model, SEQUENCES, 2)
    assert made == ([14, 24, 20] if old_form else [1, 15, 3])  # batches of lengths (5, 7), (9, 12), (20)
    monkeypatch.undo()
    for score, (tokens, correct, loss) in zip(found, scores_by_hand(model), strict=True):
        assert (score.tokens, score.correct) == (tokens, correct)
        assert score.loss_sum == pytest.approx(loss, abs=1e-4)


def test_batches_are_bounded_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 24)
    model, shapes = tiny(), []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    score_sequences(model, SEQUENCES, 16)
    assert shapes == [(2, 7), (2, 12), (1, 20)]
    assert max(rows * length for rows, length in shapes) <= 24


def test_a_batch_is_halved_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny(), []
    whole = scoring._score_batch

    def full(network: Any, batch: list[Sequence]) -> Any:
        asked.append(len(batch))
        if len(batch) > 1:
            raise FULL
        return whole(network, batch)

    expected = score_sequences(model, SEQUENCES, 16)
    monkeypatch.setattr(scoring, "_score_batch", full)
    found = score_sequences(model, SEQUENCES, 16)
    assert asked == [5, 2, 1, 1, 3, 1, 2, 1, 1]
    assert [score.loss_sum for score in found] == pytest.approx([score.loss_sum for score in expected], abs=1e-4)
    monkeypatch.setattr(scoring, "_score_batch", lambda *_: (_ for _ in ()).throw(FULL))
    with pytest.raises(MemoryFault, match=r"scoring a conversation of up to 20 tokens: CUDA out of memory.*max_length"):
        score_sequences(model, SEQUENCES, 16)


def test_answers_are_generated_by_halves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny(), SimpleNamespace(pad_token_id=0, decode=lambda ids, **_: " ".join(map(str, ids)))
    prompts, options = [[5, 6, 7], [8, 9], [3, 4, 5, 6]], {"max_new_tokens": 4, "batch_size": 3}
    expected = generate_answers((model, tokenizer), prompts, options, [2])
    generate, asked = model.generate, []

    def full(**inputs: Any) -> Any:
        asked.append(len(inputs["input_ids"]))
        if len(inputs["input_ids"]) > 2:
            raise FULL
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", full)
    assert generate_answers((model, tokenizer), prompts, options, [2]) == expected
    assert asked == [3, 1, 2]


def test_the_certificates_models_are_never_there_at_once() -> None:
    alive: list[Any] = []

    def load() -> Any:
        assert not any(model() is not None for model in alive), "the model before is still there"
        model = tiny()
        model.itself = lambda: model  # a cycle, as 4-bit layers have
        alive.append(weakref.ref(model))
        return model

    gc.disable()  # no collection by chance
    try:
        first, second = _logits(load, SEQUENCES[:2]), _logits(load, SEQUENCES[:2])
    finally:
        gc.enable()
    assert len(alive) == 2
    assert [tuple(logits.shape) for logits in first] == [(4, VOCABULARY), (3, VOCABULARY)]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_weights_are_read_straight_onto_the_gpu(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert placement() == {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    asked: list[Any] = []

    def read(_: Path, **options: Any) -> Any:
        asked.append(options["device_map"])
        return tiny()  # its `to` would fail: there is no such device

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)
    _load(EvaluatedModel(folder=tiny_model, max_length=8))
    chat.load_chat_model(tiny_model, None, "chatml")
    assert asked == [{"": 3}, {"": 3}]


def test_a_chat_that_does_not_fit_ends_with_one_error(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chat.load_chat_model(tiny_model, None, "chatml")

    def full(**_: Any) -> Any:
        raise FULL

    monkeypatch.setattr(model.network, "generate", full)
    with pytest.raises(MemoryFault, match=r"an answer to \d+ tokens: CUDA out of memory.*forget the talk"):
        list(model.answer([{"role": "user", "content": "hello"}], 4, 0.0))
