"""TRL's preparation of a JSON Lines file of messages, in TRL's own Python: `prepare.py` calls it.

In: rows, tokenizer, a folder for the result, a chat template with generation marks. Out: one line of JSON.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path


def main(rows: str, tokenizer: str, out: str, template: str) -> None:
    """Tokenise with assistant masks and pack, as SFTTrainer does before training; write the result to disk."""
    import trl
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = Path(template).read_text("utf-8")
    tiny = LlamaConfig(
        vocab_size=len(loaded), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    data = load_dataset("json", data_files=rows, split="train", cache_dir=f"{out}-cache")
    arguments = trl.SFTConfig(
        output_dir=out,
        assistant_only_loss=True,
        packing=True,
        packing_strategy="bfd",
        max_length=2048,
        dataset_num_proc=os.cpu_count(),
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    started, used = time.perf_counter(), cpu_seconds()
    trainer = trl.SFTTrainer(LlamaForCausalLM(tiny), args=arguments, train_dataset=data, processing_class=loaded)
    trainer.train_dataset.save_to_disk(f"{out}-packed")
    took, used = time.perf_counter() - started, cpu_seconds() - used
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    print(json.dumps({"seconds": took, "cpu_seconds": used, "tokens": tokens, "version": trl.__version__}))


def cpu_seconds() -> float:
    """Of this process and of its children that have ended, as the pool of `map` has."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


if __name__ == "__main__":
    main(*sys.argv[1:])
