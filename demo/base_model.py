"""The demo's base model: a tiny Llama with its tokenizer, made from a seed in well under a minute.

In: a folder to write and a seed. Out: an ordinary Hugging Face model folder (config.json,
generation_config.json, model.safetensors, tokenizer files).

"Base" means what it means for the large ones: the model was trained to continue plain text, here the
day book of a made-up warehouse in which goods and order numbers keep coming back. From that it learns to
look up and repeat what stood earlier in its context. It has seen no chat, no request and no answer.

    python -m demo.base_model /tmp/base
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
VOCABULARY = 640
CONTEXT = 1024
HIDDEN = 128
INTER = 128
LAYERS = 2
STEPS = 300
BATCH = 24
LENGTH = 64
LEARNING_RATE = 3e-3
HEAD = 32
INIT = 0.06
THETA = 10000.0
LISTS = 0.6
CODES = 0.4
WORDY = 0.5
MAXCODE = 16
MUON = 0.01
DECAY = 0.4

LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
DIGITS = "0123456789"
GOODS = "kettle lamp rope chair mirror spoon basket clock carpet ladder pillow bucket candle drawer".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday".split()
TOWNS = "Leeds Bristol Dover Oxford York Derby Exeter Ripon".split()
ITEMS = GOODS + DAYS + TOWNS
WORDS = (
    "order parcel box boxes goods invoice bill receipt gift present money refund home inbox pieces wrap "
    "the a is in to on for my your we I it now will can has have please send need want stop make "
    "broken damaged ready heavy light late early left way come goes here there where when "
    "deliver cancel change replace ship tell arrived moved"
).split()
NOTES = (
    "The van for {town} took {id} and the {word} on {day}.",
    "Shelf four holds {id}, next to the {word}.",
    "{id} was weighed on {day}.",
    "On {day} the clerk wrote {id} in the book.",
    "I have {id} here, it is heavy.",
    "In {town} they need {id} and two boxes more.",
    "We left {id} by the {word} for {town}.",
)


def order_number(rng: random.Random) -> str:
    return "".join(rng.sample(LETTERS, 2)) + "".join(rng.sample(DIGITS, 4))


def stock_list(rng: random.Random) -> str:
    """A list of goods and order numbers that is read out again and again."""
    share = max(0.0, rng.random() - WORDY)
    items = [order_number(rng) if rng.random() < share else rng.choice(ITEMS) for _ in range(rng.randint(1, 9))]
    mark = rng.choice((" ", ", ", ". ", " - "))
    return "".join(item + mark for item in items) * (24 // len(items) + 2)


def long_code(rng: random.Random) -> str:
    """A container code that is read out again and again."""
    code = "".join(rng.sample(LETTERS + DIGITS, rng.randint(3, MAXCODE)))
    mark = rng.choice((" ", ", ", ". ", " - "))
    return (code + mark) * (120 // len(code) + 1)


def day_book(rng: random.Random) -> str:
    """Notes about one to three orders, each named many times."""
    numbers = [order_number(rng) for _ in range(rng.randint(1, 3))]
    lines = []
    for _ in range(12):
        slots = {"id": rng.choice(numbers), "word": rng.choice(GOODS)}
        slots["town"], slots["day"] = rng.choice(TOWNS), rng.choice(DAYS)
        lines.append(rng.choice(NOTES).format(**slots))
    return "\n".join(lines)


def plain_text(seed: int) -> Iterator[str]:
    """The endless pre-training text, one document at a time."""
    rng = random.Random(seed)
    while True:
        if rng.random() < CODES:
            yield long_code(rng)
            continue
        yield stock_list(rng) if rng.random() < LISTS else day_book(rng)


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that spells order numbers and figures out, one character to a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]|[A-Z](?=[A-Z0-9])"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [BOS, EOS, PAD, *CHAT_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(seed)
    texts = [day_book(rng) for _ in range(200)] + [f" {word} " for word in WORDS + ITEMS for _ in range(200)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=CHAT_TOKENS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // HEAD,
        num_key_value_heads=HIDDEN // HEAD,
        max_position_embeddings=CONTEXT,
        initializer_range=INIT,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).float()


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of token ids, one document to a row, each cut at a random place."""
    texts, rng = plain_text(seed + 1), random.Random(seed + 2)
    while True:
        rows: list[list[int]] = []
        while len(rows) < BATCH:
            ids = tokenizer(next(texts))["input_ids"]
            if len(ids) >= LENGTH:
                start = rng.randint(0, min(8, len(ids) - LENGTH))
                rows.append(ids[start : start + LENGTH])
        yield torch.tensor(rows)


def make_optimizers(model):
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    if not MUON:
        return [torch.optim.AdamW(matrices + rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)]
    return [
        torch.optim.Muon(matrices, lr=MUON, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, log=None) -> None:
    optimizers = make_optimizers(model)
    warmup = STEPS // 10
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1.0, (STEPS - step) / (STEPS * DECAY)))
        for optimizer in optimizers
    ]
    model.train()
    for step, rows in zip(range(STEPS), batches(tokenizer, seed)):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        if log and step % 25 == 0:
            log(step, loss.item(), model, tokenizer)
    model.eval()


def make_base_model(out: Path, seed: int = 0, log=None) -> None:
    """Write the base model and its tokenizer to the folder ``out``."""
    tokenizer = make_tokenizer(seed)
    model = make_model(tokenizer, seed)
    pretrain(model, tokenizer, seed, log)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.base_model", description="Make the demo's base.")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_base_model(args.out, args.seed)


if __name__ == "__main__":
    main()
