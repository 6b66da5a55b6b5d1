"""A base that never learned to write the template's end token: warned of before training, refused after it, and mended
by the key that the warning names. The whole chain of steps on a small model that is really pretrained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sft_core.errors import DataError
from sft_core.evaluate import EvaluationReport, read_report
from sft_core.plan import plan_recipe
from sft_core.recipe import resolve
from sft_core.register import Terms, endings_of, judge
from sft_core.register.stored import judge_stored
from sft_core.steps import Retraining, run_step
from sft_core.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # two trainings in processes of their own; alone 40 s

COLOURS = "red green blue black white brown golden silver purple orange".split()
THINGS = "kettle lamp rope chair mirror spoon basket clock carpet ladder pillow bucket".split()
MORE_WORDS = """
    morning evening garden window river mountain bridge castle forest village winter summer yellow circle square market
    bottle button candle jacket letter number paper pencil picture pocket ribbon saddle shovel table thread ticket
""".split()
PHRASES = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
STEPS, BATCH, LENGTH = 120, 16, 48
MAX_NEW_TOKENS = 24
MENDED = {"lora": {"trainable_tokens": CHAT_TOKENS}}


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [f"I see a {phrase}." for phrase in PHRASES] + [f"I see a {word}." for word in MORE_WORDS for _ in range(9)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def make_base(folder: Path) -> Path:
    """Pretrained to repeat what it saw; then chat tokens are added, whose rows transformers makes the others' mean."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    texts = [" ".join(f"I see a {PHRASES[(7 * n + k * k) % 120]}." for k in range(40)) for n in range(BATCH * 8)]
    ids = torch.tensor([tokenizer(text)["input_ids"][: LENGTH * 2] for text in texts])
    for step in range(STEPS):
        rows = ids[(step * BATCH) % len(ids) :][:BATCH, step % LENGTH :][:, :LENGTH]
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS})
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained-end")
    make_base(folder / "base")
    rows = [{"instruction": f"Name the {p}.", "input": "", "output": f"I see a {p}."} for p in PHRASES]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def retrained(project: Path, train: dict[str, Any]) -> tuple[Retraining, list[str]]:
    """Every step but register, and what pack would warn of before the training."""
    recipe = resolve(
        {
            "name": "ends",
            "store": str(project / "store"),
            "base_model": {"path": str(project / "base")},
            "datasets": [{"path": str(project / "rows.jsonl"), "map_fn": "alpaca"}],
            "eval_fraction": 0.3,
            "normalize": {"near_duplicates": None},
            "pack": {"max_length": 128, "chat_template": "chatml"},
            "train": {
                "quantization": "none",
                "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
                "dtype": "float32",
                "deepspeed": None,
                "num_train_epochs": 8,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 1,
                "learning_rate": 1e-2,
                "gradient_checkpointing": False,
                "num_processes": 1,
            },
            "evaluate": {"max_new_tokens": MAX_NEW_TOKENS},
        },
        {"train": train},
    )
    run = Retraining(recipe, plan_recipe(recipe), Store(recipe.store), on_line=lambda _: None)
    warnings: list[str] = []
    for key in run.plan.steps:
        if key == "train":
            warnings = run.warnings()
        run_step(run, key)
    return run, warnings


def reports(run: Retraining) -> tuple[EvaluationReport, EvaluationReport]:
    tuned, base = (read_report(run.folder(f"evaluate/{name}")) for name in ("tuned", "base"))
    return tuned, base


def test_answers_that_never_end_are_foretold_refused_and_mended(project: Path) -> None:
    run, warnings = retrained(project, {})
    (said,) = warnings
    assert said.startswith("the base model never learned to write <|im_end|> (row of lm_head: norm ")
    assert ", and never read <|im_start|> (row of embed_tokens: norm " in said
    assert said.endswith('set train.lora.trainable_tokens: ["<|im_end|>", "<|im_start|>"]')
    tuned, base = reports(run)
    assert judge(tuned, base, None, Terms()).promote  # its loss alone would do
    answers = endings_of(tuned, MAX_NEW_TOKENS)
    assert answers.answers >= 20
    assert answers.unfinished == answers.answers
    with pytest.raises(DataError, match=r"not registered: \d+ of \d+ answers of the tuned model do not end"):
        judge_stored(run, 1, against_champion=False)

    run, warnings = retrained(project, MENDED)
    assert warnings == []
    tuned, base = reports(run)
    assert endings_of(tuned, MAX_NEW_TOKENS).share < 0.2
    verdict = judge_stored(run, 1, against_champion=False).verdict
    assert verdict.promote
    assert f"base 0 of {len([s for s in base.scores if s.answer is not None])}" in verdict.words
