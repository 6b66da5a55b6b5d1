"""TRL's SFTTrainer on sequences that are tokenised already, in TRL's own Python: `train_cpu.py` calls it.

In: one JSON object (model and sequences folders, packing, lengths, steps). Out: its last line, JSON: seconds, CPU
seconds, steps, tokens and supervised tokens between the end of the warm-up and the end.
"""

import json
import sys
import time
from typing import Any


def main(settings: dict[str, Any]) -> None:
    """Train `steps` optimizer steps; the first `warm_up` of them are not timed."""
    import torch
    import trl
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    torch.set_num_threads(1)
    rows = load_dataset("parquet", data_files=f"{settings['sequences']}/*.parquet", split="train")
    rows = rows.select_columns(["input_ids", "labels"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    arguments = trl.SFTConfig(
        output_dir=settings["out"],
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=1,
        packing=settings["packing"],
        packing_strategy="bfd",
        max_length=settings["max_length"],
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    marks: list[tuple[float, float, int]] = []  # wall, CPU, batches collated, at the end of each step
    fed: list[tuple[int, int]] = []  # tokens without padding, supervised tokens of each batch

    class Clock(TrainerCallback):
        """Marks the end of every step."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append((time.perf_counter(), time.process_time(), len(fed)))

    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    collate = trainer.data_collator

    def count(examples: list[dict[str, Any]]) -> Any:
        fed.append((sum(len(e["input_ids"]) for e in examples), sum(x != -100 for e in examples for x in e["labels"])))
        return collate(examples)

    trainer.data_collator = count
    trainer.train()
    first, last = marks[settings["warm_up"] - 1], marks[-1]
    tokens, supervised = (sum(column) for column in zip(*fed[first[2] : last[2]], strict=True))
    result = {"seconds": last[0] - first[0], "cpu_seconds": last[1] - first[1], "steps": len(marks)}
    result |= {"steps": len(marks) - settings["warm_up"], "tokens": tokens, "supervised": supervised}
    result |= {"loss": trainer.state.log_history[0]["loss"], "version": trl.__version__}
    print(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
