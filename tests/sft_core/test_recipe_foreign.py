"""What a run may name that somebody asked a server for: the form's parameters, and a part's whole recipe."""

import json
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from sft_core.errors import RecipeError
from sft_core.recipe.foreign import resolve_foreign
from sft_core.trust import MODULES, PATHS, PROJECT, REMOTE_CODE

RECIPE = """
name: orders
store: ./store
base_model: {path: base}
datasets: [{path: rows.jsonl}]
pack: {chat_template: chatml}
"""
SECRET = "swordfish"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A worker's project folder with all that a recipe names, and beside it what is no run's business."""
    folder, outside = tmp_path / "project", tmp_path / "outside"
    for place in (folder / "base", folder / "data", folder / ".sft", outside / "model"):
        place.mkdir(parents=True)
    files = {
        "recipe.yaml": RECIPE,
        "rows.jsonl": "{}",
        "mine.jinja": "x",
        "ds.json": "{}",
        "data/a.jsonl": "{}",
        "base/config.json": "{}",
        ".sft/keys.yaml": f"password: {SECRET}",
        ".sft/x.jinja": SECRET,
        "settings.ini": SECRET,
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    for name in ("keys.yaml", "x.jinja", "ds.json", "rows.jsonl", "model/config.json"):
        (outside / name).write_text(f"password: {SECRET}")
    for name in ("keys.yaml", "x.jinja", "ds.json", "rows.jsonl", "model"):
        (folder / f"link-{name}").symlink_to(outside / name)
    (folder / "data" / "link.jsonl").symlink_to(outside / "rows.jsonl")
    (folder / "outside").symlink_to(outside)
    monkeypatch.chdir(folder)
    for variable in (MODULES, PATHS, REMOTE_CODE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(PROJECT, str(folder))
    return folder


def said(recipe: Any, overrides: dict[str, Any] | None = None) -> str:
    """The error, without any of the worker's texts."""
    with pytest.raises(RecipeError) as error:
        resolve_foreign(recipe, overrides)
    assert SECRET not in str(error.value)
    return str(error.value)


OUTSIDE = [
    "{outside}/{name}",
    "../outside/{name}",
    "link-{name}",
    "outside/{name}",
    "~/{name}",
    "file://{outside}/{name}",
    "file:{outside}/{name}",
    "local://{outside}/{name}",
    "data/../../outside/{name}",
    "{outside}/nothing-{name}",
    "zip://a::{outside}/{name}",
    "simplecache::file://{outside}/{name}",
    "http://127.0.0.1:1/{name}",
]


@pytest.mark.parametrize("form", OUTSIDE)
def test_a_file_outside_the_project_is_refused_in_the_same_words_whether_it_is_there_or_not(
    project: Path, form: str
) -> None:
    def place(name: str) -> str:
        return form.format(outside=project.parent / "outside", name=name)

    rule = ": a run that was asked for from the server may name "
    assert said(place("keys.yaml")).startswith(f"recipe{rule}a shipped name or a .yaml file, and files only in")
    template = said("recipe.yaml", {"pack": {"chat_template": place("x.jinja")}})
    assert template.startswith(f"pack.chat_template{rule}")
    assert said("recipe.yaml", {"train": {"deepspeed": place("ds.json")}}).startswith(f"train.deepspeed{rule}")
    assert said("recipe.yaml", {"base_model": {"path": place("model")}}).startswith(f"base_model.path{rule}")
    assert said("recipe.yaml", {"store": place("store")} if "link" not in form else {"store": "outside/s"}).startswith(
        "store"
    )
    whole = {**resolve_foreign("recipe.yaml").as_dict(), "datasets": [{"path": place("rows.jsonl")}]}
    assert said(whole).startswith(f"datasets.0.path{rule}")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"pack": {"chat_template": ".sft/x.jinja"}}, "pack.chat_template"),
        ({"pack": {"chat_template": "settings.ini"}}, "pack.chat_template"),
        ({"pack": {"chat_template": "recipe.yaml"}}, "pack.chat_template"),
        ({"store": ".sft"}, "store"),
        ({"store": "."}, "store"),
        ({"store": "s3://another/store"}, "store"),
        ({"compute": {"dask": "tcp://evil.example:8786"}}, "compute.dask"),
        ({"compute": {"dask": "evil.example:8786"}}, "compute.dask"),
        ({"train": {"deepspeed": "recipe.yaml"}}, "train.deepspeed"),
    ],
)
def test_other_things_that_a_form_must_not_name(project: Path, overrides: dict[str, Any], key: str) -> None:
    assert said("recipe.yaml", overrides).startswith(f"{key}: ")


@pytest.mark.parametrize("path", ["data", "*", "data/*.jsonl", ".sft/*", "**/*.jsonl", "demo/data/../../../x"])
def test_rows_of_a_part_do_not_lead_out_of_the_project(project: Path, path: str) -> None:
    whole = {**resolve_foreign("recipe.yaml").as_dict(), "datasets": [{"path": path}]}
    assert said(whole).startswith("datasets.0.path: ")


