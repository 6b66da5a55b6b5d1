"""How far a merged model is from the model that was trained: the adapter on its 4-bit base.

In: held-out conversations, the base, the adapter, candidate folders. Out: for each candidate, on supervised tokens,
KL(trained || candidate) and the difference of the losses in nats a token, and how often both would choose the same
token. Small: 64 conversations at most, chosen by the seed.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import log_softmax

from sft_core.devices import placement
from sft_core.errors import ModelError, RowError, SourceError
from sft_core.memory_faults import release_memory
from sft_core.merge import MergeOptions
from sft_core.merge.adapter import Adapter
from sft_core.pack import IGNORE_INDEX, Sequence, encode_conversation, tools_of

MAX_CONVERSATIONS = 64
MAX_LENGTH = 2048
"""Tokens of a sequence that are read; the rest is cut."""
MAX_SUPERVISED = 4096
"""Supervised tokens measured: their logits are held in memory, one vocabulary each."""
BATCH_TOKENS = 4096
"""Tokens, padding included, that go through a model at a time."""


def held_out_sequences(options: MergeOptions, tokenizer: Any, template: str | None) -> list[Sequence]:
    """Encoded held-out conversations, in a drawn order; empty if there are none or no way to render them."""
    if options.held_out is None or not template:
        return []
    conversations = _conversations(options.held_out)
    drawn = random.Random(options.seed).sample(conversations, min(MAX_CONVERSATIONS, len(conversations)))
    sequences: list[Sequence] = []
    supervised = 0
    for row in drawn:
        try:
            encoded = encode_conversation(row["messages"], tokenizer, template, tools_of(row))
        except RowError:  # set aside and counted by pack and evaluate; here any 64 that can be read will do
            continue
        for sequence in encoded:
            cut = Sequence(sequence.input_ids[:MAX_LENGTH], sequence.labels[:MAX_LENGTH])
            count = sum(label != IGNORE_INDEX for label in cut.labels[1:])
            if count and supervised + count <= MAX_SUPERVISED:
                sequences.append(cut)
                supervised += count
    return sequences


def _conversations(held_out: Path) -> list[dict[str, Any]]:
    """Rows with `messages`: of a Conversations folder's held-out side, or of one file."""
    import pyarrow.parquet as pq

    if held_out.is_dir():
        files = sorted((held_out / "heldout").glob("part-*.parquet"))
        return [row for path in files for row in pq.read_table(path).to_pylist()]
    try:
        if held_out.suffix == ".parquet":
            rows = pq.read_table(held_out).to_pylist()
        else:
            lines = held_out.read_text("utf-8").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise SourceError(f"{held_out}: no rows to certify with ({error}); JSON Lines or Parquet is read") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
            raise SourceError(f"{held_out}: row {number} has no list `messages`; normalize the rows first")
        for message in row["messages"]:
            message.setdefault("weight", 1 if message.get("role") == "assistant" else None)
    return rows


def compare_candidates(
    base: Path, adapter: Adapter, candidates: Mapping[str, Path], sequences: list[Sequence], options: MergeOptions
) -> dict[str, Any]:
    """The certificate, with `chosen`: the candidate of the smallest divergence (the first, if they tie)."""
    trained = _logits(lambda: _load_trained(base, adapter, options), sequences)
    figures = {}
    for name, folder in candidates.items():
        logits = _logits(partial(_load, folder, options), sequences)
        figures[name] = _distance(trained, logits, sequences)
        del logits
    chosen = min(figures, key=lambda name: figures[name]["kl"])
    if not figures[chosen]["kl"] <= options.max_divergence:  # NaN too
        raise ModelError(
            f"the merged model is {figures[chosen]['kl']:.3g} nats a token from the model that was trained, over "
            f"{options.max_divergence} ({figures}); the base or the adapter is another one than in training"
        )
    return {
        "certified": True,
        "chosen": chosen,
        "unit": "nats a supervised token, against the adapter on the base it was trained on",
        "max_divergence": options.max_divergence,
        "sequences": len(sequences),
        "tokens": sum(len(_targets(sequence)) for sequence in sequences),
        "candidates": figures,
    }


