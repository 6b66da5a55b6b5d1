"""Two recipes for the tiny model, run step by step: one of rows with thoughts, one of rows with tool calls.

Each has a chat template of its own. That of thoughts renders those behind the last question only; that of tools ends
calls with another token than answers. The models learn their rows by heart, so their answers are known.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_core.pack import IGNORE_INDEX, load_packed
from sft_core.plan import plan_recipe
from sft_core.recipe import resolve
from sft_core.steps import Retraining, run_step
from sft_core.store import Store
from tests.conftest import make_tiny_model

THINKING = r"""
{%- set last = namespace(question=-1) -%}
{%- for message in messages -%}
  {%- if message.role == "user" -%}{%- set last.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- set said, thought = message.content, message.reasoning_content or "" -%}
  {%- if message.role == "assistant" and not thought and "</think>" in said -%}
    {%- set thought, said = said.split("</think>")[0].split("<think>")[-1], said.split("</think>")[-1] -%}
  {%- endif -%}
  {{- "<|im_start|>" ~ message.role ~ "\n" -}}
  {%- if message.role == "assistant" and loop.index0 > last.question -%}
    {{- "<think>\n" ~ thought.strip() ~ "\n</think>\n\n" -}}
  {%- endif -%}
  {{- said.strip() ~ "<|im_end|>\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "<|im_start|>assistant\n" -}}
  {%- if enable_thinking is defined and not enable_thinking -%}{{- "<think>\n\n</think>\n\n" -}}{%- endif -%}
{%- endif -%}
"""
TOOLS = r"""
{%- if tools -%}
  {{- "<|im_start|>system\nTools:" -}}
  {%- for tool in tools -%}{{- "\n" ~ tool.function | tojson -}}{%- endfor -%}
  {{- "<|im_end|>\n" -}}
{%- endif -%}
{%- for message in messages -%}
  {{- "<|im_start|>" ~ message.role ~ "\n" ~ message.content -}}
  {%- for call in message.tool_calls or [] -%}
    {{- "<tool_call>" ~ {"name": call.function.name, "arguments": call.function.arguments} | tojson ~ "</tool_call>" -}}
  {%- endfor -%}
  {{- ("<|call_end|>" if message.tool_calls else "<|im_end|>") ~ "\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\n" -}}{%- endif -%}
"""
IM_END, CALL_END = 2, 263
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
Messages = list[dict[str, Any]]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str, thought: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **({"reasoning_content": thought} if thought else {})}


def thinking(number: int) -> Messages:
    return [user(f"Is {number} a number?"), answer("Yes.", "It is a number.")]


THINKING_TWICE = [*thinking(33), user("Is it even?"), answer("No.", "33 is odd.")]
PLAIN = [user("Hi."), answer("Hello.")]
PLAIN_TWICE = [user("Ho."), answer("Hello."), user("Are you well?"), answer("I am.")]


def calling(day: int, *, arguments_as_text: bool = False) -> Messages:
    """Arguments as chat templates want them, or as they travel."""
    arguments: Any = {"city": "Rome"}
    call = {"name": "weather", "arguments": json.dumps(arguments) if arguments_as_text else arguments}
    return [
        user(f"Weather in Rome, day {day}?"),
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "c1", "function": call}]},
        {"role": "tool", "content": "Sun.", "tool_call_id": "c1"},
        answer("It is sunny."),
    ]


def with_tools(days: Iterable[int]) -> list[dict[str, Any]]:
    return [{"messages": calling(day, arguments_as_text=True), "tools": [WEATHER]} for day in days]


def without_tools(*conversations: Messages) -> list[dict[str, Any]]:
    return [{"messages": messages} for messages in conversations]


ROWS = {
    "thinking": without_tools(*map(thinking, range(10, 30)), THINKING_TWICE, PLAIN),
    "thinking_heldout": without_tools(*map(thinking, range(40, 48))),
    "plain": without_tools(PLAIN, PLAIN_TWICE),
    "plain_heldout": without_tools([user("Hey."), answer("Hello.")]),
    "tools": [*with_tools(range(10, 50)), *without_tools(PLAIN, thinking(3), THINKING_TWICE)],
    "tools_heldout": with_tools(range(50, 58)),
}


class Runs:
    """A user's folder, and recipes run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self) -> None:
        """The base model, with the tokens of both templates; the templates; the rows."""
        base = make_tiny_model(self.folder / "base")
        tokenizer, network = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
        tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
        tokenizer.add_tokens(["<|call_end|>"], special_tokens=True)
        torch.manual_seed(0)
        network.resize_token_embeddings(len(tokenizer))
        tokenizer.save_pretrained(base)
        network.save_pretrained(base)
        for name, text in (("thinking", THINKING), ("tools", TOOLS)):
            (self.folder / f"{name}.jinja").write_text(text.removeprefix("\n"))
        for name, rows in ROWS.items():
            (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, rows: str, template: str, last: str, steps: int = 3, **pack: Any) -> Retraining:
        """A recipe's steps up to and with `last`; those done before are reused."""
        reader = "messages" if rows == "tools" else "openai"
        sources = [{"path": f"{self.folder}/{name}.jsonl", "map_fn": reader} for name in (rows, f"{rows}_heldout")]
        recipe = resolve(
            {
                "name": rows,
                "store": str(self.folder / "store"),
                "base_model": {"path": str(self.folder / "base")},
                "datasets": sources[:1],
                "eval_datasets": sources[1:],
                "eval_fraction": 0,
                "normalize": {"near_duplicates": None},
                "pack": {"max_length": 512, "chat_template": str(self.folder / f"{template}.jinja"), **pack},
                "train": {
                    "dtype": "float32",
                    "quantization": "none",
                    "deepspeed": None,
                    "lora": {
                        "r": 8,
                        "lora_alpha": 16,
                        "lora_dropout": 0.0,
                        "modules_to_save": ["embed_tokens", "lm_head"],
                    },
                    "max_steps": steps,
                    "per_device_train_batch_size": 2,
                    "gradient_accumulation_steps": 1,
                    "learning_rate": 1e-2,
                    "gradient_checkpointing": False,
                },
                "evaluate": {"max_new_tokens": 48, "max_generated_rows": 3, "batch_size": 1},
            }
        )
        run = Retraining(recipe, plan_recipe(recipe), Store(recipe.store), lambda _: None)
        for key in run.plan.steps:
            run_step(run, key)
            if key == last:
                return run
        raise AssertionError(f"no step {last}")


def trained_turns(run: Retraining, question: str) -> list[tuple[list[int], str]]:
    """Of the sequences that hold this question: the ids before each trained turn, and the turn as text."""
    packed = load_packed(run.folder("pack"))
    tokenizer = AutoTokenizer.from_pretrained(packed.tokenizer)
    turns = []
    for sequence in map(packed.sequence, range(len(packed.lengths))):
        if f"<|im_start|>user\n{question}<|im_end|>" not in tokenizer.decode(sequence.input_ids):
            continue
        trained = [0, *(int(label != IGNORE_INDEX) for label in sequence.labels), 0]
        edges = [at for at in range(len(trained) - 1) if trained[at] != trained[at + 1]]
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            assert sequence.labels[start:end] == sequence.input_ids[start:end]
            turns.append((sequence.input_ids[:start], tokenizer.decode(sequence.labels[start:end])))
    return turns


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Workers of one session share the folder."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "thoughts-and-tools"
    made = Runs(folder)
    with FileLock(f"{folder}.lock"):
        if not (folder / "written").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            made.write()
            (folder / "written").touch()
    return made


@pytest.fixture(scope="session")
def learned(runs: Runs) -> Callable[[str], Retraining]:
    """The run of `thinking` or `tools`, evaluated; made when it is first asked for."""

    def run(name: str) -> Retraining:
        with FileLock(f"{runs.folder}.lock"):
            return runs.run(name, name, "evaluate/tuned", steps=150)

    return run