def test_what_a_form_may_name(project: Path) -> None:
    (project / "data" / "link.jsonl").unlink()
    overrides: dict[str, Any] = {
        "store": "other/store",
        "base_model": {"path": "meta-llama/Llama-3.1-8B"},
        "pack": {"chat_template": "mine.jinja"},
        "train": {"deepspeed": "deepspeed_zero3"},
    }
    resolved = resolve_foreign("recipe.yaml", overrides)
    assert (resolved.store, resolved.pack.chat_template, resolved.train.deepspeed) == (
        "other/store",
        "mine.jinja",
        "zero3",
    )
    assert resolve_foreign("recipe.yaml", {"train": {"deepspeed": "ds.json"}}).train.deepspeed == "ds.json"
    assert resolve_foreign(str(project / "recipe.yaml")).name == "orders"
    assert resolve_foreign("demo").name == "demo"
    sources = [
        {"path": path} for path in ("rows.jsonl", "data", "data/*.jsonl", "owner/rows", "demo/data/orders.jsonl")
    ]
    whole = {**resolved.as_dict(), "datasets": [*sources, {"path": "a/b", "source": "modelscope"}]}
    assert len(resolve_foreign(whole).datasets) == 6


def test_what_the_projects_own_recipe_says_is_its_owners_word(project: Path) -> None:
    (project / "recipe.yaml").write_text(
        RECIPE.replace("./store", "s3://bucket/store").replace("rows.jsonl", "/data/r.jsonl")
    )
    resolved = resolve_foreign("recipe.yaml", {"train": {"learning_rate": 1e-5}})
    assert (resolved.store, resolved.datasets[0].path) == ("s3://bucket/store", "/data/r.jsonl")
    assert said(resolved.as_dict()).startswith("store: ")  # as a parameter it is anybody's


def test_a_deployment_may_allow_more(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATHS, f"{project.parent}/outside, s3://bucket/sft, tcp://scheduler:8786")
    for store in ("s3://bucket/sft", "s3://bucket/sft/store", "S3://bucket/sft/x"):
        assert resolve_foreign("recipe.yaml", {"store": store}).store == store
    for store in (
        "s3://bucket/sft-other",
        "s3://bucket/sft/../x",
        "s3://bucket/sft/%2e%2e/x",
        "s3://bucket",
        "gs://bucket/sft",
    ):
        assert said("recipe.yaml", {"store": store}).startswith("store: ")
    monkeypatch.setenv(PATHS, f"{project.parent}/outside, s3://, tcp://scheduler:8786/")
    assert resolve_foreign("recipe.yaml", {"store": "s3://any/store"}).store == "s3://any/store"
    assert resolve_foreign("recipe.yaml", {"compute": {"dask": "tcp://scheduler:8786"}}).compute.dask is not None
    assert said("recipe.yaml", {"compute": {"dask": "tcp://scheduler:87866"}}).startswith("compute.dask: ")
    assert resolve_foreign("recipe.yaml", {"pack": {"chat_template": "link-x.jinja"}}).pack.chat_template is not None


def test_code_that_comes_with_a_model_needs_the_deployments_word(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = {"base_model": {"trust_remote_code": True}}
    assert said("recipe.yaml", overrides).startswith(
        "base_model.trust_remote_code is true, and that runs code from elsewh"
    )
    (project / "recipe.yaml").write_text(RECIPE.replace("{path: base}", "{path: base, trust_remote_code: true}"))
    assert "base_model.trust_remote_code" in said("recipe.yaml", {"base_model": {"path": "evil/model"}})
    monkeypatch.setenv(REMOTE_CODE, "1")
    assert resolve_foreign("recipe.yaml", overrides).base_model.trust_remote_code is True


def test_errors_name_keys_and_no_values(project: Path) -> None:
    (project / "secret.yaml").write_text(
        f"database:\n  password: {SECRET}\nname: '{SECRET} {SECRET}'\nstore: [{SECRET}]\n"
    )
    text = said("secret.yaml")
    assert text.startswith("the recipe: 5 wrong key(s)\n")
    assert "  database: unknown key; did you mean 'datasets'?" in text
    (project / "broken.yaml").write_text(f"a: b\n  c: [{SECRET}\n")
    assert said("broken.yaml") == "broken.yaml: not YAML: line 2, column 4"
    (project / "list.yaml").write_text(f"- {SECRET}\n")
    assert said("list.yaml") == "list.yaml: a recipe is a mapping of keys, this is list; see recipes/"
    assert said("recipe.yaml", {"train": {"learning_rate": SECRET}}).startswith(
        "the recipe:\n  train.learning_rate: Input"
    )
    assert "did you mean 'demo'?" in said("dmo")


@pytest.fixture
def website(project: Path) -> Iterator[str]:
    """A server of the inner network, which gives a recipe to whoever asks."""
    folder = project.parent / "website"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    code = {"name": "a", "base_model": {"path": "b/c"}, "datasets": [{"path": "b/d", "map_fn": "mine.py:row"}]}
    (folder / "code.yaml").write_text(json.dumps(code))
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        server.asked = asked  # type: ignore[attr-defined]
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
    (project / "asked").write_text("\n".join(asked))


def test_a_recipe_from_a_url_is_fetched_only_from_where_the_deployment_allows(
    project: Path, website: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(f"{website}/recipe.yaml").startswith("recipe: a run that was asked for from the server may name ")
    monkeypatch.setenv(PATHS, f"{website}/")
    assert resolve_foreign(f"{website}/recipe.yaml").name == "orders"
    assert "recipe: a recipe from a URL sets datasets.0.map_fn" in said(f"{website}/code.yaml")
    assert said(f"{website}/nothing.yaml").startswith(f"{website}/nothing.yaml: cannot be read: ")
    monkeypatch.setenv(PATHS, f"{website}/other/")
    assert said(f"{website}/recipe.yaml").startswith("recipe: ")
