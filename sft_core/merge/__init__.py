"""Merge: Adapter + base model (+ held-out rows) -> MergedModel, as a stream over the base's weight files.

In: a base model folder, a PEFT folder, and which base weights the update is added to. Out: a complete Hugging Face
folder with tokenizer, chat template and a certificate that says, in nats a token, how far it is from what was trained.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sft_core.artifacts import Outcome

STEP_VERSION = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """`base` and what decides it: how the adapter was trained, and the held-out rows to measure on.

    The adapter folder's `quantization.json`, where it is there, goes before `quantization` and `compute_dtype`.
    """

    base: Literal["auto", "full", "dequantized"] = "auto"
    quantization: Literal["nf4", "none"] = "nf4"
    compute_dtype: str = "bfloat16"
    held_out: Path | None = None
    """Conversations folder with `heldout/part-*.parquet`, or a JSON Lines or Parquet file of rows with `messages`."""
    certify: bool = False
    """Measure even where there is no choice of base weights to make."""
    max_divergence: float = 0.1
    """Nats a supervised token: a merged model farther than this from the trained one is refused."""
    chat_template: str | None = None
    """Jinja text of the template used in training; None for the one of the adapter's (else the base's) tokenizer."""
    max_shard_size: int | None = None
    """Bytes a weight file; None for files cut as the base's are."""
    other_base: bool = False
    """Merge into a base that is not the one the adapter was trained on."""
    seed: int = 42
    trust_remote_code: bool = False


def merge_adapter(base: Path, adapter: Path, out: Path, options: MergeOptions) -> Outcome:
    """Write the merged model to `out`. ModelError unless every adapter tensor is used and something changes."""
    from sft_core.merge.choice import merge_chosen

    return merge_chosen(base, adapter, out, options)


def push_folder(folder: Path, repository: str) -> str:
    """Upload a model folder to the hub; the commit's address. ModelError if the hub refuses or is not reachable."""
    from sft_core.merge.hub import push

    return push(folder, repository)
