"""The files for containers name what is there: files, options, metrics and their labels."""

import argparse
import json
import re
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from served import ask

from vpt.cli.serve import COMMAND

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"


def test_every_metric_and_label_of_the_board_is_exported(client, url):
    client.chat.completions.create(model="embedded", messages=ask())
    metrics = httpx.get(f"{url}/metrics").text
    labels = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    board = json.loads((DEPLOY / "grafana" / "vpt.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(queries) > 12
    for query in queries:
        names = re.findall(r"vpt:\w+", query)
        assert names and set(names) <= labels.keys(), query
        for given in re.findall(r"by \((\w+)\)", query) + re.findall(r"{(\w+)[=~]", query):
            assert given in labels[names[0]], query


def test_compose_mounts_files_that_are_there_and_scrapes_the_server():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for service in services.values():
        for volume in service.get("volumes", ()):
            if (source := volume.partition(":")[0]).startswith("."):
                assert (DEPLOY / source).is_file(), source
    build = services["vpt"]["build"]
    context = (DEPLOY / build["context"]).resolve()
    assert context == ROOT and (context / build["dockerfile"]).is_file()
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert scraped[0]["static_configs"][0]["targets"] == ["vpt:8000"]


def test_the_image_copies_files_that_are_there_and_starts_with_known_options():
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line.partition(" ") for line in text.splitlines()]
    sent = (ROOT / ".dockerignore").read_text().split()
    for name, _, rest in lines:
        for source in rest.split()[:-1] if name == "COPY" else ():
            assert (ROOT / source).exists() and f"!{source}" in sent
    (entry,) = [json.loads(rest) for name, _, rest in lines if name == "ENTRYPOINT"]
    assert entry[:2] == ["vpt", "serve"]
    parser = argparse.ArgumentParser()
    COMMAND.add_arguments(parser)
    parser.parse_args(entry[2:])


def test_the_example_for_kuberay_is_a_valid_application():
    pytest.importorskip("ray.serve")
    from ray.serve.schema import ServeDeploySchema

    from vpt.serving.replicas import build

    service = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    assert build(application["args"])
