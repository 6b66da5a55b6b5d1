"""Parameters through the real API: what a run does not mention stays as the recipe has it; what is wrong is named.

The recipe's rows are absent, so a run ends where its sources are hashed: after the resolved recipe, its first artifact.
The server takes every run's parameters, and has its state; a worker's process runs those of which its log is read, and
this process runs the others as one does.
"""

import json
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import httpx
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.context import refresh_global_settings_context
from prefect.flow_engine import run_flow

from flows.retrain import retrain
from sft_core.recipe import resolve
from sft_core.trust import PROJECT
from tests.services.stack import RECIPE, Stack, wait_until

FORM = "retrain/on-demand"
SECTIONS = "base_model schedule normalize pack train merge evaluate register compute".split()
GROUPS = ["general", *SECTIONS]
RUNS: dict[str, dict[str, Any]] = {
    "one key": {"train": {"learning_rate": 1e-5}},
    "untouched": {},
    "untouched, nulls": dict.fromkeys(GROUPS),
    "untouched, opened": {**dict.fromkeys(GROUPS, {}), "train": {"lora": {}}},
    "null": {"pack": {"chat_template": None}},
    "bad together": {"train": {"quantization": "nf4", "lora": None}},
    "unknown section": {"trian": {"learning_rate": 1e-5}},
    "a file of the worker": {"pack": {"chat_template": "/etc/hostname"}},
    "code of a model": {"base_model": {"trust_remote_code": True}},
    "another's recipe": {"recipe": "/etc/fstab"},
    "credential": {"general": {"store": "s3://AKIA:swordfish@bucket/store"}},
}
OF_A_WORKER = ("one key", "unknown section", "credential")


@pytest.fixture(scope="module")
def deployed(servers: Stack) -> Stack:
    """The deployments; no worker yet."""
    (servers.folder / "recipe.yaml").write_text(RECIPE.replace("rows.jsonl", "absent.jsonl"))
    return servers


@pytest.fixture(scope="module")
def deployment(deployed: Stack) -> dict[str, Any]:
    flow, _, name = FORM.partition("/")
    found = dict(deployed.api("GET", f"/deployments/name/{flow}/{name}"))
    deployed.api("PATCH", f"/deployments/{found['id']}", {"concurrency_limit": len(RUNS) + 1})  # not one after another
    return found


