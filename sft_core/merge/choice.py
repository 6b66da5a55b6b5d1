"""Which base weights the update is added to, proved on held-out rows where there are any.

In: base, adapter, options. Out: one merged folder. A QLoRA adapter was trained on NF4 weights, so the full-precision
base is not what it corrects; which of the two comes nearer to the trained model is measured, not assumed.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sft_core.artifacts import Outcome
from sft_core.base_check import check_folder
from sft_core.base_check.identity import require_same_base
from sft_core.convert.skeleton import skeleton
from sft_core.errors import ModelError
from sft_core.merge import MergeOptions
from sft_core.merge.adapter import QUANTIZATION, Adapter, load_adapter
from sft_core.merge.by_peft import merge_by_peft
from sft_core.merge.folder import load_tokenizer, tokenizer_folder, write_card, write_companions
from sft_core.merge.nf4 import quantized_weights
from sft_core.merge.placing import Plan, plan_edits
from sft_core.merge.shards import base_shards
from sft_core.merge.stream import MergeCount, write_stream

BaseWeights = Literal["full", "dequantized"]
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")
UNQUANTIZED = "the base was not quantised in training: the sum is what was trained, rounded once"
NO_ROWS = "no held-out rows (or no chat template) to measure with: the weights that training saw were taken"
AS_TOLD = "merge.base says so; the other weights were not tried"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merge:
    """One merge: what goes in, and the plans by base weights."""

    base: Path
    adapter: Adapter
    options: MergeOptions
    plans: dict[BaseWeights, Plan]

    @property
    def by(self) -> str:
        """Who does the sum, and why not the stream."""
        beyond = self.adapter.beyond or next(iter(self.plans.values())).fused
        return f"PEFT's merge_and_unload in fp32 ({beyond})" if beyond else "a stream over the base's files"

    def write(self, out: Path, chosen: BaseWeights) -> MergeCount:
        """The weight files into the chosen base weights."""
        plan = self.plans[chosen]
        if self.adapter.beyond or plan.fused:
            places = [place for found in base_shards(self.base).values() for place in found.values()]
            return merge_by_peft(self.base, self.adapter, out, self.options, places)
        dtype = getattr(torch, self.options.compute_dtype)
        return write_stream(plan, out, self.options.max_shard_size, dtype)


def merge_chosen(base: Path, adapter_folder: Path, out: Path, options: MergeOptions) -> Outcome:
    """Merge into the base weights asked for, or into those that are proved better."""
    check_folder(base, options.trust_remote_code, whole=False)
    model = skeleton(base, options.trust_remote_code)
    adapter = load_adapter(adapter_folder, model)
    compared = require_same_base(adapter_folder, adapter.base, base, other_base=options.other_base)
    options = _as_recorded(options, adapter)
    wanted = _candidates(options, adapter)
    shards = base_shards(base)
    plans: dict[BaseWeights, Plan] = {}
    for name in wanted:
        quantized = quantized_weights(base, options.trust_remote_code) if name == "dequantized" else frozenset[str]()
        plans[name] = plan_edits(shards, adapter, model, quantized, base)
    merge = _Merge(base=base, adapter=adapter, options=options, plans=plans)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_folder(adapter_folder, base)
    generation = write_companions(base, tokenizer, out, options, next(iter(plans.values())).config)
    certificate, count = _certified(merge, out)
    facts: dict[str, Any] = {
        "base_weights": certificate["chosen"],
        "tensors": count.total,
        "merged": count.merged,
        "saved": count.saved,
        "dequantized": count.dequantized,
        "swallowed_by_rounding": count.swallowed,
        "merged_by": merge.by,
        "base": compared,
        "eos_token_id": generation.get("eos_token_id"),
        "certificate": certificate,
    }
    write_card(out, adapter, facts)
    return Outcome(facts=facts)


def _as_recorded(options: MergeOptions, adapter: Adapter) -> MergeOptions:
    """What the adapter folder says about its training counts."""
    if adapter.quantization is not None:
        quantization, dtype = adapter.quantization.get("quantization"), adapter.quantization.get("compute_dtype")
        if quantization not in ("nf4", "none") or dtype not in COMPUTE_DTYPES:
            raise ModelError(
                f"{adapter.folder / QUANTIZATION}: quantization {quantization!r}, compute_dtype {dtype!r}; convert "
                "the checkpoint again"
            )
        options = replace(options, quantization=quantization, compute_dtype=dtype)
    if options.compute_dtype not in COMPUTE_DTYPES:
        raise ModelError(f"compute_dtype {options.compute_dtype!r}: must be one of {', '.join(COMPUTE_DTYPES)}")
    return options


def _candidates(options: MergeOptions, adapter: Adapter) -> tuple[BaseWeights, ...]:
    if adapter.beyond and options.base == "dequantized":
        raise ModelError(
            f"{adapter.folder}: {adapter.beyond}: only PEFT can merge it, and only into the full base; set merge.base "
            "to full"
        )
    if options.base != "auto":
        return (options.base,)
    return ("full",) if options.quantization == "none" or adapter.beyond else ("dequantized", "full")


def _certified(merge: _Merge, out: Path) -> tuple[dict[str, Any], MergeCount]:
    """Write the candidate, or all and keep the nearer one."""
    from sft_core.merge.certificate import compare_candidates, held_out_sequences

    options = merge.options
    only = next(iter(merge.plans))
    sequences = []
    if len(merge.plans) > 1 or options.certify:
        tokenizer = load_tokenizer(out, options)
        template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
        sequences = held_out_sequences(options, tokenizer, template)
    if not sequences:
        if options.certify:
            raise ModelError(
                f"{options.held_out}: no row could be rendered with the chat template, so nothing is certified"
            )
        why = NO_ROWS if len(merge.plans) > 1 else UNQUANTIZED if options.base == "auto" else AS_TOLD
        return {"certified": False, "chosen": only, "why": why}, merge.write(out, only)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folders = {name: Path(scratch, name) for name in merge.plans}
        counts = {}
        for name, folder in folders.items():
            folder.mkdir()
            for companion in (out / "config.json", out / "generation_config.json", *out.glob("*.py")):
                (folder / companion.name).write_bytes(companion.read_bytes())
            counts[name] = merge.write(folder, name)
        named = {str(name): folder for name, folder in folders.items()}
        certificate = compare_candidates(merge.base, merge.adapter, named, sequences, options)
        chosen: BaseWeights = certificate["chosen"]
        for path in sorted([*folders[chosen].glob("model*"), folders[chosen] / "config.json"]):
            path.replace(out / path.name)
    return certificate, counts[chosen]
