"""Task of the step register: reports -> verdict -> a version of a registered MLflow model, perhaps the champion.

Idempotent by the merged model's fingerprint: a second run of the same retraining, at the same time or later, finds its
version and makes none. What was judged against is read again under the registry's lock; if it moved, the model is
judged anew.
"""

from dataclasses import dataclass, replace
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact

from sft_core.errors import RegistryError
from sft_core.plan import plan_champion
from sft_core.register import Verdict
from sft_core.register.stored import Judged, judge_stored
from sft_core.steps import Retraining
from tasks.model_version import create_version, discard_copy, log_merged, verdict_tags, write_card
from tasks.models import move_champion
from tasks.registry import (
    NO_CHAMPION,
    SETTLED,
    RegisteredVersion,
    barred_because,
    count_challenges,
    find_champion,
    find_version,
    model_folder,
    read_version,
)
from tasks.registry_lock import registry_lock
from tasks.run_step import STEP, Job, perform
from tasks.tracking import client
from tasks.trained_rows import rows_known_to_judged

__all__ = ["find_champion", "model_folder", "register", "registered_summary"]
PAGE = "register.html"
"""The report that explains the verdict: an artifact of the run."""
MAX_JUDGEMENTS = 4
"""Each time the champion moves meanwhile, the model is judged again; so often at most."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a judgement rests on beside the reports: the champion, and how often it was challenged."""

    champion: RegisteredVersion | None
    challenges: int

    @property
    def number(self) -> str:
        """The champion's, or NO_CHAMPION."""
        return self.champion.number if self.champion is not None else NO_CHAMPION

    def moved(self, now: "Standing") -> bool:
        """Whether a verdict reached on this standing is out of date."""
        return (self.number, self.challenges) != (now.number, now.challenges)


def registered_summary(model_name: str, merged_fingerprint: str) -> dict[str, Any] | None:
    """What `register` returned for this merged model, if it finished."""
    found = find_version(model_name, merged_fingerprint)
    return _summary(model_name, found, new=False) if found is not None and found.settled else None


@task(name="register", task_run_name="register-{job.recipe.model_name}", **STEP)
def register(job: Job, champion: RegisteredVersion | None) -> dict[str, Any]:
    """Judge, log the merged model, register a version, move the aliases. Returns version, aliases and verdict."""
    name, merged = job.recipe.model_name, job.plan["merge"].fingerprint
    existing = find_version(name, merged)
    if existing is not None and existing.settled:
        get_run_logger().info("register: version %s of %s holds this model already", existing.number, name)
        return _summary(name, existing, new=False)
    standing = Standing(champion, count_challenges(name, champion, merged))
    if champion is not None and "evaluate/champion" not in job.plan.steps:
        job = _evaluate_champion(job, champion)
    model_id = None
    for _ in range(MAX_JUDGEMENTS):
        run = job.retraining(get_run_logger().info)
        judged = _judge(job, run, standing)
        model_id = model_id or log_merged(job, run)
        with registry_lock(name):
            existing = find_version(name, merged)
            if existing is not None and existing.settled:  # a run of the same retraining was faster
                discard_copy(name, existing.number, model_id)
                return _summary(name, existing, new=False)
            now = _standing(name, merged)
            if not standing.moved(now):
                number = existing.number if existing is not None else None
                return _settle(job, run, (model_id, judged.verdict), standing, number)
        get_run_logger().info("register: the champion moved from %s to %s; judging again", standing.number, now.number)
        standing = now
        if now.champion is not None:
            job = _evaluate_champion(job, now.champion)
    raise RegistryError(f"{name}: the champion moved {MAX_JUDGEMENTS} times while this model was judged; run again")


def _judge(job: Job, run: Retraining, standing: Standing) -> Judged:
    """The verdict, shown; a merged model that was rolled back is never promoted again."""
    log = get_run_logger().info
    judged = judge_stored(
        run,
        standing.challenges + 1,
        against_champion=standing.champion is not None,
        trained_on=rows_known_to_judged(job, standing.champion, log),
    )
    reason = barred_because(job.recipe.model_name, job.plan["merge"].fingerprint)
    if reason is not None:
        notes = (*judged.verdict.notes, f"this model was rolled back: {reason}")
        judged = Judged(replace(judged.verdict, promote=False, notes=notes), judged.page)
    client().log_text(job.part.run_id, judged.page, PAGE)
    place = f"`{PAGE}` in the MLflow run `{job.part.run_id}`"
    create_markdown_artifact(f"{judged.verdict.words}.\n\nThe whole report: {place}", key="verdict")
    return judged


def _settle(
    job: Job, run: Retraining, judged: tuple[str, Verdict], standing: Standing, existing: str | None
) -> dict[str, Any]:
    """Version, tags and aliases, under the lock: nobody else changes them meanwhile. `judged`: logged model, verdict;
    `existing`: the version's number, if an earlier try got so far."""
    name, (model_id, verdict) = job.recipe.model_name, judged
    number = existing or create_version(job, run, model_id, verdict, standing.number)
    if standing.champion is None or standing.champion.number != number:  # else: promoted, and then interrupted
        _move_aliases(job, run, number, verdict, standing)
    client().set_model_version_tag(name, number, SETTLED, "true")
    get_run_logger().info("register: %s version %s %s", name, number, verdict.words)
    return _summary(name, read_version(name, number), new=existing is None)


def _move_aliases(job: Job, run: Retraining, number: str, verdict: Verdict, standing: Standing) -> None:
    """`candidate` is the newest version judged; `champion` moves only through the gate, `previous` follows it."""
    name = job.recipe.model_name
    for tag, value in verdict_tags(verdict, standing.number).items():
        client().set_model_version_tag(name, number, tag, value)
    write_card(job, run, number, verdict)
    client().set_registered_model_alias(name, "candidate", number)
    if verdict.promote:
        move_champion(name, number, standing.champion, verdict.words)


def _evaluate_champion(job: Job, champion: RegisteredVersion) -> Job:
    """The job with the new champion's report in its plan."""
    job = replace(job, plan=plan_champion(job.plan, job.recipe, champion.merged_fingerprint))
    perform(job, "evaluate/champion", model_folder(job.recipe.model_name, champion))
    return job


def _standing(model_name: str, merged_fingerprint: str) -> Standing:
    champion = find_champion(model_name)
    return Standing(champion, count_challenges(model_name, champion, merged_fingerprint))


def _summary(name: str, registered: RegisteredVersion, *, new: bool) -> dict[str, Any]:
    return {
        "model_name": name,
        "version": registered.number,
        "aliases": list(registered.aliases),
        "verdict": registered.verdict,
        "new": new,
    }
