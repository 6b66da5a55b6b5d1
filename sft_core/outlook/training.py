"""What is likely to go wrong in training, from the packed rows and the base model's files.

In: the recipe, the packed folder, the base model's folder. Out: warnings, a sentence or two each.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer

from sft_core.outlook.untrained import UntrainedToken, UsedTokens, Vocabulary, untrained_tokens
from sft_core.outlook.weight_rows import OUTPUT_MODULES, has_biased_head, input_matrix, output_matrix
from sft_core.pack.packed import BINS, SEQUENCES, TOKENIZER
from sft_core.recipe import LoraConfig, Recipe, TrainConfig

FEW_STEPS = 30
SHARDS_READ, SEQUENCES_READ = 16, 1000
"""Shards all over the data, and sequences of each, in which special tokens are looked for."""


def warnings_before_training(recipe: Recipe, packed: Path, base: Path) -> list[str]:
    """Few optimizer steps; tokens of the chat template that the base never learned. ModelError if its weights are
    torn."""
    found, vocabulary = few_steps(recipe, pq.read_metadata(packed / BINS).num_rows), read_vocabulary(packed)
    return found + untrained_words(recipe.train, base, vocabulary, used_tokens(packed, vocabulary))


def read_vocabulary(packed: Path) -> Vocabulary:
    """Of the tokenizer that pack saved."""
    tokenizer = Tokenizer.from_file(str(packed / TOKENIZER / "tokenizer.json"))  # transformers takes seconds to import
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    return Vocabulary(tokens, {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()})


def few_steps(recipe: Recipe, packed_rows: float) -> list[str]:
    """`packed_rows` of one epoch. Nothing to say where train.max_steps sets the number."""
    train, ranks = recipe.train, recipe.train.num_processes or 1
    steps = train.optimizer_steps(packed_rows * train.num_train_epochs, ranks)
    if train.max_steps is not None or steps >= FEW_STEPS:
        return []
    return [
        f"about {steps} optimizer steps in all ({packed_rows:,.0f} packed rows an epoch, {train.num_train_epochs:g} "
        f"epochs, {train.rows_a_step(ranks)} rows a step on {ranks} ranks): few models learn from fewer than "
        f"{FEW_STEPS}; lower train.gradient_accumulation_steps ({train.gradient_accumulation_steps}) or "
        f"pack.max_length ({recipe.pack.max_length}), raise train.num_train_epochs, or add rows"
    ]


def untrained_words(train: TrainConfig, base: Path, vocabulary: Vocabulary, used: UsedTokens) -> list[str]:
    """A warning of the output rows, or else of the input rows, as far as training leaves them as they are."""
    lora = train.lora
    if lora is None:
        return []
    found = [token for token in untrained_tokens(base, vocabulary, used) if not _is_adapted(lora, token)]
    written, read = ([token for token in found if token.is_output is output] for output in (True, False))
    if written:
        key = _mend(train, base, [*written, *read])
        also = f", and never read {_listed(read)}" if read else ""
        return [
            f"the base model never learned to write {_listed(written)}{also}: the chat template uses that, the rows "
            f"look untrained, and LoRA leaves them so. Answers may never end; set {key}"
        ]
    if read:
        return [
            f"the base model never read {_listed(read)}: the chat template uses that, the row looks untrained, and "
            f"LoRA leaves it so; set {_mend(train, base, read)}"
        ]
    return []


def used_tokens(packed: Path, vocabulary: Vocabulary) -> UsedTokens:
    """Added tokens in the packed rows, looked for in some rows of shards all over the data."""
    shards = sorted((packed / SEQUENCES).glob("part-*.parquet"))
    read: set[int] = set()
    written: set[int] = set()
    for shard in shards[:: -(-len(shards) // SHARDS_READ)]:
        with pq.ParquetFile(shard) as file:
            for batch in file.iter_batches(SEQUENCES_READ, columns=["input_ids", "labels"]):
                read.update(batch["input_ids"].flatten().unique().to_pylist())
                written.update(batch["labels"].flatten().unique().to_pylist())
                break
    return UsedTokens(frozenset(read & vocabulary.added.keys()), frozenset(written & vocabulary.added.keys()))


def _is_adapted(lora: LoraConfig, token: UntrainedToken) -> bool:
    """Whether training moves the token's row, whole or by an adapter. A tied head is trained under its own name too."""
    targets = (lora.target_modules,) if isinstance(lora.target_modules, str) else lora.target_modules
    rows = {token.module, *(OUTPUT_MODULES if token.is_output else ())}
    if token.token in lora.trainable_tokens:
        return True
    return any(name.rpartition(".")[2] in rows for name in (*lora.modules_to_save, *targets))


def _mend(train: TrainConfig, base: Path, tokens: Sequence[UntrainedToken]) -> str:
    """The key that trains these tokens' rows: all rows, where single ones cannot be trained (ZeRO-3 holds parts of
    weights, PEFT leaves out a head's bias)."""
    from sft_core.train.zero import deepspeed_config, zero_stage

    if zero_stage(deepspeed_config(train)) == 3 or has_biased_head(base):
        matrices = (input_matrix(base), output_matrix(base))
        names = dict.fromkeys(matrix.module for matrix in matrices if matrix is not None)
        return f"train.lora.modules_to_save: [{', '.join(names)}]"
    return f"train.lora.trainable_tokens: {json.dumps([*dict.fromkeys(t.token for t in tokens)])}"


def _listed(tokens: Sequence[UntrainedToken]) -> str:
    """`<|im_end|>` (row of lm_head: norm 0.02, typical 1.31)."""
    return ", ".join(f"{t.token} (row of {t.module}: norm {t.norm:.3g}, typical {t.typical:.3g})" for t in tokens)