def _load(folder: Path, options: MergeOptions, **extra: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, options.compute_dtype),
        trust_remote_code=options.trust_remote_code,
        **{"device_map": {"": "cpu"}} | placement(),
        **extra,
    )
    return model.eval()


def _load_trained(base: Path, adapter: Adapter, options: MergeOptions) -> Any:
    """The model as training computed it: with its 4-bit layers in training mode.

    In evaluation mode on CPU bitsandbytes repacks them, with scales rounded to bfloat16, and fails on rows that are no
    multiple of 64. These layers have no dropout, so the mode changes nothing else.
    """
    from peft import PeftModel

    if options.quantization == "none":
        return PeftModel.from_pretrained(_resized(_load(base, options), adapter), adapter.folder).eval()
    import bitsandbytes as bnb
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, options.compute_dtype),
    )
    loaded = _resized(_load(base, options, quantization_config=quantization), adapter)
    model = PeftModel.from_pretrained(loaded, adapter.folder).eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.train()
    return model


def _resized(model: Any, adapter: Adapter) -> Any:
    if adapter.vocabulary:
        model.resize_token_embeddings(adapter.vocabulary, mean_resizing=False)  # the adapter holds all rows
    return model


def _logits(load: Callable[[], Any], sequences: list[Sequence]) -> list[torch.Tensor]:
    """For each sequence the logits that predict its supervised tokens, on CPU: (supervised, vocabulary). The model is
    loaded here and gone afterwards: two of them may not fit a GPU."""
    try:
        return _logits_of(load(), sequences)
    finally:
        release_memory()


def _logits_of(model: Any, sequences: list[Sequence]) -> list[torch.Tensor]:
    with torch.inference_mode():  # as a decorator it would hold on to the model
        return [logits for batch in _batches(sequences) for logits in _logits_of_batch(model, batch)]


def _logits_of_batch(model: Any, batch: list[Sequence]) -> list[torch.Tensor]:
    length = max(len(sequence.input_ids) for sequence in batch)
    ids = torch.zeros((len(batch), length), dtype=torch.long)  # (batch, length), padded on the right
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence.input_ids)] = torch.tensor(sequence.input_ids)
        mask[row, : len(sequence.input_ids)] = 1
    device = model.device
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    collected = []
    for row, sequence in enumerate(batch):
        predicts = torch.tensor(sequence.labels[1:]) != IGNORE_INDEX
        collected.append(logits[row, : len(predicts)][predicts.to(device)].cpu())
    return collected


def _batches(sequences: list[Sequence]) -> Iterator[list[Sequence]]:
    """Neighbours together, as long as a padded batch stays within BATCH_TOKENS."""
    batch: list[Sequence] = []
    for sequence in sequences:
        length = max(len(member.input_ids) for member in [*batch, sequence])
        if batch and length * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def _distance(trained: list[torch.Tensor], other: list[torch.Tensor], sequences: list[Sequence]) -> dict[str, float]:
    divergence = loss = 0.0
    agreed = tokens = 0
    for p, q, sequence in zip(trained, other, sequences, strict=True):
        log_p, log_q = log_softmax(p.float(), -1), log_softmax(q.float(), -1)  # (supervised, vocabulary)
        targets = torch.tensor(_targets(sequence))[:, None]
        divergence += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
        loss += float((log_p.gather(1, targets) - log_q.gather(1, targets)).sum(dtype=torch.float64))
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(targets)
    figures = {"kl": divergence / tokens, "loss_difference": loss / tokens, "top1_agreement": agreed / tokens}
    return {name: float(f"{value:.6g}") for name, value in figures.items()}


def _targets(sequence: Sequence) -> list[int]:
    return [label for label in sequence.labels[1:] if label != IGNORE_INDEX]
