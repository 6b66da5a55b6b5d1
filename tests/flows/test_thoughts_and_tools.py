"""Thoughts and tool calls from rows to the merged model: trained, served and judged by the same ids."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from sft_core.artifacts import Manifest
from sft_core.evaluate import EvaluatedModel, evaluate_model
from sft_core.steps import Retraining, run_step
from tests.flows.thoughts_and_tools import (
    CALL_END,
    IM_END,
    PLAIN_TWICE,
    THINKING_TWICE,
    WEATHER,
    Messages,
    Runs,
    calling,
    learned,
    runs,
    thinking,
    trained_turns,
)

__all__ = ["learned", "runs"]
pytestmark = pytest.mark.slow
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call><|call_end|>'


def manifest(run: Retraining, key: str) -> Manifest:
    found = run.store.find(run.plan[key].step, run.plan[key].fingerprint)
    assert found is not None
    return found


def served(run: Retraining, messages: Messages, tools: Any = None) -> list[int]:
    """The prompt's ids that plain transformers makes of the merged folder."""
    tokenizer = AutoTokenizer.from_pretrained(run.folder("merge"))
    encoded = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=True)
    ids: list[int] = encoded["input_ids"]
    return ids


def text_of(run: Retraining, ids: list[int]) -> str:
    return str(AutoTokenizer.from_pretrained(run.folder("merge")).decode(ids))


def lend_checkpoint(trained: Retraining, run: Retraining) -> None:
    """For a run of which the template is what is tested, not the weights."""
    planned = run.plan["train"]
    with run.store.staging("train") as out:
        shutil.copytree(
            trained.folder("train"), out, ignore=shutil.ignore_patterns("manifest.json"), dirs_exist_ok=True
        )
        own = {"fingerprint": planned.fingerprint, "parts": planned.parts, "inputs": planned.inputs}
        run.store.publish(out, replace(manifest(trained, "train"), **own))


def stops(run: Retraining) -> Any:
    return json.loads((run.folder("merge") / "generation_config.json").read_text())["eos_token_id"]


def test_thoughts_are_trained_behind_the_served_prompt(learned: Callable[[str], Retraining]) -> None:
    run = learned("thinking")
    ((before, turn),) = trained_turns(run, "Is 17 a number?")
    assert turn == "<think>\nIt is a number.\n</think>\n\nYes.<|im_end|>"
    assert text_of(run, before) == "<|im_start|>user\nIs 17 a number?<|im_end|>\n<|im_start|>assistant\n"
    assert before == served(run, thinking(17)[:1])
    (first, one), (second, two) = trained_turns(run, "Is 33 a number?")  # an old thought is no part of the next prompt
    assert one == "<think>\nIt is a number.\n</think>\n\nYes.<|im_end|>"
    assert two == "<think>\n33 is odd.\n</think>\n\nNo.<|im_end|>"
    assert "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nIs it even?" in text_of(run, second)
    assert [first, second] == [served(run, THINKING_TWICE[:1]), served(run, THINKING_TWICE[:3])]
    ((_, unthought),) = trained_turns(run, "Hi.")
    assert unthought == "<think>\n\n</think>\n\nHello.<|im_end|>"
    facts = manifest(run, "pack").facts
    assert (facts["sequences"], facts["dropped_thoughts"], facts["empty_thoughts"]) == (23, 0, 1)
    assert stops(run) == IM_END


def test_calls_and_answers_are_trained_behind_the_served_prompt(learned: Callable[[str], Retraining]) -> None:
    run = learned("tools")
    (first, call), (second, told) = trained_turns(run, "Weather in Rome, day 17?")
    assert call == CALL
    assert told == "It is sunny.<|im_end|>"
    schema = json.dumps(WEATHER["function"])
    asked = f"<|im_start|>system\nTools:\n{schema}<|im_end|>\n<|im_start|>user\nWeather in Rome, day 17?<|im_end|>\n"
    assert text_of(run, first) == f"{asked}<|im_start|>assistant\n"
    result = "<|im_start|>tool\nSun.<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(run, second) == f"{asked}<|im_start|>assistant\n{CALL}\n{result}"
    assert [first, second] == [served(run, calling(17)[:upto], [WEATHER]) for upto in (1, 3)]
    assert stops(run) == [IM_END, CALL_END]


