"""XTuner's optimizer, schedule and hooks as the recipe's `train` and `seed`.

In: `train_dataloader`, `optim_wrapper`, `param_scheduler`, `train_cfg`, `default_hooks`, `randomness`. Out: lines.
XTuner counts micro-batches (`iter`), the recipe optimizer steps: intervals are divided by `accumulative_counts`.
"""

from sft_core.recipe.xtuner.config import Config, last_name

OPTIMIZER = "optim_wrapper.optimizer"
CHECKPOINT = "default_hooks.checkpoint"
PLAIN_OPTIMIZERS = ("AdamW", "")


def read_training(config: Config) -> None:
    """Set the keys of `train` that are not the model's, and `seed`."""
    config.copy("train.num_train_epochs", "train_cfg.max_epochs")
    config.copy("train.per_device_train_batch_size", "train_dataloader.batch_size")
    micro_batches = _read_accumulation(config)
    _read_optimizer(config)
    _read_schedule(config)
    steps = config.number("train_cfg.max_iters")
    if steps is not None:
        config.set("train.max_steps", _steps(steps, micro_batches), _converted("train_cfg.max_iters", steps))
    _read_intervals(config, micro_batches)
    deepspeed = "not in the config: XTuner takes it on its command line (--deepspeed deepspeed_zero2)"
    config.set("train.deepspeed", "zero2", deepspeed)
    config.copy("seed", "randomness.seed")


def _read_accumulation(config: Config) -> int:
    """Micro-batches an optimizer step. As here, XTuner's micro-batch is one of a group of ranks that share rows."""
    path = "optim_wrapper.accumulative_counts"
    counts = int(config.number(path) or 1)
    config.set("train.gradient_accumulation_steps", counts, path)
    parallel = int(config.number("sequence_parallel_size") or 1)
    if parallel > 1:
        config.set("train.sequence_parallel_size", parallel, "sequence_parallel_size")
    return counts


def _read_optimizer(config: Config) -> None:
    kind = config.get(f"{OPTIMIZER}.type")
    if last_name(kind) not in PLAIN_OPTIMIZERS:
        config.remark(f"{OPTIMIZER}.type", kind, "the optimizer is AdamW")
    config.copy("train.learning_rate", f"{OPTIMIZER}.lr")
    config.copy("train.weight_decay", f"{OPTIMIZER}.weight_decay")
    config.copy("train.max_grad_norm", "optim_wrapper.clip_grad.max_norm")
    betas = [] if config.literal(f"{OPTIMIZER}.betas") is None else config.items(f"{OPTIMIZER}.betas")
    for i, beta in enumerate(betas):
        config.set(f"train.adam_beta{i + 1}", beta, f"{OPTIMIZER}.betas")
    config.copy("train.adam_epsilon", f"{OPTIMIZER}.eps")


def _read_schedule(config: Config) -> None:
    """LinearLR up, then CosineAnnealingLR (or ConstantLR, or nothing): `lr_scheduler_type` and `warmup_ratio`."""
    schedulers = config.get("param_scheduler")
    parts = schedulers if isinstance(schedulers, list) else [schedulers] if isinstance(schedulers, dict) else []
    prefixes = [
        f"param_scheduler.{i}" if isinstance(schedulers, list) else "param_scheduler" for i in range(len(parts))
    ]
    names = [last_name(config.get(f"{prefix}.type")) for prefix in prefixes]
    warmup = 0.0
    for prefix, name in zip(prefixes, names, strict=True):
        if name == "LinearLR":
            warmup = _warmup(config, prefix)
        elif name not in ("CosineAnnealingLR", "ConstantLR"):
            config.remark(prefix, config.get(prefix), "no schedule of that kind; lr_scheduler_type is cosine")
        elif config.literal(f"{prefix}.eta_min"):
            config.remark(f"{prefix}.eta_min", config.get(f"{prefix}.eta_min"), "the cosine ends at 0")
        for key in ("begin", "end", "by_epoch", "convert_to_iter_based", "start_factor", "factor"):
            config.get(f"{prefix}.{key}")
    config.set("train.warmup_ratio", warmup, "param_scheduler: LinearLR's end over the epochs")
    kind = "cosine" if "CosineAnnealingLR" in names else "constant_with_warmup" if warmup else "constant"
    if set(names) <= {"LinearLR", "CosineAnnealingLR", "ConstantLR"}:
        config.set("train.lr_scheduler_type", kind, f"param_scheduler: {', '.join(names) or 'none'}")


def _warmup(config: Config, prefix: str) -> float:
    end, epochs = config.number(f"{prefix}.end"), config.number("train_cfg.max_epochs")
    if end is None or not epochs or config.literal(f"{prefix}.by_epoch") is False or end > epochs:
        config.remark(f"{prefix}.end", end, "the warm-up is a fraction of all steps: set train.warmup_ratio by hand")
        return 0.0
    return round(end / epochs, 6)


def _read_intervals(config: Config, micro_batches: int) -> None:
    every, by_epoch = config.number(f"{CHECKPOINT}.interval"), config.literal(f"{CHECKPOINT}.by_epoch")
    if every is not None and by_epoch is False and every > 0:
        config.set("train.save_steps", _steps(every, micro_batches), _converted(f"{CHECKPOINT}.interval", every))
    elif every is not None:
        config.remark(f"{CHECKPOINT}.interval", every, "never (-1), or in epochs; set train.save_steps")
    keep = config.number(f"{CHECKPOINT}.max_keep_ckpts")
    if keep is not None and keep > 0:
        config.set("train.save_total_limit", int(keep), f"{CHECKPOINT}.max_keep_ckpts")
    elif keep is not None:
        config.remark(f"{CHECKPOINT}.max_keep_ckpts", int(keep), "unlimited is not offered; set train.save_total_limit")
    interval = config.number("default_hooks.logger.interval")
    if interval:
        path = "default_hooks.logger.interval"
        config.set("train.logging_steps", _steps(interval, micro_batches), _converted(path, interval))


def _steps(micro_batch_count: float, micro_batches: int) -> int:
    return max(1, round(micro_batch_count / micro_batches))


def _converted(path: str, value: float) -> str:
    return f"{path}: {int(value)} micro-batches, in optimizer steps"
