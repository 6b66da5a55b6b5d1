"""Merge against `cp` of the same files and against PEFT's merge_and_unload + save_pretrained, turn by turn in one run.

Every turn begins alike: disk idle, base in the page cache, memory in use before.

In: `--gigabytes` of a synthetic bf16 Llama-shaped base, `--r`, `--rounds`. Out: seconds, GB/s and ratios (medians of
the rounds), CPU seconds, the load, and the peak memory of the process that merged, also for a base of twice the size.
Everything written is deleted.

    python -m benchmarks.merge --gigabytes 1
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HIDDEN, INNER, VOCABULARY = 2048, 8192, 32_000
LAYER = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)  # bytes in bf16
PARTS = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN, HIDDEN), "v_proj": (HIDDEN, HIDDEN), "o_proj": (HIDDEN, HIDDEN)}
MLP = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--child", nargs=4, default=None)
    arguments = parser.parse_args()
    if arguments.child:
        _child(*arguments.child)
        return
    for factor in (1, 2):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            rivals = ("cp", "merge") if factor == 2 or arguments.no_peft else ("cp", "merge", "peft")
            _measure(Path(scratch), arguments.gigabytes * factor, arguments.r, arguments.rounds, rivals)


def _measure(scratch: Path, gigabytes: float, r: int, rounds: int, rivals: tuple[str, ...]) -> None:
    base, adapter = scratch / "base", scratch / "adapter"
    nbytes = _write(base, adapter, gigabytes, r)
    print(f"base {nbytes / 1e9:.2f} GB in bf16, r = {r} on all linear layers; load {os.getloadavg()[0]:.1f}")
    largest = max(VOCABULARY * HIDDEN, INNER * HIDDEN) * 4e-6
    print(f"  largest tensor in fp32 {largest:,.0f} MB; of the merged ones {INNER * HIDDEN * 4e-6:,.0f} MB")
    found: dict[str, list[dict[str, float]]] = {rival: [] for rival in rivals}
    for turn in range(rounds):
        for rival in rivals if turn == 0 else rivals[:2]:  # PEFT once: it takes longest
            if rival == "cp":
                _settle(base, scratch)
                found[rival].append(_copy(base, scratch / rival))
            else:
                found[rival].append(_run(rival, base, adapter, scratch))
            shutil.rmtree(scratch / rival)
    for rival, results in found.items():
        seconds, cpu = (statistics.median(result[key] for result in results) for key in ("seconds", "cpu"))
        peak = max(result.get("peak_mb", 0) for result in results)
        memory = f"  peak RSS {peak:,.0f} MB ({results[0]['before_mb']:,.0f} before)" if peak else ""
        print(f"  {rival:6} {seconds:6.2f} s, {cpu:6.2f} s of CPU  {nbytes / seconds / 1e9:5.2f} GB/s{memory}")
    for rival in rivals[::2]:
        ratios = [other["seconds"] / ours["seconds"] for other, ours in zip(found[rival], found["merge"], strict=False)]
        turns = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"  merge is {statistics.median(ratios):.2f} times as fast as {rival} (turns: {turns})")


def _settle(base: Path, scratch: Path) -> None:
    """The same start for every turn: nothing left to write to the disk, the base in the page cache, and as much memory
    again that a copy has just used and let go. (A virtual machine gets memory that was idle for two seconds anew from
    its host, page by page, which takes five times as long as the copy.)
    """
    os.sync()
    _copy(base, scratch / "settle")
    shutil.rmtree(scratch / "settle")


def _copy(base: Path, out: Path) -> dict[str, float]:
    out.mkdir()
    clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", *map(str, sorted(base.glob("*.safetensors"))), str(out)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - clock, "cpu": cpu}


def _run(what: str, base: Path, adapter: Path, scratch: Path) -> dict[str, float]:
    child = ["-m", "benchmarks.merge", "--child", what, str(base), str(adapter), str(scratch / what)]
    answer = subprocess.run([sys.executable, *child], check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(answer.splitlines()[-1])
    return result


def _peak_mb() -> float:
    """Of this program alone: getrusage counts what the parent held when it forked."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1e3


def _child(what: str, base: str, adapter: str, out: str) -> None:
    """One merge in a process of its own, imports outside the clock."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    from sft_core.merge import MergeOptions, merge_adapter
    from sft_core.merge.choice import merge_chosen

    assert all((merge_chosen, LlamaForCausalLM, AutoTokenizer)), "imported before the clock starts"
    _settle(Path(base), Path(out).parent)
    before = _peak_mb()
    clock, cpu = time.perf_counter(), time.process_time()
    if what == "merge":
        merge_adapter(Path(base), Path(adapter), Path(out), MergeOptions(base="full", quantization="none"))
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    times = {"seconds": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
    print(json.dumps({**times, "peak_mb": _peak_mb(), "before_mb": before}))


def _write(base: Path, adapter: Path, gigabytes: float, r: int) -> int:
    """Random weights, one layer a shard; the same numbers in every layer, for speed of writing only."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    base.mkdir()
    adapter.mkdir()
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / LAYER))
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
    ).save_pretrained(base)
    words = {"<s>": 0, "</s>": 1}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<s>")), bos_token="<s>", eos_token="</s>"
    ).save_pretrained(base)
    modules = {f"self_attn.{name}": shape for name, shape in PARTS.items()} | {
        f"mlp.{name}": s for name, s in MLP.items()
    }
    draw = torch.Generator().manual_seed(0)
    weights = {name: (torch.randn(shape, generator=draw) * 0.02).bfloat16() for name, shape in modules.items()}
    norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
    table = (torch.randn(VOCABULARY, HIDDEN, generator=draw) * 0.02).bfloat16()
    shards: list[dict[str, Any]] = []
    updates = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shard = {f"{prefix}{name}.weight": tensor for name, tensor in weights.items()}
        shard[f"{prefix}input_layernorm.weight"] = shard[f"{prefix}post_attention_layernorm.weight"] = norm
        shards.append({name: tensor.clone() for name, tensor in shard.items()})
        for name, (rows, columns) in modules.items():
            updates[f"base_model.model.{prefix}{name}.lora_A.weight"] = torch.randn(r, columns, generator=draw) * 0.02
            updates[f"base_model.model.{prefix}{name}.lora_B.weight"] = torch.randn(rows, r, generator=draw) * 0.02
        save_file(shards[-1], base / _shard(layer, layers + 1), metadata={"format": "pt"})
        shards[-1] = dict.fromkeys(shards[-1])
    last = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone(), "model.norm.weight": norm}
    save_file(last, base / _shard(layers, layers + 1), metadata={"format": "pt"})
    shards.append(dict.fromkeys(last))
    weight_map = {name: _shard(i, layers + 1) for i, shard in enumerate(shards) for name in shard}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file(updates, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": [*PARTS, *MLP], "bias": "none"}
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": "synthetic"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    os.sync()
    return sum(path.stat().st_size for path in base.glob("*.safetensors"))


def _shard(number: int, total: int) -> str:
    return f"model-{number + 1:05d}-of-{total:05d}.safetensors"


if __name__ == "__main__":
    main()
