"""The environment of `sft train`: XTuner's variables and srun's, read here and nowhere below.

In: the environment, `--launcher`, `--ddp-timeout`. Out: a `Launch`, and the training as
this process's part in it.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import typer

from sft_core.errors import RecipeError
from sft_core.terminal import say

XTUNER_SPELLING = {"pytorch": "torchrun"}


def read_launch(environment: Mapping[str, str], launcher: str | None, ddp_timeout: float) -> Any:
    """`Launch` of this process. RecipeError naming the variable that is wrong."""
    from sft_core.train.launchers import LAUNCHERS, Launch, slurm_launch

    launcher = XTUNER_SPELLING.get(launcher or "", launcher)
    if launcher is not None and launcher not in LAUNCHERS:
        raise RecipeError(f"--launcher {launcher!r}: it is one of {', '.join(LAUNCHERS)}")
    if ddp_timeout <= 0:
        raise RecipeError(f"--ddp-timeout {ddp_timeout}: seconds, more than 0")
    if launcher == "slurm":
        return slurm_launch(environment, ddp_timeout)
    nnodes, node_rank = _number(environment, "NNODES", 1), _number(environment, "NODE_RANK", 0)
    port, addr = _number(environment, "PORT", 0) or None, environment.get("ADDR")
    if not 0 <= node_rank < max(nnodes, 1) or nnodes < 1:
        raise RecipeError(f"NODE_RANK={node_rank}, NNODES={nnodes}: machines are numbered from 0 to NNODES - 1")
    if nnodes > 1 and (addr is None or port is None):
        raise RecipeError(
            f"NNODES={nnodes}: ADDR and PORT are needed too: the address of NODE_RANK=0, a free port there"
        )
    if nnodes > 1 and launcher == "none":
        raise RecipeError(f"NNODES={nnodes} with --launcher none, which starts one rank; take torchrun")
    return Launch(
        launcher="torchrun" if nnodes > 1 else launcher,
        nnodes=nnodes,
        node_rank=node_rank,
        **({"addr": addr} if addr else {}),
        port=port,
        ddp_timeout=ddp_timeout,
    )


def with_ranks(environment: Mapping[str, str], launch: Any, overrides: dict[str, Any], recipe: Any) -> dict[str, Any]:
    """`overrides`, with train.num_processes as the number of ranks on all machines where that is known by now."""
    from sft_core.recipe import merge_keys

    here = _number(environment, "NPROC_PER_NODE", 0) or recipe.train.num_processes
    if launch.launcher == "slurm":
        ranks = launch.nnodes
    elif launch.launcher == "none":
        ranks = 1
    elif launch.nnodes > 1 and here is None:
        raise RecipeError(f"NNODES={launch.nnodes}: set NPROC_PER_NODE too, the number of ranks on each machine")
    elif here is None:
        return overrides
    else:
        ranks = here * launch.nnodes
    return merge_keys(overrides, {"train": {"num_processes": ranks}})


def train_as(launch: Any, recipe: Any) -> None:
    """The steps up to train. Node 0 takes them all; the others join in for the training alone."""
    from cli.stopped import reached_in, telling
    from sft_core.plan import plan_recipe
    from sft_core.steps import Retraining
    from sft_core.store import Store
    from sft_core.train.launch import TrainingStopped
    from sft_core.train.worker import EXIT_STOPPED

    store = Store(recipe.store)
    if launch.nnodes > 1 and not store.is_local:
        raise RecipeError(f"store {recipe.store}: with several machines it has to be a folder on a disk that all share")
    with telling(lambda: "while planning; nothing was begun"):
        retraining = Retraining(recipe, plan_recipe(recipe), store, launch=launch)
    try:
        with telling(lambda: reached_in(recipe, retraining.plan)):
            if launch.node_rank == 0:
                _lead(retraining, launch)
            else:
                _train_along(retraining, launch)
    except TrainingStopped as stopped:
        say(f"stopped: {stopped}", to_stderr=True)
        raise typer.Exit(EXIT_STOPPED) from None


def _lead(retraining: Any, launch: Any) -> None:
    from sft_core.steps import run_step
    from sft_core.train.nodes import leading
    from sft_core.train.ranks import TRAINING

    for note in retraining.plan.notes:
        say(f"note: {note}", to_stderr=True)
    fingerprint = retraining.plan["train"].fingerprint
    there = retraining.store.find("train", fingerprint) is not None
    alone = launch.nnodes == 1 or there
    with nullcontext() if alone else leading(retraining.store.work_in_progress("train", fingerprint), launch) as heart:
        for key in retraining.plan.steps:
            if key.startswith("fetch/") or key in ("normalize", "pack", "train"):
                if key == "train" and not there:
                    for words in retraining.warnings():
                        say(f"warning: {words}")
                if key == "train" and heart is not None:
                    heart.say(state=TRAINING)
                built = run_step(retraining, key)
                say(f"{key}: {'reused' if built.reused else 'built'} {built.artifact.uri}")
    say(f"checkpoint: {retraining.folder('train') / 'checkpoint'}")


def _train_along(retraining: Any, launch: Any) -> None:
    from sft_core.train.nodes import train_along

    store, fingerprint = retraining.store, retraining.plan["train"].fingerprint
    ranks = retraining.recipe.train.num_processes
    work = store.work_in_progress("train", fingerprint)
    trained = train_along(work, ranks, launch, lambda: store.find("train", fingerprint) is not None)
    say(f"train: {'done; node 0 publishes it' if trained else 'reused'} {store.artifact('train', fingerprint).uri}")


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip()
    if text and not text.isdecimal():
        raise RecipeError(f"{name}={text}: a whole number is needed")
    return int(text) if text else default
