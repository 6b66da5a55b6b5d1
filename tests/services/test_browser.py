"""What a person sees, in headless Chromium: the form of retrain/on-demand, its run, the artifacts, the MLflow UI.

SFT_SCREENSHOTS names a folder for pictures of the pages; without it none is taken.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.stack import RECIPE, RUN_SECONDS, Stack, wait_until, write_rows

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
expect, Page = sync_api.expect, sync_api.Page
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")

PAGE_SECONDS = 60.0
"""Bound on what a page shows once its servers know it; about 2 s on two idle cores."""
BUSY = 503
SIZE = sync_api.ViewportSize(width=1280, height=860)
NOTHING_OUTSIDE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
STEPS = 400
"""Optimizer steps: 6 to 120 s, enough for more than one update of the progress artifact."""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """One tab for all tests."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[NOTHING_OUTSIDE])
        tab = browser.new_page(viewport=SIZE)
        tab.set_default_timeout(PAGE_SECONDS * 1000)
        expect.set_options(timeout=PAGE_SECONDS * 1000)
        yield tab
        browser.close()


@pytest.fixture(scope="module")
def run_id(stack: Stack, page: Page) -> str:
    """A run of a longer recipe, with two rows to set aside, started from the form."""
    (stack.folder / "recipe.yaml").write_text(RECIPE.replace("max_steps: 3", f"max_steps: {STEPS}"))
    write_rows(stack.folder / "rows.jsonl", 60)
    with (stack.folder / "rows.jsonl").open("a") as rows:
        rows.write(2 * (json.dumps({"instruction": "say nothing", "input": "", "output": ""}) + "\n"))
    page.goto(f"{stack.prefect_url}/deployments")
    deployment = stack.api("GET", "/deployments/name/retrain/on-demand")["id"]  # rollback has one of that name too
    page.locator(f"a[href$='/deployment/{deployment}']").first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    recipe = page.locator("textarea").first  # its label is bound to nothing
    recipe.fill("recipe.yaml")
    recipe.blur()
    picture(page, "form")
    return wait_until(lambda: submit(page), PAGE_SECONDS)


@pytest.fixture(scope="module")
def finished(stack: Stack, run_id: str) -> str:
    """The same run, once it has completed."""
    run = stack.wait_final(run_id)
    assert run["state_name"] == "Completed", "\n".join(stack.logs(run_id))
    return run_id


def test_the_form_starts_a_run_whose_progress_moves_while_it_trains(stack: Stack, page: Page, run_id: str) -> None:
    assert stack.flow_run(run_id)["parameters"]["recipe"] == "recipe.yaml"
    artifact = wait_until(lambda: find_progress(stack, run_id), RUN_SECONDS)
    page.goto(f"{stack.prefect_url}/artifacts/artifact/{artifact}")
    first = wait_until(lambda: read_progress(page), PAGE_SECONDS)
    later = wait_until(lambda: (now := read_progress(page)) != first and now, RUN_SECONDS)
    picture(page, "progress")
    assert 0 <= first[0] < later[0] <= 100  # the page rounds 1 of 400 to 0%
    assert 1 <= first[1] < later[1] <= STEPS


def test_the_run_page_names_what_was_worked_on(stack: Stack, page: Page, finished: str) -> None:
    names = {c["name"]: c["id"] for c in stack.children(finished)}
    assert set(names) == {"prepare orders", "train orders", "publish orders"}
    for part, tasks in (
        ("prepare", ["fetch rows.jsonl", "normalize orders", "pack orders"]),
        ("publish", ["merge orders", "evaluate base (base)", "evaluate tuned (orders)", "register orders"]),
    ):
        open_run(stack, page, names[f"{part} orders"])
        page.get_by_text("Task Runs", exact=True).click()
        for task in tasks:
            expect(page.get_by_role("link", name=task, exact=True)).to_be_visible()
    picture(page, "run")


def test_the_ledger_says_what_became_of_the_rows(stack: Stack, page: Page, finished: str) -> None:
    open_latest(stack, page, "ledger-orders")
    row = page.get_by_role("row").filter(has_text="normalize").filter(has_text="rows").first
    expect(row.get_by_role("cell")).to_have_text(["normalize", "rows", "62", "60", "2", "empty_answer 2"])
    expect(page.get_by_text("Of the data 3.2% is lost (normalize 2 of 62 rows (3.2%))")).to_be_visible()
    picture(page, "ledger")


