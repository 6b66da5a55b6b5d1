"""Do a retraining's steps survive `kill -9` wherever it falls? Run by hand: `python benchmarks/kill_steps.py`.

In: made rows, a tiny random Llama, CPU; a store on the disk, or (`--store s3`) on an S3-compatible server of its own.
Out: whole retrainings of all steps (fetch to evaluate), each killed with SIGKILL up to MOST times in every step at
moments drawn from a seed, either with all its processes (a machine that goes) or alone (its ranks are left behind);
then the same is started again. A line a retraining, a table of kills by step last. After each retraining every file of
every artifact is compared with those of one that nobody disturbed. Exit status 1 if one differs.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MOST = 3
"""Kills of one step of one retraining; none to three, drawn."""
VARYING = ("train.log", "metrics.jsonl", "training_args.bin", "train/checkpoint/adapter_config.json", "complete")
"""Files that hold times, sets, or hashes of such files: two undisturbed retrainings may differ in them. Which ones do
is looked at first."""
POLL_SECONDS = 0.005


def main() -> None:
    """Kill, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--store", choices=["disk", "s3"], default="disk")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    draw, kills, differ = random.Random(options.seed), Counter[str](), 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sft-kills-")))
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        inputs = make_inputs(folder)
        where = place(options.store, folder, stack)
        import_all()
        straight, took = undisturbed(inputs, f"{where}-0")
        again, _ = undisturbed(inputs, f"{where}-1")
        varying = {name for name in straight if straight[name] != again.get(name)}
        print(f"{len(straight)} files; two undisturbed retrainings differ in {sorted(varying)}", flush=True)
        assert all(name.endswith(VARYING) for name in varying), "undisturbed retrainings differ"
        number = 2
        while sum(kills.values()) < options.kills:
            store = f"{where}-{number}"
            found = Counter(disturb(inputs, store, took, draw, options.kills - sum(kills.values())))
            kills += found
            ended = read(inputs, store)
            wrong = [n for n in straight.keys() | ended.keys() if n not in varying and straight.get(n) != ended.get(n)]
            differ += bool(wrong)
            print(f"retraining {number - 1}: {sum(found.values())} kills, {wrong or 'equal'}", flush=True)
            number += 1
    print(f"{options.store}: {sum(kills.values())} kills in {number - 2} retrainings, {differ} differ")
    print(", ".join(f"{key} {count}" for key, count in kills.items()))
    sys.exit(1 if differ else 0)


def place(kind: str, folder: Path, stack: ExitStack) -> str:
    """The beginning of a store's name."""
    if kind == "disk":
        return str(folder / "store")
    from tests.services.s3 import BUCKET, s3_server

    server = stack.enter_context(s3_server(folder))
    os.environ |= server.environment
    server.client().create_bucket(Bucket=BUCKET)
    return f"s3://{BUCKET}/store"


