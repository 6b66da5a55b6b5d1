"""The demo's base model: a tiny Llama with its tokenizer, made from a seed in well under a minute.

In: a folder to write and a seed. Out: an ordinary Hugging Face model folder (config.json,
generation_config.json, model.safetensors, tokenizer files).

"Base" means what it means for the large ones: the model was trained to continue plain text, here the
papers of a made-up warehouse in which codes, goods and order numbers keep coming back. From that it
learns to look up and repeat what stood earlier in its context. It has seen no chat, no request and no
answer, and the chat tokens never occur in its text.

    python -m demo.base_model /tmp/base
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sft_core.quiet import quiet_libraries

BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VOCABULARY_LIMIT = 640
CONTEXT = 1024
HIDDEN, MLP, LAYERS, HEADS = 128, 256, 2, 2
INIT_STD = 0.06
# LoRA leaves the output layer alone, and its rows for tokens that the text lacks (<|im_end|>) stay about
# as they began; begun too small they could never win clearly.
OUTPUT_SCALE = 2.0

STEPS, BATCH, LENGTH = 240, 24, 64
MATRIX_RATE, OTHER_RATE = 0.02, 3e-3

LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
DIGITS = "0123456789"
GOODS = """
    kettle lamp rope chair mirror spoon basket clock carpet ladder pillow bucket candle drawer
""".split()
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
TOWNS = ["Leeds", "Bristol", "Dover", "Oxford", "York", "Derby", "Exeter", "Ripon"]
ITEMS = GOODS + DAYS + TOWNS
OTHER_WORDS = """
    order parcel box boxes goods invoice bill receipt gift present money refund home inbox pieces
    wrap the a is in to on for my your we I it now will can has have please send need want stop make
    broken damaged ready heavy light late early left way come goes here there where when deliver
    cancel change replace ship tell arrived moved
""".split()
NOTES = (
    "The van for {town} took {id} and the {item} on {day}.",
    "Shelf four holds {id}, next to the {item}.",
    "{id} was weighed on {day}.",
    "On {day} the clerk wrote {id} in the book.",
    "I have {id} here, it is heavy.",
    "In {town} they need {id} and two boxes more.",
    "We left {id} by the {item} for {town}.",
)
MARKS = (" ", ", ", ". ", " - ")


def order_number(rng: random.Random) -> str:
    return "".join(rng.sample(LETTERS, 2)) + "".join(rng.sample(DIGITS, 4))


def code_sheet(rng: random.Random) -> str:
    """One container code, printed again and again."""
    code = "".join(rng.sample(LETTERS + DIGITS, rng.randint(3, 16)))
    return (code + rng.choice(MARKS)) * (120 // len(code) + 1)


def stock_list(rng: random.Random) -> str:
    """A list of goods, days, towns or plain words, and order numbers, that is read out again and again."""
    numbers = max(0.0, rng.random() - 0.5)
    words = rng.choice((ITEMS, ITEMS, OTHER_WORDS))
    items = [order_number(rng) if rng.random() < numbers else rng.choice(words) for _ in range(rng.randint(1, 9))]
    mark = rng.choice(MARKS)
    return "".join(item + mark for item in items) * (24 // len(items) + 2)


def day_book(rng: random.Random) -> str:
    """Notes about one to three orders, each named many times."""
    numbers = [order_number(rng) for _ in range(rng.randint(1, 3))]
    notes = []
    for _ in range(12):
        note, number, item = rng.choice(NOTES), rng.choice(numbers), rng.choice(GOODS)
        notes.append(note.format(id=number, item=item, town=rng.choice(TOWNS), day=rng.choice(DAYS)))
    return "\n".join(notes)


def plain_text(seed: int) -> Iterator[str]:
    """The endless pre-training text, one document at a time."""
    rng = random.Random(seed)
    while True:
        yield rng.choices((code_sheet, stock_list, day_book), weights=(40, 36, 24))[0](rng)


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that spells order numbers and figures out, one character to a token."""
    tokenizer = Tokenizer(models.BPE())
    spell_out = pre_tokenizers.Split(Regex(r"[0-9]|[A-Z](?=[A-Z0-9])"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([spell_out, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_LIMIT,
        special_tokens=[BOS, EOS, PAD, IM_START, IM_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(seed)
    words = [f" {word} " for word in OTHER_WORDS + ITEMS for _ in range(200)]
    tokenizer.train_from_iterator([day_book(rng) for _ in range(200)] + words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IM_START, IM_END],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained model; every linear layer splits into whole 4-bit blocks of 64 weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        initializer_range=INIT_STD,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        model.lm_head.weight.mul_(OUTPUT_SCALE)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IM_END)],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of token ids, one document to a row, each begun at a random place."""
    texts, rng = plain_text(seed + 1), random.Random(seed + 2)
    while True:
        rows: list[list[int]] = []
        while len(rows) < BATCH:
            ids = tokenizer(next(texts))["input_ids"]
            if len(ids) >= LENGTH:
                start = rng.randint(0, min(8, len(ids) - LENGTH))
                rows.append(ids[start : start + LENGTH])
        yield torch.tensor(rows)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (copying appears several times sooner than with AdamW), AdamW else."""
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if ".layers." in name and weight.ndim == 2]
    others = [weight for name, weight in named if ".layers." not in name or weight.ndim != 2]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(step: int) -> float:
    """A tenth of warm-up, then level, then the last two fifths straight down."""
    return min((step + 1) / (0.1 * STEPS), 1.0, (STEPS - step) / (0.4 * STEPS))


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Train the model in place to continue the plain text."""
    optimizers = make_optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor) for optimizer in optimizers]
    model.train()
    for _, rows in zip(range(STEPS), batches(tokenizer, seed), strict=False):
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad(set_to_none=True)
    model.eval()


def make_base_model(out: Path, seed: int = 0) -> None:
    """Write the base model and its tokenizer to the folder ``out``."""
    tokenizer = make_tokenizer(seed)
    model = make_model(tokenizer, seed)
    pretrain(model, tokenizer, seed)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.base_model", description="Make the demo's base.")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet_libraries()
    unfinished = args.out.with_name(f"{args.out.name}.unfinished")
    make_base_model(unfinished, args.seed)
    unfinished.rename(args.out)  # what is there is whole


if __name__ == "__main__":
    main()
