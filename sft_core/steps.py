"""Run one planned step against the store: reuse it if it is there, else build, check, publish.

In: a resolved recipe, its plan, a step's key. Out: `Built`. This is the one place that joins steps to the store; tasks
and the command line both come through here.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from sft_core import stop
from sft_core.artifacts import KIND_OF_STEP, Artifact, Manifest, Outcome, check_ledger
from sft_core.as_planned import refuse_changes
from sft_core.base_model import local_base_model
from sft_core.convert import ConvertOptions, convert_checkpoint
from sft_core.credentials import credentials_hidden
from sft_core.disk_faults import disk_fault, naming_disk_faults
from sft_core.errors import PlanError, StoreError
from sft_core.evaluate import EvaluatedModel, evaluate_model
from sft_core.fetch import fetch_dataset
from sft_core.lease import Lease
from sft_core.memory_faults import naming_memory_faults
from sft_core.merge import MergeOptions, merge_adapter
from sft_core.normalize import NormalizeSource, normalize_dataset
from sft_core.normalize.limits import check_lost as check_normalized
from sft_core.outlook import warnings_before_training
from sft_core.pack import TokenizerSource, pack_dataset
from sft_core.pack.limits import check_lost as check_packed
from sft_core.panics import panics_told
from sft_core.plan import Plan, PlannedStep, library_versions
from sft_core.plan_parts import Readings
from sft_core.recipe import Recipe
from sft_core.shards import Earlier, Mapper, NothingEarlier, Sharding, read_shard_list
from sft_core.store import Store, list_files
from sft_core.terminal import say
from sft_core.train import TrainInputs, train_adapter
from sft_core.train.holders import take_over
from sft_core.train.launchers import ONE_MACHINE, Launch
from sft_core.train.mirror import Mirror, mirroring

SHARDED = ("fetch", "normalize", "pack")
"""Steps that work shard by shard."""
SAVE_SECONDS, SEND_SECONDS = 30.0, 300.0
"""How long a stopped training may take to save, and to send what it saved to an object store."""


@dataclass(frozen=True, slots=True)
class Built:
    """An artifact, its manifest, and whether it was there already."""

    artifact: Artifact
    manifest: Manifest
    reused: bool


@dataclass(frozen=True, slots=True)
class Retraining:
    """What every builder needs: the recipe, its plan, the store, where progress lines go, and what runs the work on
    shards."""

    recipe: Recipe
    plan: Plan
    store: Store
    on_line: Callable[[str], None] = say
    champion: Path | None = None
    mapper: Mapper = map
    earlier: Earlier = NothingEarlier()
    """What this recipe last built for the step at hand."""
    found: Readings | None = None
    """What the step at hand reads, as it was found to be as planned."""
    lease: Lease | None = None
    """Held while training."""
    launch: Launch = ONE_MACHINE
    """How ranks are started."""

    def folder(self, key: str) -> Path:
        """Local folder of an artifact that an earlier step wrote."""
        step = self.plan[key]
        return self.store.local(self.store.artifact(step.step, step.fingerprint))

    def manifest(self, key: str) -> Manifest:
        """Of an artifact that an earlier step wrote."""
        manifest = self.store.find(self.plan[key].step, self.plan[key].fingerprint)
        assert manifest is not None, f"{key} is built before what reads it"
        return manifest

    def hint(self, key: str) -> str:
        """Under which name the store remembers what this recipe last built for `key`."""
        return f"{self.recipe.name}/{key.replace('/', '-')}"

    @property
    def sharding(self) -> Sharding:
        """Shards of the step's last artifact are taken from there."""
        return Sharding(self.earlier, self.mapper, self.on_line)

    def warnings(self) -> list[str]:
        """What is likely to go wrong in training; pack must be built."""
        return warnings_before_training(self.recipe, self.folder("pack"), self.base_model())

    def base_model(self) -> Path:
        """Local folder of the base model."""
        return local_base_model(self.recipe.base_model, self.plan.base_commit)


@credentials_hidden()
def run_step(run: Retraining, key: str) -> Built:
    """Reuse or build the artifact of `key`. What it reads must be in the store."""
    with naming_disk_faults(key, f"in {run.store.url} or TMPDIR"), naming_memory_faults(key):
        return _run_step(run, key)


