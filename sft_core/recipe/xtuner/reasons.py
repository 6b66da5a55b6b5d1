"""Why a part of an XTuner config has no line in the recipe, and what to do instead.

In: what nobody read. Out: remarks. A pattern with the reason "" is the same here, so there is nothing to say of it.
"""

from fnmatch import fnmatchcase
from typing import Any

from sft_core.recipe.xtuner.config import Config, last_name, show

SECTIONS = (
    "model train_dataloader optim_wrapper param_scheduler train_cfg default_hooks custom_hooks env_cfg "
    "randomness visualizer log_level load_from resume log_processor"
).split()
"""What XTuner's runner takes; every other name of a config only feeds these."""
WHOLE = (
    "env_cfg",
    "visualizer",
    "train_dataloader.sampler",
    "train_dataloader.batch_sampler",
    "train_dataloader.collate_fn",
)
"""Named as a whole, whatever is in them."""
HOOKS = {
    "DatasetInfoHook": "`sft data preview RECIPE` shows rows with their trained tokens",
    "EvaluateChatHook": "no sample chats while training: held-out rows are scored at the end, then `sft chat`",
    "VarlenAttnArgsToMessageHubHook": "packed conversations never see one another here",
    "ThroughputHook": "tokens a second are in metrics.jsonl and MLflow",
    "HFCheckpointHook": "the convert and merge steps write HF folders",
}
REASONS = {
    "_base_": "other files are not followed; import the merged config of the work directory",
    "*.type": "",
    "*.tokenizer": "",
    "*.tokenizer.*": "",
    "model.llm.quantization_config.llm_int8_*": "of 8-bit loading; without effect in 4 bits",
    "model.llm.quantization_config.bnb_4bit_quant_storage": "the weights' container; without effect on their values",
    "model.use_varlen_attn": "packed conversations never see one another here",
    "*.use_varlen_attn": "",
    "model.llm.attn_implementation": "attention is chosen by the trainer",
    "model.max_position_embeddings": "rope is not stretched; use a base model with the context you need",
    "model.pretrained_pth": "no start from a .pth: convert and merge it, and make that the base model",
    "model.llm.moe_implementation": "of XTuner's own model code; transformers' is taken",
    "model.llm.expert_in_one_shard": "of XTuner's own model code; transformers' is taken",
    "*.remove_unused_columns": "",
    "*.datasets.[1-9]*.shuffle_before_pack": "",
    "*.shuffle_before_pack": "rows are shuffled by `seed` in each epoch",
    "*.max_dataset_length": "give the data set a `weight` below 1: a fraction of its rows, chosen by content",
    "*.do_dataset_tokenization": "rows are always tokenised here",
    "*.map_num_proc": "processes are `compute.num_proc`; they change no row",
    "train_dataset*": "",
    "train_dataloader.num_workers": "tokens are read from memory-mapped shards",
    "train_dataloader.sampler": "rows are shuffled by `seed` in each epoch",
    "train_dataloader.batch_sampler": "rows are shuffled by `seed` in each epoch",
    "train_dataloader.collate_fn": "",
    "optim_wrapper.clip_grad.error_if_nonfinite": "",
    "optim_wrapper.clip_grad.norm_type": "the norm is the 2-norm",
    "optim_wrapper.loss_scale": "of AmpOptimWrapper; dynamic too with train.dtype float16",
    "optim_wrapper.dtype": "of AmpOptimWrapper, dropped under --deepspeed; see train.dtype",
    "param_scheduler*.verbose": "",
    "default_hooks.logger.log_metric_by_epoch": "",
    "default_hooks.checkpoint.save_optimizer": "checkpoints always hold the optimizer: they are for resuming",
    "default_hooks.*": "",
    "env_cfg": "the launcher sets processes and communication",
    "randomness.seed": "XTuner drew one; `seed` is 42 unless set",
    "randomness.deterministic": "results are the same for the same seed, machine and number of ranks",
    "randomness*": "`seed` is the only one",
    "visualizer": "metrics go to metrics.jsonl and MLflow",
    "log_level": "",
    "log_processor*": "",
    "load_from": "no start from a checkpoint; a run that was stopped resumes by itself",
    "resume": "a run that was stopped resumes by itself",
    "model_resource": "set `source: openmind` at the data sets; the base model may be a local folder",
    "val_*": "held-out rows are `eval_fraction`, or `eval_datasets`",
    "test_*": "held-out rows are `eval_fraction`, or `eval_datasets`",
    "train_cfg.val_interval": "held-out rows are scored once, by the evaluate step",
    "SYSTEM": "of sample chats while training, which there are none of",
    "evaluation_*": "of sample chats while training, which there are none of",
    "warm*ratio": "",
    "sequence_parallel_size": "",
    "launcher": "the launcher is chosen by `compute`",
    "work_dir": "results lie in `store`",
    "*": "not known to the import; look whether it matters",
}
QUIET_IF: dict[str, Any] = {
    "model.max_position_embeddings": None,
    "model.pretrained_pth": None,
    "visualizer": None,
    "load_from": None,
    "resume": False,
    "randomness.deterministic": False,
    "*.max_dataset_length": None,
    "launcher": "none",
    "SYSTEM": "",
}
"""Values that are XTuner's way of saying nothing."""


def remark_on_the_rest(config: Config) -> None:
    """Name everything that was not read."""
    for i, hook in enumerate(config.items("custom_hooks")):
        name = last_name(hook.get("type")) if isinstance(hook, dict) else ""
        config.remark(f"custom_hooks.{i}", hook, HOOKS.get(name, "no hooks: see whether it matters"))
    if config.get("randomness.seed") is None and "randomness" in config.values:
        _remark(config, "randomness.seed", None)
    for path in WHOLE:
        if config.get(path) is not None:
            _remark(config, path, config.get(path))
    for path, value in config.unread(*SECTIONS):
        _remark(config, path, value)
    known = {show(value) for section in SECTIONS for value in _values(config.values.get(section))}
    for name, value in config.values.items():
        imported = not isinstance(value, str | int | float | list | dict | None)
        if name not in SECTIONS and not config.settled(name) and not imported and show(value) not in known:
            _remark(config, name, value)


def reason(path: str, value: Any) -> str:
    """Why `path` has no line; "" where there is nothing to say."""
    if any(fnmatchcase(path, pattern) and value == quiet for pattern, quiet in QUIET_IF.items()):
        return ""
    return next(why for pattern, why in REASONS.items() if fnmatchcase(path, pattern))


def _remark(config: Config, path: str, value: Any) -> None:
    why = reason(path, value)
    if why:
        config.remark(path, value, why)


def _values(value: Any) -> list[Any]:
    """A section's value and all values in it."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value, *(deep for each in inner for deep in _values(each))]
