"""The pages for who runs the server, and deploy/, speak of flags, paths and metrics that there are."""

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from running import Running

from jaxllm.cli.main import command_parser
from jaxllm.server.status import Readiness

ROOT = Path(__file__).parent.parent.parent
DEPLOY = sorted(path for path in (ROOT / "deploy").rglob("*") if path.is_file())
FILES = [ROOT / "docs" / "operations.md", ROOT / "docs" / "distributed.md", *DEPLOY]


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    "path", [path for path in DEPLOY if path.suffix in (".yml", ".yaml", ".json")], ids=names
)
def test_files_can_be_read(path: Path) -> None:
    text = path.read_text()
    assert json.loads(text) if path.suffix == ".json" else all(yaml.safe_load_all(text))


@pytest.mark.parametrize("path", FILES, ids=names)
def test_flags_are_there(path: Path) -> None:
    known = {flag for action in command_parser("serve")._actions for flag in action.option_strings}
    others = {
        "--target",
        "--yes",
        "--no-install-recommends",
        "--create-home",
        "--uid",
        "--start-period",
        "--fail",
    }
    others |= {"--head", "--address", "--silent", "--no-cache-dir", "--from-file", "--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", path.read_text())) <= known | others


@pytest.mark.parametrize("path", FILES, ids=names)
def test_metrics_are_there(path: Path, server: Running) -> None:
    text = server.http.get("/metrics").text
    families = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    samples = set(re.findall(r"^([\w:]+)", text, re.M))
    spoken = set(re.findall(r"jaxllm:[a-z_]*[a-z](?![\w*:])", path.read_text())) - {
        "jaxllm:cpu",
        "jaxllm:cuda",
    }
    assert spoken <= families | samples


def test_queries_of_the_dashboard(server: Running) -> None:
    server.post("/v1/completions", prompt="abc", max_tokens=3)
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    board = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())
    sources = yaml.safe_load((ROOT / "deploy" / "grafana" / "datasources.yaml").read_text())["datasources"]
    uids = {source["uid"] for source in sources}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        assert panel["datasource"]["uid"] in uids
        for target in panel["targets"]:
            query = target["expr"]
            names = re.findall(r"\b(?:jaxllm:|http_)\w+", query)
            assert names, query
            assert set(names) <= set(labels), query
            chosen = re.findall(r"(\w+)\s*[=!]~?\s*\"", query)
            grouped = [name for list in re.findall(r"by \(([^)]*)\)", query) for name in list.split(",")]
            shown = re.findall(r"{{(\w+)}}", target["legendFormat"])
            asked = {name.strip() for name in (*chosen, *grouped, *shown)}
            assert all(asked <= labels[name] for name in names), query
            assert ("_bucket" in query) == ("histogram_quantile" in query)
            assert all(f"rate({name}" in query for name in names if name.endswith("_bucket")), query
    [variable] = board["templating"]["list"]
    [(metric, label)] = re.findall(r"label_values\((\S+), (\w+)\)", variable["query"])
    assert label in labels[metric]


def test_probes_ask_paths_that_are_there(server: Running) -> None:
    text = (ROOT / "deploy" / "kubernetes.yaml").read_text() + (ROOT / "deploy" / "Dockerfile").read_text()
    paths = set(re.findall(r"path: (/\w+)", text)) | set(re.findall(r":8000(/\w+)", text))
    assert paths == {"/health", "/ready"}
    assert all(server.http.get(path).is_success for path in paths)


def test_how_far_loading_is_on_the_page(server: Running) -> None:
    [text] = re.findall(
        r'^    (\{"status":"loading".*)$', (ROOT / "docs" / "operations.md").read_text(), re.M
    )
    shown = json.loads(text)
    assert server.service._startup is not None
    there = server.service._startup.progress()
    assert list(shown) == ["status", *(name for name in Readiness.__annotations__ if name in there)]
    assert (
        list(shown["done"]) == list(there["done"])[: len(shown["done"])]
    )  # in this order, and then the rest


def test_the_configuration_on_the_page_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxllm.cli.main import main

    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "operations.md").read_text(), re.S)
    (tmp_path / "serve.yaml").write_text(text)
    served = []
    monkeypatch.setattr("jaxllm.server.run.run", lambda *configs: served.append(configs) or 0)
    assert main(["serve", "--config", str(tmp_path / "serve.yaml")]) == 0
    assert served[0][0].access.served_model_name == ["smollm2", "default"]