def _run_step(run: Retraining, key: str) -> Built:
    stop.check()
    planned = run.plan[key]
    artifact = run.store.artifact(planned.step, planned.fingerprint)
    manifest = run.store.find(planned.step, planned.fingerprint)
    if manifest is not None:
        with _hints(run, "sft store gc will count its days from an earlier use"):
            run.store.mark_used(planned.step, planned.fingerprint)
        return Built(artifact, manifest, reused=True)
    if planned.step != "train":
        return Built(artifact, _build(run, planned), reused=False)
    with run.store.training_lease(planned.fingerprint, run.on_line) as lease:
        manifest = run.store.find("train", planned.fingerprint)  # another trainer may have ended meanwhile
        built = Built(artifact, manifest or _build(replace(run, lease=lease), planned), reused=manifest is not None)
        if lease.look():
            run.store.drop_work("train", planned.fingerprint)  # resumable state has done its work
            lease.forget()
    return built


def _build(run: Retraining, planned: PlannedStep) -> Manifest:
    """Build and publish; the manifest that won."""
    if planned.step in SHARDED:
        run = replace(run, earlier=run.store.earlier(run.hint(planned.key)))
    started, clock = datetime.now(UTC).isoformat(), time.monotonic()
    found = Readings(run.recipe, run.plan)
    refuse_changes(run.recipe, run.plan, planned.key, found)
    with run.store.staging(planned.step) as out, panics_told(f"{planned.key}, with {run.recipe.base_model.path}"):
        outcome = BUILDERS[planned.step](replace(run, found=found), planned, out)
        _check_again(run, planned)
        check_ledger(planned.step, outcome.ledger)
        if planned.step in SHARDED:
            _say_shards(run, planned, out)
        manifest = Manifest(
            kind=KIND_OF_STEP[planned.step],
            step=planned.step,
            name=f"{run.recipe.name}:{planned.key}",
            fingerprint=planned.fingerprint,
            parts=planned.parts,
            inputs=planned.inputs,
            files=list_files(out),
            ledger=outcome.ledger,
            facts=outcome.facts,
            versions=library_versions(),
            device=_device(planned.step),
            started=started,
            took_seconds=round(time.monotonic() - clock, 3),
        )
        if run.lease is not None:
            run.lease.confirm()
        manifest = run.store.publish(out, manifest)
    if planned.step in SHARDED:
        with _hints(run, "the next run will make its shards anew"):
            run.store.remember(run.hint(planned.key), planned.step, planned.fingerprint)
    return manifest


@contextmanager
def _hints(run: Retraining, without: str) -> Iterator[None]:
    """What is noted inside helps a later run and is no part of an artifact: where it cannot be written, say what is
    `without` it."""
    try:
        yield
    except (OSError, StoreError) as error:
        what = (disk_fault(error) or str(error)).partition(";")[0]
        run.on_line(f"note: {what}: {without}")


def _check_again(run: Retraining, planned: PlannedStep) -> None:
    """Whether what was read while the step worked is as planned still; fetch checks that as it reads."""
    if planned.step == "fetch":
        return
    try:
        refuse_changes(run.recipe, run.plan, planned.key)
    except PlanError:
        if run.lease is not None:  # the next training must not go on from what another base was trained to
            run.lease.confirm()
            run.store.drop_work(planned.step, planned.fingerprint)
        raise


def _say_shards(run: Retraining, planned: PlannedStep, out: Path) -> None:
    shards = read_shard_list(out)
    known = sum(run.earlier.find(shard.key) is not None for shard in shards)
    run.on_line(f"{planned.key}: {len(shards)} shards, {known} of them as in the last run")


def _fetch(run: Retraining, planned: PlannedStep, out: Path) -> Outcome:
    index = int(planned.key.partition("/")[2])
    dataset = (*run.recipe.datasets, *run.recipe.eval_datasets)[index]
    return fetch_dataset(dataset, out, run.found.source(index) if run.found else None, run.sharding)


def _normalize(run: Retraining, planned: PlannedStep, out: Path) -> Outcome:
    recipe = run.recipe
    sources = [(d, False) for d in recipe.datasets] + [(d, True) for d in recipe.eval_datasets]
    inputs = [
        NormalizeSource(rows=run.folder(f"fetch/{i}"), map_fn=d.map_fn, name=d.path, weight=d.weight, held_out=held_out)
        for i, (d, held_out) in enumerate(sources)
    ]
    outcome = normalize_dataset(inputs, recipe.normalize, recipe.eval_fraction, recipe.seed, out, run.sharding)
    map_fns = {source.name: source.map_fn for source in inputs}
    check_normalized(outcome.facts, outcome.ledger, map_fns, recipe.max_quarantined_fraction)
    return outcome


