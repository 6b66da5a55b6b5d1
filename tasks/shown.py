"""What a run shows in the Prefect UI beside its states, and how Prefect and MLflow name one another.

In: a job, what was registered. Out: Prefect artifacts (ledger, report, links), tags of MLflow runs. Nothing here
decides anything: a server that does not take it costs a warning, never the run.
"""

import base64
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import mlflow
from mlflow.exceptions import MlflowException
from prefect import get_run_logger
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.exceptions import PrefectException
from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from sft_core.account import COUNTED, account_line, loss_of
from sft_core.artifacts import Manifest
from sft_core.credentials import without_credentials
from sft_core.lineage.card import scores_table
from sft_core.markdown import as_text
from sft_core.plan import Plan
from sft_core.recipe import Recipe
from sft_core.register.charts import HEIGHT, WIDTH, line_chart
from sft_core.terminal import say
from tasks.fetch import source_name
from tasks.run_step import Job
from tasks.tracking import PartRun, client, find_run

NOTE = "mlflow.note.content"
"""Tag that MLflow shows as a run's description."""
FLOW_RUN, FLOW_RUN_URL = "sft.prefect_flow_run_id", "sft.prefect_flow_run_url"
REPORT_PAGE = "register.html"
CURVE_STYLE = (
    "svg{font:12px sans-serif;background:#fff}.axis{fill:none;stroke:#999}"
    ".curve{fill:none;stroke:#1f5fa8;stroke-width:1.5}"
)
Losses = list[tuple[float, float]]
"""(optimizer step, loss in nats a supervised token), by step."""


def show_ledger(job: Job) -> None:
    """A table of what fetch, normalize and pack did with every row; all three must be built."""
    store, steps = job.retraining(say).store, job.plan.steps
    moving = [key for key in steps if key.startswith("fetch/")] + ["normalize", "pack"]
    there = {key: store.find(steps[key].step, steps[key].fingerprint) for key in moving}
    found = {key: manifest for key, manifest in there.items() if manifest is not None}
    rows = ledger_rows(found)
    kept = f"`quarantine` in normalize/{steps['normalize'].fingerprint[:12]}"
    words = f"What became of the data of {job.recipe.name}. Rows set aside are kept in the folder {kept} of the store."
    lost = [loss_of(key, manifest.ledger) for key, manifest in found.items() if key in COUNTED]
    if account := account_line(job.recipe.max_quarantined_fraction, *lost):
        words = f"{words} {account[0].upper()}{account[1:]}."
    with only_shown("the ledger"):
        create_table_artifact(rows, artifact_key("ledger", job.recipe.name), words)


def show_report(job: Job, registered: Mapping[str, Any]) -> None:
    """The verdict, the scores it rests on, the loss curve. `registered`: what register gives; `job`: what it judged."""
    with only_shown("the report"):
        create_markdown_artifact(
            report_text(registered, _scores(job), _losses(job), _report_links(job, registered)),
            artifact_key("report", registered["model_name"]),
            f"Version {registered['version']} of {registered['model_name']}: verdict, scores, loss curve",
        )


def show_version(registered: Mapping[str, Any]) -> None:
    """A link to the model version's page in MLflow, where MLflow has pages."""
    name, number = registered["model_name"], registered["version"]
    page = mlflow_page(f"models/{name}/versions/{number}")
    if page is not None:
        with only_shown("the link to the model version"):
            text = f"{name} version {number}"
            aliases = ", ".join(registered["aliases"]) or "no alias"
            words = as_text(f"{text} ({aliases}): {registered['verdict']}")
            create_link_artifact(page, text, artifact_key("version", name), words)


def link_runs(part: str, name: str, run: PartRun) -> None:
    """MLflow's runs (the part's, the retraining's) name Prefect's flow runs; the flow run gets a link to MLflow's."""
    with only_shown("the link between the Prefect and the MLflow run"):
        for run_id, flow_run_id in ((run.run_id, flow_run.id), (run.parent_run_id, flow_run.root_flow_run_id)):
            _name_flow_run(run_id, flow_run_id)
        page = _run_page(run.run_id)
        if page is not None:
            text = f"MLflow run of {part}"
            words = f"{text} {name}: manifests of its steps, metrics, reports"
            create_link_artifact(page, text, artifact_key(f"mlflow-{part}", name), words)


def show_retraining(recipe: Recipe, plan: Plan) -> None:
    """A link to the MLflow run that holds the whole retraining; none where no part got so far."""
    with only_shown("the link to the MLflow run"):
        run_id = find_run(recipe, plan, None)
        page = _run_page(run_id) if run_id is not None else None
        if page is not None:
            text = f"MLflow run of {recipe.name}"
            words = f"{text}: recipe, plan, and a run each for prepare, train and publish"
            create_link_artifact(page, text, artifact_key("mlflow", recipe.name), words)