@pytest.fixture(scope="module")
def ended(deployed: Stack, deployment: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All of RUNS, each once its state is final."""
    defaults = {**deployment["parameters"], "recipe": "recipe.yaml"}
    runs = {**RUNS, "untouched, all null": all_null(deployment["parameter_openapi_schema"])}
    ids = {key: start(deployed, deployment["id"], {**defaults, **changed}) for key, changed in runs.items()}
    for key in runs.keys() - set(OF_A_WORKER):
        run_here(deployed, ids[key])
    deployed.worker("cpu", limit=len(OF_A_WORKER))
    return {key: deployed.wait_final(run_id) for key, run_id in ids.items()}


def run_here(stack: Stack, run_id: str) -> None:
    """What a worker's process does with a deployment's flow run, in this one; its state says how it ended."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(stack.folder)
        patch.setenv(PROJECT, str(stack.folder))
        for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            patch.setenv(name, stack.environment[name])
        refresh_global_settings_context()  # the flow has threads, which know of no other settings
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(UUID(run_id))
        run_flow(retrain, flow_run=run, parameters=run.parameters, return_type="state")
    refresh_global_settings_context()


def start(stack: Stack, deployment: str, parameters: Mapping[str, Any]) -> str:
    """A run of the deployment; SQLite's server answers 503 while it is busy."""
    return str(create(stack, deployment, {"parameters": parameters}, httpx.codes.CREATED).json()["id"])


def create(stack: Stack, deployment: str, body: Mapping[str, Any], status: int) -> httpx.Response:
    url = f"{stack.prefect_url}/api/deployments/{deployment}/create_flow_run"
    body = {**body, "idempotency_key": json.dumps(body)}

    def answer() -> httpx.Response | None:
        got = httpx.post(url, json=body, timeout=60)
        return None if got.status_code == httpx.codes.SERVICE_UNAVAILABLE else got

    got = wait_until(answer, 300)
    assert got.status_code == status, got.text
    return got


def all_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Every section, with null for every key of which null says nothing (for a choice the server refuses it)."""

    def nulls(name: str) -> dict[str, Any]:
        fields = schema["definitions"][name.rpartition("/")[2]]["properties"]
        return {key: None for key, entry in fields.items() if "type" in entry and "enum" not in entry}

    references = {key: schema["properties"][key]["anyOf"][0]["$ref"] for key in GROUPS}
    return {key: nulls(reference) for key, reference in references.items()}


def shown(stack: Stack, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The run's artifacts that have a key, oldest first."""
    found = stack.api("POST", "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    return sorted((artifact for artifact in found if artifact["key"]), key=lambda artifact: artifact["created"])


def resolved_recipe(stack: Stack, run: Mapping[str, Any]) -> dict[str, Any]:
    """What the run's artifact `recipe` shows."""
    first = wait_until(lambda: shown(stack, run), 60)[0]
    assert first["key"] == "recipe-orders"
    return dict(yaml.safe_load(first["data"].partition("```yaml\n")[2].removesuffix("```\n")))


def flat(values: Any, key: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    if not isinstance(values, dict) or not values:
        return {key: values}
    return {dotted: leaf for name in values for dotted, leaf in flat(values[name], f"{key}.{name}".strip(".")).items()}


def changed_keys(stack: Stack, run: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the run's recipe that differ from those of the recipe itself."""
    own = flat(resolve(stack.folder / "recipe.yaml").as_dict())
    of_run = flat(resolved_recipe(stack, run))
    assert set(of_run) == set(own)
    assert own["train.lora.r"] == 4  # not the default, 16
    return {key: value for key, value in of_run.items() if value != own[key]}


def test_one_key_changes_that_key_alone(deployed: Stack, ended: dict[str, dict[str, Any]]) -> None:
    assert changed_keys(deployed, ended["one key"]) == {"train.learning_rate": 1e-5}
    assert "absent.jsonl" in ended["one key"]["state"]["message"]


@pytest.mark.parametrize("form", ["untouched", "untouched, nulls", "untouched, opened", "untouched, all null"])
def test_a_form_submitted_untouched_changes_nothing(
    deployed: Stack, ended: dict[str, dict[str, Any]], form: str
) -> None:
    """As both of Prefect's UIs send it: nothing, null, or an empty section where it was opened."""
    assert changed_keys(deployed, ended[form]) == {}


def test_null_counts_where_a_key_may_be_null(deployed: Stack, ended: dict[str, dict[str, Any]]) -> None:
    assert changed_keys(deployed, ended["null"]) == {"pack.chat_template": None}


def test_values_that_do_not_go_together_fail_the_run_by_name(ended: dict[str, dict[str, Any]]) -> None:
    state = ended["bad together"]["state"]
    assert state["type"] == "FAILED"
    assert "RecipeError" in state["message"]
    assert "lora: null trains all weights, which a 4-bit base cannot do" in state["message"]


def test_an_unknown_section_ends_the_run_and_is_named_in_its_log(
    deployed: Stack, ended: dict[str, dict[str, Any]]
) -> None:
    run = ended["unknown section"]
    assert run["state"]["type"] == "CRASHED"  # Prefect's word: the flow could not be called
    said = "\n".join(deployed.logs(run["id"]))
    assert "trian" in said
    assert all(section in said for section in SECTIONS)


def test_a_credential_is_refused_and_not_repeated(deployed: Stack, ended: dict[str, dict[str, Any]]) -> None:
    run = ended["credential"]
    assert run["state"]["type"] == "FAILED"
    assert "store: the URL holds a credential" in run["state"]["message"]
    assert not any("swordfish" in line for line in [run["state"]["message"], *deployed.logs(run["id"])])
    assert shown(deployed, run) == []


def test_a_form_reads_no_file_of_the_worker_and_runs_no_code(deployed: Stack, ended: dict[str, dict[str, Any]]) -> None:
    said = {
        "a file of the worker": "pack.chat_template: a run that was asked for from the server may name",
        "another's recipe": "recipe: a run that was asked for from the server may name",
        "code of a model": "base_model.trust_remote_code is true, and that runs code from elsewhere",
    }
    for which, words in said.items():
        run = ended[which]
        assert run["state"]["type"] == "FAILED"
        assert words in run["state"]["message"]
        assert shown(deployed, run) == []


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"train": {"learning_rate": -1}}, "train"),
        ({"train": {"learning_rate": "quick"}}, "quick"),
        ({"train": {"lora": {"lora_dropout": 1.5}}}, "1.5"),
        ({"pack": {"packing": "tight"}}, "tight"),
        ({"train": {"gradient_checkpointing": "maybe"}}, "train.gradient_checkpointing"),
        ({"train": {"lerning_rate": 1e-4}}, "lerning_rate"),
        ({"recipe": 7}, "recipe"),
    ],
)
def test_a_bad_value_is_refused_by_the_server(
    deployed: Stack, deployment: dict[str, Any], parameters: dict[str, Any], named: str
) -> None:
    body = {"parameters": {"recipe": "recipe.yaml", **parameters}}
    answer = create(deployed, deployment["id"], body, httpx.codes.CONFLICT)
    assert named in answer.json()["detail"]


def test_the_form_shows_help_bounds_and_no_switch(deployment: dict[str, Any]) -> None:
    """A switch of the form always sends a value, touched or not."""
    schema = deployment["parameter_openapi_schema"]
    assert sorted(schema["properties"], key=lambda key: schema["properties"][key]["position"]) == ["recipe", *GROUPS]
    fields = {
        (name, key): entry
        for name, section in schema["definitions"].items()
        for key, entry in section["properties"].items()
    }
    assert len(fields) > 50
    for (name, key), entry in fields.items():
        assert entry["title"] == key, name
        assert entry["description"], key
        assert "default" not in entry
        assert "boolean" not in [kind.get("type") for kind in [entry, *entry.get("anyOf", ())]]
    rate = fields["TrainOverrides", "learning_rate"]
    assert (rate["type"], rate["exclusiveMinimum"]) == ("number", 0)
    assert rate["description"].endswith("(above 0; 0.0002 where the recipe does not say)")


def test_no_deployment_has_a_secret_among_its_parameters(deployed: Stack) -> None:
    words = ("password", "secret", "token", "key")
    for deployment in deployed.api("POST", "/deployments/filter", {}):
        for name in deployment["parameter_openapi_schema"]["properties"]:
            assert not any(word in name for word in words), (deployment["name"], name)