def _pack(run: Retraining, planned: PlannedStep, out: Path) -> Outcome:
    recipe = run.recipe
    tokenizer = TokenizerSource(run.base_model(), recipe.base_model.trust_remote_code)
    outcome = pack_dataset(run.folder("normalize"), tokenizer, recipe.pack, recipe.seed, out, run.sharding)
    account = check_packed(run.manifest("normalize"), outcome.ledger, recipe.pack, recipe.max_quarantined_fraction)
    if account is not None:
        run.on_line(f"note: {account}")
    return outcome


def _train(run: Retraining, planned: PlannedStep, out: Path) -> Outcome:
    assert run.lease is not None, "training is built under its lease"
    store, lease = run.store, run.lease
    work = take_over(store.work_in_progress("train", planned.fingerprint), lease.name)
    warnings = run.warnings()
    inputs = TrainInputs(
        packed=run.folder("pack"),
        base_model=run.base_model(),
        trust_remote_code=run.recipe.base_model.trust_remote_code,
        work=work,
        conversations=run.folder("normalize"),
        launch=run.launch,
        check=lease.check,
        silence_seconds=0.75 * lease.seconds,
    )
    saving = SAVE_SECONDS if store.is_local else SEND_SECONDS
    mirror = None if store.is_local else Mirror(store.files, store.mirror("train", planned.fingerprint), work)
    with stop.allowing(saving), mirroring(mirror, lease, run.on_line) as on_line:
        outcome = train_adapter(inputs, run.recipe.train, run.recipe.seed, out, on_line)
    return replace(outcome, facts={**outcome.facts, "warnings": warnings})


def _convert(run: Retraining, planned: PlannedStep, out: Path) -> Outcome:
    train = run.recipe.train
    options = ConvertOptions(
        base=run.base_model(),
        dtype=train.dtype if train.lora is None else None,
        tokenizer=run.folder("pack") / "tokenizer",
        quantization={"quantization": train.quantization, "compute_dtype": train.dtype},
        chat_template=run.plan.chat_template,
        trust_remote_code=run.recipe.base_model.trust_remote_code,
    )
    return convert_checkpoint(run.folder("train") / "checkpoint", out, train.lora, run.recipe.base_model.path, options)


def _merge(run: Retraining, planned: PlannedStep, out: Path) -> Outcome:
    if run.recipe.train.lora is None:  # all weights were trained: the checkpoint holds the model
        return _convert(run, planned, out)
    options = MergeOptions(
        base=run.recipe.merge.base,
        quantization=run.recipe.train.quantization,
        compute_dtype=run.recipe.train.dtype,
        held_out=run.folder("normalize"),
        chat_template=run.plan.chat_template,
        seed=run.recipe.seed,
        trust_remote_code=run.recipe.base_model.trust_remote_code,
    )
    return merge_adapter(run.base_model(), run.folder("convert"), out, options)


def _evaluate(run: Retraining, planned: PlannedStep, out: Path) -> Outcome:
    which = planned.key.partition("/")[2]
    if which == "champion":
        assert run.champion is not None, "whoever plans a champion's evaluation gives its folder"
        folder, template = run.champion, None
    else:
        folder = run.folder("merge") if which == "tuned" else run.base_model()
        template = run.plan.chat_template
    model = EvaluatedModel(
        folder=folder,
        max_length=run.recipe.pack.max_length,
        trust_remote_code=run.recipe.base_model.trust_remote_code,
        chat_template=template,
    )
    return evaluate_model(model, run.folder("normalize"), run.recipe.evaluate, run.recipe.seed, out)


BUILDERS: dict[str, Callable[[Retraining, PlannedStep, Path], Outcome]] = {
    "fetch": _fetch,
    "normalize": _normalize,
    "pack": _pack,
    "train": _train,
    "convert": _convert,
    "merge": _merge,
    "evaluate": _evaluate,
}


def _device(step: str) -> str:
    if step in SHARDED:
        return "cpu"
    import torch  # slow to import, and no part of preparing rows

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