def make_inputs(folder: Path) -> dict[str, Any]:
    """A recipe, but for its store."""
    from tests.conftest import make_tiny_model

    rows = [{"instruction": f"say w{i * 7919 % 10007}", "input": "", "output": f"w{i}!"} for i in range(120)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return {
        "name": "kills",
        "base_model": {"path": str(make_tiny_model(folder / "model"))},
        "datasets": [{"path": str(folder / "rows.jsonl"), "map_fn": "alpaca"}],
        "eval_fraction": 0.2,
        "pack": {"max_length": 64, "chat_template": "chatml"},
        "train": {
            "dtype": "float32",
            "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
            "num_train_epochs": 50,
            "max_steps": 20,
            "save_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
        },
        "evaluate": {"max_new_tokens": 4, "max_generated_rows": 4},
        "register": {"min_heldout_rows": 1},
    }


def import_all() -> None:
    """What the steps import: attempts are forks of this process, and begin at once."""
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import s3fs  # noqa: F401
    import transformers  # noqa: F401

    import sft_core.steps  # noqa: F401


def retrain(inputs: dict[str, Any], store: str, log: Path) -> None:
    """All steps, in this process; each one's name goes to the log as it begins."""
    from sft_core.plan import plan_recipe
    from sft_core.recipe import resolve
    from sft_core.steps import Retraining, run_step
    from sft_core.store import Store

    with log.open("a", buffering=1) as lines:
        recipe = resolve({**inputs, "store": store})
        run = Retraining(recipe, plan_recipe(recipe), Store(store), lambda text: None)
        for key in run.plan.steps:
            lines.write(f"{key}\n")
            run_step(run, key)
        lines.write("end\n")


def start(inputs: dict[str, Any], store: str, log: Path) -> int:
    """The pid of a fork that retrains, in a session of its own."""
    log.write_text("")
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        quiet = os.open(log.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        retrain(inputs, store, log)
        status = 0
    except BaseException:  # noqa: BLE001 - a fork never returns to what its parent does
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def undisturbed(inputs: dict[str, Any], store: str) -> tuple[dict[str, str], dict[str, float]]:
    """Hashes of all files, and the seconds that each step took."""
    log = Path(tempfile.gettempdir()) / "straight.txt"
    pid, took, last, clock = start(inputs, store, log), {}, "", time.monotonic()
    while True:
        gone, status = os.waitpid(pid, os.WNOHANG)
        now = (log.read_text().splitlines() or [""])[-1]
        if now != last:
            took[last], last, clock = time.monotonic() - clock, now, time.monotonic()
        if gone:
            break
        time.sleep(POLL_SECONDS)
    assert status == 0, log.with_suffix(".out").read_text()[-3000:]
    took.pop("")
    return read(inputs, store), took


def disturb(inputs: dict[str, Any], store: str, took: dict[str, float], draw: random.Random, most: int) -> list[str]:
    """Retrain until it ends, killed on the way; the step of each kill. A step that an attempt finds done is over before
    most kills, so each step is killed in the attempts that reach it, one kill each."""
    log = Path(tempfile.gettempdir()) / "attempt.txt"
    planned = {key: draw.randint(0, MOST) for key in took}
    killed: list[str] = []
    while True:
        pid, whole = start(inputs, store, log), draw.random() < 0.5
        target = next((key for key in took if planned[key]), None) if len(killed) < most else None
        if target is not None and wait_for(pid, log, target, draw.uniform(0, took[target])):
            end(pid, whole)
            at = (log.read_text().splitlines() or ["plan"])[-1]
            killed.append(at)
            planned[target] -= 1
            continue
        _, status = os.waitpid(pid, 0)
        if status == 0:
            return killed
        raise SystemExit(f"status {status}: {log.with_suffix('.out').read_text()[-3000:]}")


def wait_for(pid: int, log: Path, step: str, delay: float) -> bool:
    """Until `delay` seconds after the beginning of the step; False if the attempt has ended, as a zombie, before."""
    begun = None
    while begun is None or time.monotonic() - begun < delay:
        lines = log.read_text().splitlines()
        if begun is None and step in lines:
            begun = time.monotonic()
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(POLL_SECONDS)
    return True


def end(pid: int, whole: bool) -> None:
    """SIGKILL, and wait for it. `whole`: to all processes that it started, too."""
    from tests.services.long_training import descendants

    family = descendants(pid) if whole else [pid]
    for one in family:
        os.kill(one, signal.SIGKILL)
    os.waitpid(pid, 0)


def read(inputs: dict[str, Any], store: str) -> dict[str, str]:
    """SHA-256 of every file of every artifact that the plan names, as the manifests have it."""
    from sft_core.plan import plan_recipe
    from sft_core.recipe import resolve
    from sft_core.store import Store

    recipe = resolve({**inputs, "store": store})
    opened, found = Store(store), {}
    for key, step in plan_recipe(recipe).steps.items():
        manifest = opened.find(step.step, step.fingerprint)
        assert manifest is not None, f"{key} is not there"
        opened.local(opened.artifact(step.step, step.fingerprint))  # reads and checks
        found |= {f"{key}/{name}": file.sha256 for name, file in manifest.files.items()}
    return found


if __name__ == "__main__":
    main()