def ledger_rows(manifests: Mapping[str, Manifest]) -> list[dict[str, str]]:
    """One row a step and unit: in, out, set aside, and why, the commonest reason first."""
    return [
        {
            "step": f"fetch {source_name(m.facts['source'])}" if m.step == "fetch" else m.step,
            "unit": unit.replace("_", " "),
            "in": f"{entry['in']:,}",
            "out": f"{entry['out']:,}",
            "set aside": f"{sum(entry['set_aside'].values()):,}",
            "reasons": ", ".join(
                f"{reason} {count:,}"
                for reason, count in sorted(entry["set_aside"].items(), key=lambda pair: (-pair[1], pair[0]))
            ),
        }
        for m in manifests.values()
        for unit, entry in m.ledger.items()
    ]


def report_text(registered: Mapping[str, Any], scores: str, losses: Losses, links: str) -> str:
    """Markdown. `scores` and `links` are Markdown too, and may be empty."""
    promoted, _, reasons = registered["verdict"].partition(": ")
    sections = [
        f"# {as_text(registered['model_name'])} version {registered['version']}: {as_text(promoted)}",
        "\n".join(f"- {as_text(reason)}" for reason in reasons.split("; ")),
        links,
        f"## Scores on held-out rows\n\n{scores}" if scores else "",
        f"## Training loss\n\n{curve_image(losses)}" if len(losses) > 1 else "",
    ]
    return "\n\n".join(section for section in sections if section)


def curve_image(losses: Losses) -> str:
    """A Markdown image that holds its bytes; its text says where the curve starts and ends."""
    chart = line_chart({"training": losses}, "optimizer step", "loss, nats a supervised token")
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{CURVE_STYLE}</style>{chart}</svg>'
    (first, begin), (last, end) = losses[0], losses[-1]
    words = f"{begin:.4g} at optimizer step {first:g}, {end:.4g} at {last:g}"
    return f"![{words}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})\n\n{words}"


def artifact_key(kind: str, name: str) -> str:
    """A key as Prefect takes it. Artifacts of one key are one history.

    >>> artifact_key("report", "My_Model.v2")
    'report-my-model-v2'
    """
    return re.sub("[^a-z0-9]+", "-", f"{kind}-{name}".lower()).strip("-")


def mlflow_page(path: str) -> str | None:
    """URL of a page of the MLflow UI, without credentials; None where MLflow is no server."""
    url = urlsplit(mlflow.get_tracking_uri())
    if url.scheme not in ("http", "https"):
        return None
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path.rstrip('/')}/#/{path}"


@contextmanager
def only_shown(what: str) -> Iterator[None]:
    """A server's no, or its silence, is a warning. Anything else is a fault of this program and goes on."""
    try:
        yield
    except (httpx.HTTPError, PrefectException, MlflowException, OSError) as error:
        get_run_logger().warning("%s is not shown: %s", what, error)


def _scores(job: Job) -> str:
    store, steps = job.retraining(say).store, job.plan.steps
    found = {key: store.find("evaluate", step.fingerprint) for key, step in steps.items() if step.step == "evaluate"}
    return scores_table({key: manifest for key, manifest in found.items() if manifest is not None})


def _losses(job: Job) -> Losses:
    run_id = find_run(job.recipe, job.plan, "train")
    history = client().get_metric_history(run_id, "train/loss") if run_id is not None else []
    return sorted((float(metric.step), float(metric.value)) for metric in history)


def _report_links(job: Job, registered: Mapping[str, Any]) -> str:
    """Where the rest is: as links, or as the names to look for where MLflow has no pages."""
    run_id, name, number = job.part.run_id, registered["model_name"], registered["version"]
    run = _run_page(run_id)
    if run is None:
        return f"In MLflow: `models:/{name}/{number}`; the whole report is `{REPORT_PAGE}` of the run `{run_id}`."
    version = mlflow_page(f"models/{name}/versions/{number}")
    return (
        f"[Model version {number}]({version}) · [MLflow run]({run}) · [the whole report]({run}/artifacts/{REPORT_PAGE})"
    )


def _run_page(run_id: str) -> str | None:
    return mlflow_page(f"experiments/{client().get_run(run_id).info.experiment_id}/runs/{run_id}")


def _name_flow_run(run_id: str, flow_run_id: str) -> None:
    client().set_tag(run_id, FLOW_RUN, flow_run_id)
    page = url_for("flow-run", flow_run_id)
    if page is not None:
        page = without_credentials(page)
        client().set_tag(run_id, FLOW_RUN_URL, page)
        client().set_tag(run_id, NOTE, f"[Prefect flow run]({page})")
