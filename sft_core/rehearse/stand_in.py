"""What stands in for a base model that cannot be reached: a tiny model of the family its name tells, and a tokenizer
that was made of the rehearsal's own rows.

In: the base model's name, the recipe's chat template, texts. Out: a configuration and a tokenizer: byte-level BPE (so
that sequences have about the length they will have) with the special tokens of the family and of the template.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

VOCABULARY = 4096
PAD = "<pad>"
CONTROL_TOKEN = re.compile(r"<\|[^|<>\s]+\|>|</?(?:start|end)_of_turn>")
"""How chat templates spell their special tokens, beside bos and eos."""


@dataclass(frozen=True, slots=True)
class Family:
    """Models whose name has `pattern`: transformers' `model_type`, and the shipped chat template nearest to theirs."""

    pattern: str
    model_type: str
    bos: str | None
    eos: str
    chat_template: str


FAMILIES = (
    Family(r"llama-?3", "llama", "<|begin_of_text|>", "<|eot_id|>", "llama3_chat"),
    Family(r"mixtral", "mixtral", "<s>", "</s>", "mixtral"),
    Family(r"mistral|ministral", "mistral", "<s>", "</s>", "mistral"),
    Family(r"qwen3.*-a\d+b", "qwen3_moe", None, "<|im_end|>", "qwen_chat"),
    Family(r"qwen3", "qwen3", None, "<|im_end|>", "qwen_chat"),
    Family(r"qwen", "qwen2", None, "<|im_end|>", "qwen_chat"),
    Family(r"gemma-?3", "gemma3_text", "<bos>", "<eos>", "gemma"),
    Family(r"gemma-?2", "gemma2", "<bos>", "<eos>", "gemma"),
    Family(r"gemma", "gemma", "<bos>", "<eos>", "gemma"),
    Family(r"phi-?[34]", "phi3", "<s>", "<|endoftext|>", "phi3_chat"),
    Family(r"internlm", "llama", "<s>", "</s>", "internlm2_chat"),
    Family(r"llama", "llama", "<s>", "</s>", "llama2_chat"),
    Family(r"", "llama", "<s>", "</s>", "chatml"),
)
"""The first that fits; the last fits all."""


def family_of(name: str) -> Family:
    """The family that a hub id tells.

    >>> family_of("Qwen/Qwen3-8B").model_type
    'qwen3'
    """
    model = name.rpartition("/")[2].lower()
    return next(family for family in FAMILIES if re.search(family.pattern, model))


def stand_in_config(family: Family, tokenizer: Any) -> Any:
    """The family's configuration, not shrunk yet, for the stand-in's vocabulary."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        family.model_type,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def stand_in_tokenizer(family: Family, chat_template: str | None, texts: Iterable[str]) -> Any:
    """A fast tokenizer trained on `texts`. `chat_template` is Jinja text; None: the family's becomes its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from sft_core.pack import load_chat_template

    own = load_chat_template(family.chat_template)
    named = [family.bos, family.eos, PAD, *CONTROL_TOKEN.findall(f"{own} {chat_template or ''}")]
    special = list(dict.fromkeys(token for token in named if token))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=family.bos, eos_token=family.eos, pad_token=PAD
    )
    fast.chat_template = own
    return fast
