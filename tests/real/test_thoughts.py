"""Thoughts inside the content, as its own ChatML template keeps them: a real tokenizer, from rows to judged answers."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from transformers import AutoTokenizer

from sft_core.evaluate.examples import read_examples
from sft_core.pack import IGNORE_INDEX, load_packed
from sft_core.plan import plan_recipe
from sft_core.recipe import resolve
from sft_core.steps import Retraining, run_step
from sft_core.store import Store

IM_END = 2
TRAINED, HELD_OUT = range(20), range(100, 104)


def talk(number: int) -> list[dict[str, Any]]:
    """One question, or two of which the first one's answer was thought about, too."""
    sums = [
        {"role": "user", "content": f"What is {number} plus 2?"},
        {"role": "assistant", "content": f"<think>\n{number} + 2 = {number + 2}.\n</think>\n\nIt is {number + 2}."},
        {"role": "user", "content": "And doubled?"},
        {"role": "assistant", "content": f"<think>{number + 2} * 2.</think> **{2 * number + 4}**, naïvely ☺"},
    ]
    return sums[: 4 if number % 4 == 0 else 2]


def test_thoughts_in_contents_are_trained_and_served_by_the_same_ids(real_model: Path, tmp_path: Path) -> None:
    for name, numbers in (("rows", TRAINED), ("heldout", HELD_OUT)):
        lines = (json.dumps({"messages": talk(number)}) + "\n" for number in numbers)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    recipe = resolve(
        {
            "name": "thoughts",
            "store": str(tmp_path / "store"),
            "base_model": {"path": str(real_model)},
            "datasets": [{"path": str(tmp_path / "rows.jsonl"), "map_fn": "messages"}],
            "eval_datasets": [{"path": str(tmp_path / "heldout.jsonl"), "map_fn": "messages"}],
            "eval_fraction": 0,
            "normalize": {"near_duplicates": None},
            "pack": {"max_length": 256},
            "train": {
                "quantization": "none",
                "lora": {"r": 4, "lora_alpha": 8},
                "deepspeed": None,
                "dtype": "float32",
                "max_steps": 3,
                "gradient_accumulation_steps": 1,
                "learning_rate": 1e-3,
                "gradient_checkpointing": False,
            },
            "evaluate": {"max_new_tokens": 8, "max_generated_rows": 2},
        }
    )
    run = Retraining(recipe, plan_recipe(recipe), Store(recipe.store), lambda _: None)
    for key in run.plan.steps:
        if key != "evaluate/base":
            run_step(run, key)

    own, packed = AutoTokenizer.from_pretrained(real_model), load_packed(run.folder("pack"))
    merged = AutoTokenizer.from_pretrained(run.folder("merge"))
    assert len(packed.lengths) == len(TRAINED)
    for number, sequence in zip(TRAINED, map(packed.sequence, range(len(packed.lengths))), strict=True):
        messages, expected = talk(number), [IGNORE_INDEX] * len(sequence.input_ids)
        assert sequence.input_ids == ids(own, messages)
        for place in range(1, len(messages), 2):
            start = len(ids(merged, messages[:place], prompt=True))
            end = sequence.input_ids.index(IM_END, start) + 1
            expected[start:end] = sequence.input_ids[start:end]
            assert ids(own, messages[:place], prompt=True) == sequence.input_ids[:start]
            assert own.decode(sequence.input_ids[start:end]) == messages[place]["content"] + "<|im_end|>"
        assert sequence.labels == expected

    examples, ledger = read_examples(run.folder("normalize"), merged, merged.chat_template, 256)
    assert ledger == {"in": 4, "out": 4, "set_aside": {}}
    assert [example.prompt_ids for example in examples] == [
        ids(merged, talk(number)[:-1], prompt=True) for number in HELD_OUT
    ]
    scores = pq.read_table(run.folder("evaluate/tuned") / "scores.parquet").to_pylist()
    answers = [row["answer"] for row in scores if row["answer"] is not None]
    assert len(answers) == 2
    assert all(answers)
    assert json.loads((run.folder("merge") / "generation_config.json").read_text())["eos_token_id"] in (
        IM_END,
        [IM_END],
    )


def ids(tokenizer: Any, messages: list[dict[str, Any]], prompt: bool = False) -> list[int]:
    """What plain transformers makes of the messages."""
    made: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)[
        "input_ids"
    ]
    return made
