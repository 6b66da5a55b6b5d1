"""The held-out loss and sample answers are seen while training, and training goes as it goes without them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_core.errors import RecipeError, SftError
from sft_core.evaluate.examples import read_examples
from sft_core.evaluate.scoring import score_sequences
from sft_core.pack import load_packed
from sft_core.recipe import TrainConfig
from sft_core.train.heldout import read_held_out
from sft_core.train.metrics import read_metrics
from tests.sft_core.train_runs import config, losses, train_here, train_together, weights_hash

DROPOUT = {"lora": {"lora_dropout": 0.1}}
"""So that a random number drawn, or a mode not restored, would show."""
SEEN = {"eval_steps": 2, "sample_prompts": ("say w1", "say it"), "sample_max_new_tokens": 5}
METHODS: dict[str, dict[str, Any]] = {
    "lora": DROPOUT,
    "whole model": {"lora": None, "dtype": "bfloat16"},
    "qlora, zero2": {**DROPOUT, "quantization": "nf4", "deepspeed": "zero2", "gradient_checkpointing": True},
    "zero3": {**DROPOUT, "deepspeed": "zero3", "sample_prompts": ()},
    "two ranks": {**DROPOUT, "num_processes": 2, "gradient_accumulation_steps": 2},
}


def pair(method: str) -> dict[str, TrainConfig]:
    """The run alone, and seen."""
    plain = config(**{**METHODS[method], "sample_prompts": ()})
    return {f"{method}, plain": plain, f"{method}, seen": config(**{**SEEN, **METHODS[method]})}


def evaluations(out: Path) -> dict[int, float]:
    """Held-out loss by optimizer step."""
    entries = read_metrics(out / "metrics.jsonl")
    return {entry["optimizer_step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry}


@pytest.fixture(scope="module")
def trained(packed: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All pairs: here, in one process under DeepSpeed, and by two ranks."""
    folder = tmp_path_factory.mktemp("pairs")
    here = {**pair("lora"), **pair("whole model")}
    found = {name: train_here(packed, tiny_model, folder / name, section) for name, section in here.items()}
    for methods in (("qlora, zero2", "zero3"), ("two ranks",)):
        sections = {name: section for method in methods for name, section in pair(method).items()}
        found |= train_together(packed, tiny_model, folder, sections)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_evaluations_and_samples_leave_the_trajectory_as_it_is(method: str, trained: dict[str, Path]) -> None:
    expected, found = (trained[name] for name in pair(method))
    assert weights_hash(found) == weights_hash(expected)
    assert losses(found) == losses(expected)
    assert list(evaluations(found)) == [2, 4, 5]  # every second step, and the last
    assert evaluations(expected) == {}
    assert not (expected / "samples.jsonl").exists()


@pytest.mark.slow
def test_the_held_out_loss_of_the_last_step_is_the_result_s_loss(
    packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Against evaluate's scores of the weights in the checkpoint, each conversation in a row of its own."""
    out = train_here(packed, tiny_model, tmp_path, config(lora=None, eval_steps=5))
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint", dtype=torch.float32).eval()
    assert "packed" not in (out / "checkpoint" / "config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(packed / "tokenizer")
    examples, _ = read_examples(packed.parent / "conversations", tokenizer, tokenizer.chat_template, 128)
    scores = score_sequences(model, [sequence for example in examples for sequence in example.sequences], 2)
    expected = sum(score.loss_sum for score in scores) / sum(score.tokens for score in scores)
    assert len(examples) == 4
    assert evaluations(out) == {5: pytest.approx(expected, rel=1e-5)}


@pytest.mark.slow
def test_sample_answers_are_those_of_the_result_and_in_the_artifact(
    packed: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train_here(packed, tiny_model, tmp_path, config(lora=None, **SEEN))
    lines = capsys.readouterr().out.splitlines()
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    asked = [(sample["optimizer_step"], sample["prompt"]) for sample in samples]
    assert asked == [(step, prompt) for step in (2, 4, 5) for prompt in SEEN["sample_prompts"]]  # type: ignore[attr-defined]
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(packed / "tokenizer")
    for sample in samples[-2:]:
        text = f"<|im_start|>user\n{sample['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        answer = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert sample["answer"] == tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert f"note: step 5: {sample['prompt']!r} -> {sample['answer']!r}" in lines


def test_the_model_is_in_its_former_mode_afterwards_and_nothing_random_is_drawn(packed: Path, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packed / "tokenizer")
    held_out = read_held_out(packed.parent / "conversations", load_packed(packed), tokenizer, 1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = held_out.loss(model, "selected", torch.device("cpu"))
    assert found == pytest.approx(held_out.loss(model, "own", torch.device("cpu")), rel=1e-6)
    assert found == pytest.approx(math.log(259), abs=0.3)  # random weights know nothing
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("key", ["load_best_model_at_end", "early_stopping_patience", "sample_prompts"])
def test_what_happens_at_evaluations_needs_them(key: str) -> None:
    value = ("hi",) if key == "sample_prompts" else 1
    with pytest.raises(ValueError, match=f"{key}: works at evaluations; set eval_steps"):
        config(**{key: value})


def test_samples_under_zero3_are_refused_before_anything_starts() -> None:
    from sft_core.train.limits import check_training

    with pytest.raises(RecipeError, match="sample_prompts with deepspeed zero3: .*take zero2"):
        check_training(config(deepspeed="zero3", **SEEN))
    assert check_training(config(deepspeed="zero2", **SEEN)) == []


@pytest.mark.slow
def test_without_conversations_there_is_nothing_to_evaluate_on(packed: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").symlink_to(packed)  # its `conversations` are not beside it
    with pytest.raises(SftError, match="of 0 held-out conversations none can be scored"):
        train_here(tmp_path / "packed", tiny_model, tmp_path, config(eval_steps=2))
