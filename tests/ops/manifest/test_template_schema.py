"""Templates and deployments are valid by the schemas that Microsoft publishes and its tools validate with."""

import json
from typing import Any

import pytest

from iotedge_schema import deployment_problems, template_problems
from manifests import AGENT, HUB, MODULE, change, value_at
from repository_paths import REPOSITORY
from visionedge.ops.manifest.generate import Gpu, ManifestRequest, generate_manifest

TEMPLATES = ["deployment.template.json", "deployment.cpu.template.json"]
GPUS: list[Gpu] = ["none", "dda", "gpu-pv", "gpu-pv-by-hand"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_shipped_templates_are_valid(name: str) -> None:
    assert template_problems(json.loads((REPOSITORY / name).read_text())) == []


@pytest.mark.parametrize("gpu", GPUS)
def test_what_generate_makes_is_valid(gpu: Gpu) -> None:
    """With all that can be given."""
    request = ManifestRequest(
        image="registry.example.com/visionedge:1.0",
        gpu=gpu,
        registries={"a": "a.example.com"},
        env={"TZ": "Europe/Berlin"},
        labels={"site": "hall"},
        form="template",
    )
    assert template_problems(json.loads(generate_manifest(request, {}).text)) == []
    environ = {"CONTAINER_REGISTRY_USERNAME": "u", "CONTAINER_REGISTRY_PASSWORD": "p"}
    deployment = ManifestRequest(image=request.image, gpu=gpu, registries=request.registries)
    assert deployment_problems(json.loads(generate_manifest(deployment, environ).text)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((*HUB, "schemaVersion"), "1.1"),
        ((*AGENT, "schemaVersion"), "1.2"),
        ((*MODULE, "settings", "createOptions"), []),
        ((*MODULE, "restartpolicy"), "always"),
        ((*MODULE, "status"), "on"),
        ((*MODULE, "env"), {"A B": {"value": "1"}}),
        ((*MODULE, "startupOrder"), True),
        ((*HUB, "routes", "a b"), "FROM /* INTO $upstream"),
        ((*HUB, "routes", "a"), {"route": "FROM /* INTO $upstream", "priority": 10}),
        ((*HUB, "storeAndForwardConfiguration"), {}),
        ((*AGENT, "systemModules", "edgeHub"), {"type": "docker"}),
        (("modulesContent", "$edgeAgent"), {}),
    ],
)
def test_the_rules_find_what_the_schema_forbids(path: tuple[str, ...], value: Any) -> None:
    """Else the tests above would prove nothing."""
    template = json.loads((REPOSITORY / TEMPLATES[0]).read_text())
    assert value_at(template, MODULE)["status"] == "running"
    assert template_problems(change(template, path, value)) != []