def test_rows_whose_thoughts_have_no_place_are_set_aside_and_counted(learned: Callable[[str], Retraining]) -> None:
    run = learned("tools")
    lines = (run.folder("pack") / "quarantine" / "part-00000.jsonl").read_text().splitlines()
    assert [[json.loads(line)[key] for key in ("row_number", "reason", "detail")] for line in lines] == [
        [42, "lost_thought", "message 1: its thought is not in what is trained: 'It is a number.'"],
        [43, "lost_thought", "message 3: its thought is not in what is trained: '33 is odd.'"],
    ]
    ledger = manifest(run, "pack").ledger
    assert ledger["sequences"] == {"in": 43, "out": 41, "set_aside": {"lost_thought": 2}}
    assert trained_turns(run, "Is 3 a number?") == []


def test_the_saved_template_does_not_think_without_being_told(runs: Runs, learned: Callable[[str], Retraining]) -> None:
    run = runs.run("plain", "thinking", "pack", template_kwargs={"enable_thinking": False})
    lend_checkpoint(learned("thinking"), run)
    for key in ("convert", "merge"):
        run_step(run, key)
    ((_, alone),) = trained_turns(run, "Hi.")
    assert alone == "Hello.<|im_end|>"
    (_, one), (second, two) = trained_turns(run, "Ho.")
    assert [one, two] == ["Hello.<|im_end|>", "I am.<|im_end|>"]
    assert text_of(run, second).endswith("Are you well?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert second == served(run, PLAIN_TWICE[:3])
    assert manifest(run, "pack").facts["empty_thoughts"] == 0
    untold = runs.run("plain", "thinking", "pack")
    assert manifest(untold, "pack").facts["empty_thoughts"] == 3
    ((_, alone),) = trained_turns(untold, "Hi.")
    assert alone == "<think>\n\n</think>\n\nHello.<|im_end|>"


def test_dropped_thoughts_are_not_trained_and_counted(runs: Runs) -> None:
    run = runs.run("thinking", "thinking", "pack", reasoning="drop")
    facts = manifest(run, "pack").facts
    assert (facts["dropped_thoughts"], facts["empty_thoughts"], facts["sequences"]) == (22, 23, 23)
    turns = [turn for question in ("Is 17 a number?", "Is 33 a number?") for _, turn in trained_turns(run, question)]
    yes, no = ("<think>\n\n</think>\n\nYes.<|im_end|>", "<think>\n\n</think>\n\nNo.<|im_end|>")
    assert turns == [yes, yes, no]


@pytest.mark.parametrize(
    ("name", "said", "shown"),
    [
        ("thinking", "<think>\nIt is a number.\n</think>\n\nYes.", "Is {number} a number?"),
        ("tools", "It is sunny.", "Weather in Rome, day {number}?"),
    ],
)
def test_what_is_judged_is_generated_behind_the_served_prompt(
    name: str,
    said: str,
    shown: str,
    learned: Callable[[str], Retraining],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, generate = learned(name), LlamaForCausalLM.generate
    seen: list[list[int]] = []
    ends: list[list[int]] = []

    def recording(network: Any, **options: Any) -> Any:
        seen.append(options["input_ids"][0].tolist())
        ends.append(options["eos_token_id"])
        return generate(network, **options)

    monkeypatch.setattr(LlamaForCausalLM, "generate", recording)
    model = EvaluatedModel(folder=run.folder("merge"), max_length=512)
    evaluate_model(model, run.folder("normalize"), run.recipe.evaluate, run.recipe.seed, tmp_path)
    scores = [row for row in pq.read_table(tmp_path / "scores.parquet").to_pylist() if row["answer"] is not None]
    assert [(row["answer"], row["ended"], row["exact_match"]) for row in scores] == [(said, True, True)] * 3
    asked = [number for number in range(40, 58) if shown.format(number=number) in {row["prompt"] for row in scores}]
    prompts = {
        "thinking": [served(run, thinking(number)[:1]) for number in asked],
        "tools": [served(run, calling(number)[:3], [WEATHER]) for number in asked],
    }
    assert sorted(seen) == prompts[name]
    assert ends == [[IM_END] if name == "thinking" else [IM_END, CALL_END]] * 3
    assert (run.folder("evaluate/tuned") / "scores.parquet").read_bytes() == (tmp_path / "scores.parquet").read_bytes()