def test_the_report_has_the_verdict_the_scores_and_the_curve(stack: Stack, page: Page, finished: str) -> None:
    open_latest(stack, page, "report-orders")
    expect(page.get_by_role("heading", name="orders version 1: promoted")).to_be_visible()
    expect(page.get_by_text(re.compile("^beats the base: loss"))).to_be_visible()
    expect(page.get_by_role("row").filter(has_text="token_accuracy").get_by_role("cell")).to_have_count(3)
    curve = page.get_by_role("img", name=f"at {STEPS}")
    assert curve.evaluate("image => image.decode().then(() => image.naturalWidth)") == 680
    picture(page, "report-artifact", height=1000)


def test_links_lead_from_prefect_to_mlflow_and_back(stack: Stack, page: Page, finished: str) -> None:
    open_latest(stack, page, "version-orders")
    follow(page, "orders version 1")
    expect(page).to_have_url(f"{stack.mlflow_url}/#/models/orders/versions/1")
    for text in ("champion", "candidate", re.compile("^promoted: beats the base")):
        expect(page.get_by_text(text).first).to_be_visible()
    page.get_by_role("button", name="Close").click()  # of MLflow's assistant
    picture(page, "model-version")
    follow(page, re.compile("^publish-"))
    follow(page, "Prefect flow run")
    publish = next(c["id"] for c in stack.children(finished) if c["name"] == "publish orders")
    expect(page).to_have_url(re.compile(f"^{re.escape(stack.prefect_url)}/runs/flow-run/{publish}"))
    open_artifact(page, "mlflow-publish-orders")
    follow(page, "MLflow run of publish")
    expect(page.get_by_role("link", name="Prefect flow run")).to_be_visible()


def submit(page: Page) -> str | None:
    """Click; the flow run's id. None where the server's SQLite was busy (503): a person clicks again."""
    with page.expect_response("**/create_flow_run") as answer:
        page.get_by_role("button", name="Submit").click()
    if answer.value.status == BUSY:
        return None
    assert answer.value.ok, f"{answer.value.status}: {answer.value.text()}"
    return str(answer.value.json()["id"])


def open_run(stack: Stack, page: Page, run_id: str) -> None:
    page.goto(f"{stack.prefect_url}/runs/flow-run/{run_id}")


def open_artifact(page: Page, key: str) -> None:
    """Of the flow run that is open."""
    page.get_by_text("Artifacts", exact=True).last.click()
    page.locator("a[href^='/artifacts/artifact/']").filter(has_text=key).click()
    page.wait_for_url("**/artifacts/artifact/*")


def open_latest(stack: Stack, page: Page, key: str) -> None:
    """The last artifact of a key, from the page that lists all."""
    page.goto(f"{stack.prefect_url}/artifacts")
    page.locator(f"a[href='/artifacts/key/{key}']").click()
    page.wait_for_url(f"**/artifacts/key/{key}")
    page.locator("a[href^='/artifacts/artifact/']").first.click()
    page.wait_for_url("**/artifacts/artifact/*")


def follow(page: Page, name: str | re.Pattern[str]) -> None:
    """Click a link; where it opens a tab of its own, go on in this one."""
    link = page.get_by_role("link", name=name).first
    link.wait_for()
    link.evaluate("link => link.removeAttribute('target')")
    link.click()


def find_progress(stack: Stack, run_id: str) -> str | None:
    """Id of the progress artifact that this run's training made, once there is one."""
    parts = [child["id"] for child in stack.children(run_id)]
    wanted = {"artifacts": {"flow_run_id": {"any_": parts}, "type": {"any_": ["progress"]}}}
    found = stack.api("POST", "/artifacts/filter", wanted) if parts else []
    return str(found[0]["id"]) if found else None


def read_progress(page: Page) -> tuple[float, int] | None:
    """Percent and optimizer step that the artifact's page shows now."""
    page.reload()
    page.get_by_text("Progress:").wait_for()
    percent = re.search(r"Progress: ([0-9.]+)%", page.inner_text("body"))
    step = re.search(r"step (\d+)/", page.inner_text("body"))
    return (float(percent[1]), int(step[1])) if percent and step else None


def picture(page: Page, name: str, height: int = SIZE["height"]) -> None:
    """Keep what the page shows, where somebody asked for it."""
    folder = os.environ.get("SFT_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.set_viewport_size({**SIZE, "height": height})
        page.screenshot(path=Path(folder) / f"{name}.png", animations="disabled")
        page.set_viewport_size(SIZE)
