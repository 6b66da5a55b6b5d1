"""Which base weights the update is added to, proved on held-out rows where there are any.

In: base, adapter, options. Out: one merged folder. A QLoRA adapter was trained on NF4 weights, so the full-precision
base is not what it corrects; which of the two comes nearer to the trained model is measured, not assumed.
"""

import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

from sft_core.artifacts import Outcome
from sft_core.errors import ModelError
from sft_core.merge import MergeOptions
from sft_core.merge.adapter import Adapter, load_adapter
from sft_core.merge.folder import load_tokenizer, write_card, write_companions
from sft_core.merge.nf4 import quantized_weights
from sft_core.merge.weights import MergeCount, WeightMerger, merge_weights

BaseWeights = Literal["full", "dequantized"]
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")
UNQUANTIZED = "the base was not quantised in training: the sum is what was trained, rounded once"
NO_ROWS = "no held-out rows (or no chat template) to measure with: the weights that training saw were taken"
AS_TOLD = "merge.base says so; the other weights were not tried"


def merge_chosen(base: Path, adapter_folder: Path, out: Path, options: MergeOptions) -> Outcome:
    """Merge into the base weights asked for, or into those that are proved better."""
    if options.compute_dtype not in COMPUTE_DTYPES:
        raise ModelError(f"compute_dtype {options.compute_dtype!r}: must be one of {', '.join(COMPUTE_DTYPES)}")
    adapter = load_adapter(adapter_folder)
    out.mkdir(parents=True, exist_ok=True)
    generation = write_companions(base, adapter_folder, out, options)
    if options.base != "auto":
        certificate, count = _as_told(base, adapter, out, options, options.base, AS_TOLD)
    elif options.quantization == "none":
        certificate, count = _as_told(base, adapter, out, options, "full", UNQUANTIZED)
    else:
        certificate, count = _measured(base, adapter, adapter_folder, out, options)
    facts: dict[str, Any] = {
        "base_weights": certificate["chosen"],
        "tensors": count.total,
        "merged": count.merged,
        "dequantized": count.dequantized,
        "swallowed_by_rounding": count.swallowed,
        "eos_token_id": generation.get("eos_token_id"),
        "certificate": certificate,
    }
    write_card(out, adapter, facts)
    return Outcome(facts=facts)


def _as_told(
    base: Path, adapter: Adapter, out: Path, options: MergeOptions, chosen: BaseWeights, why: str
) -> tuple[dict[str, Any], MergeCount]:
    count = _write_weights(base, adapter, out, options, chosen)
    return {"certified": False, "chosen": chosen, "why": why}, count


def _measured(
    base: Path, adapter: Adapter, adapter_folder: Path, out: Path, options: MergeOptions
) -> tuple[dict[str, Any], MergeCount]:
    """Write both, compare both with the trained model, keep the nearer one."""
    from sft_core.merge.certificate import compare_candidates, held_out_sequences

    tokenizer = load_tokenizer(out, options)
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    sequences = held_out_sequences(options, tokenizer, template)
    if not sequences:
        return _as_told(base, adapter, out, options, "dequantized", NO_ROWS)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folders: dict[BaseWeights, Path] = {"dequantized": Path(scratch, "dequantized"), "full": Path(scratch, "full")}
        counts = {}
        for name, folder in folders.items():
            folder.mkdir()
            (folder / "config.json").write_bytes((out / "config.json").read_bytes())
            for code in out.glob("*.py"):
                (folder / code.name).write_bytes(code.read_bytes())
            counts[name] = _write_weights(base, adapter, folder, options, name)
        named = {str(name): folder for name, folder in folders.items()}
        certificate = compare_candidates(base, adapter_folder, named, sequences, options)
        chosen: BaseWeights = certificate["chosen"]
        for path in sorted(folders[chosen].glob("model*")):
            path.replace(out / path.name)
    return certificate, counts[chosen]


def _write_weights(base: Path, adapter: Adapter, out: Path, options: MergeOptions, chosen: BaseWeights) -> MergeCount:
    dequantize = quantized_weights(base, options.trust_remote_code) if chosen == "dequantized" else frozenset[str]()
    merger = WeightMerger(adapter=adapter, dequantize=dequantize, compute_dtype=getattr(torch, options.compute_dtype))
    merge_weights(base, out, merger)
    return merger.count
