"""Microsoft's own tool expands the shipped templates and generated ones.

`iotedgedev` lives in an environment of its own, build/iotedgedev, which the first test makes; without a
package index these tests are skipped. Its JSON schemas are on the web: iotedge_schema.py has their rules.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from iotedge_schema import deployment_problems
from repository_paths import REPOSITORY
from visionedge.ops.manifest.generate import Gpu, ManifestRequest, generate_manifest
from visionedge.ops.manifest.lint import lint_manifest

VERSION = "3.3.9"
FOLDER = REPOSITORY / "build" / "iotedgedev"
TOOL = FOLDER / "bin" / "iotedgedev"
GPUS: list[Gpu] = ["none", "dda", "gpu-pv", "gpu-pv-by-hand"]
DOCKERFILE = "FROM scratch\nCOPY module/module.json /\n"


@pytest.fixture(scope="session")
def iotedgedev() -> Path:
    """The tool, installed if it can be."""
    done = FOLDER / f"installed-{VERSION}"
    if not done.exists():
        shutil.rmtree(FOLDER, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True, capture_output=True)
        pip = [str(FOLDER / "bin" / "python"), "-m", "pip", "install", "--quiet", "--retries", "1"]
        ended = subprocess.run([*pip, f"iotedgedev=={VERSION}"], capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            reason = (ended.stderr.strip().splitlines() or ["no output"])[-1]
            pytest.skip(f"no package index answers, so iotedgedev cannot be installed: {reason[:200]}")
        done.touch()
    return TOOL


@pytest.fixture
def solution(tmp_path: Path) -> Path:
    """A folder as a user's checkout is: the templates, the module.json and the Dockerfiles."""
    folder = tmp_path / "solution"
    (folder / "module").mkdir(parents=True)
    shutil.copy(REPOSITORY / "module" / "module.json", folder / "module")
    for path in [*REPOSITORY.glob("Dockerfile.*"), *REPOSITORY.glob("deployment*.template.json")]:
        shutil.copy(path, folder)
    values = {"ADDRESS": "registry.example.com", "USERNAME": "puller", "PASSWORD": "hunter2"}
    lines = [f"CONTAINER_REGISTRY_{name}={value}\n" for name, value in values.items()]
    (folder / ".env").write_text("".join(lines))
    return folder


def run_tool(tool: Path, folder: Path, *arguments: str) -> str:
    """Run the tool in a folder; it may not report what it does to its makers."""
    home = folder.parent / "home"
    settings = home / ".iotedgedev" / "setting.ini"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text("[DEFAULT]\nfirsttime = no\ncollect_telemetry = no\n")
    kept = ("PATH", "LANG", "DOCKER_HOST")
    environ = {name: os.environ[name] for name in kept if name in os.environ} | {"HOME": str(home)}
    command = [str(tool), "solution", *arguments]
    ended = subprocess.run(
        command,
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def expand(tool: Path, folder: Path, template: str) -> dict[str, Any]:
    """The deployment that the tool makes of a template; nothing in it may be left to fill in."""
    name = template.removesuffix(".template.json")
    made = folder / "config" / f"{name}.amd64.json"
    made.unlink(missing_ok=True)
    out = run_tool(tool, folder, "genconfig", "-f", template, "-P", "amd64")
    assert "Validation for all createOptions passed" in out
    text = made.read_text()
    assert "${" not in text
    assert "$CONTAINER_REGISTRY" not in text
    document: dict[str, Any] = json.loads(text)
    assert deployment_problems(document) == []
    assert lint_manifest(text.encode(), made.name).errors == 0
    return document


def modules(document: dict[str, Any]) -> dict[str, Any]:
    """All modules of a deployment, system modules included."""
    agent = document["modulesContent"]["$edgeAgent"]["properties.desired"]
    return {**agent["systemModules"], **agent["modules"]}


def built_image(kind: str) -> str:
    """The name that module.json gives the image of a platform."""
    image = json.loads((REPOSITORY / "module" / "module.json").read_text())["image"]
    return f"registry.example.com/visionedge:{image['tag']['version']}-amd64.{kind}"


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_shipped_templates_are_expanded(iotedgedev: Path, solution: Path, kind: str) -> None:
    """The image is the one that the tool builds, createOptions are strings with the same content."""
    template = "deployment.template.json" if kind == "gpu" else "deployment.cpu.template.json"
    document = expand(iotedgedev, solution, template)
    given = modules(json.loads((solution / template).read_text()))
    assert modules(document)["vision"]["settings"]["image"] == built_image(kind)
    for name, module in modules(document).items():
        assert json.loads(module["settings"]["createOptions"]) == given[name]["settings"]["createOptions"]


@pytest.mark.parametrize("gpu", GPUS)
def test_generated_templates_are_expanded(iotedgedev: Path, solution: Path, gpu: Gpu) -> None:
    """With the image that the tool builds, and with another one by digest."""
    built = ManifestRequest(
        gpu=gpu,
        registries={"mine": "$CONTAINER_REGISTRY_ADDRESS"},
        env={"MQTT_PASSWORD": "${CONTAINER_REGISTRY_PASSWORD}", "TZ": "Europe/Berlin"},
        form="template",
    )
    (solution / "built.template.json").write_text(generate_manifest(built, {}).text)
    vision = modules(expand(iotedgedev, solution, "built.template.json"))["vision"]
    assert vision["settings"]["image"] == built_image("cpu" if gpu == "none" else "gpu")
    assert vision["env"]["MQTT_PASSWORD"] == {"value": "hunter2"}
    image = f"$CONTAINER_REGISTRY_ADDRESS/visionedge@sha256:{'0123456789abcdef' * 4}"
    text = generate_manifest(ManifestRequest(image=image, gpu=gpu, form="template"), {}).text
    (solution / "digest.template.json").write_text(text)
    vision = modules(expand(iotedgedev, solution, "digest.template.json"))["vision"]
    assert vision["settings"]["image"] == image.replace("$CONTAINER_REGISTRY_ADDRESS", "registry.example.com")


@pytest.mark.docker
def test_solution_build_builds_the_image_of_the_template(iotedgedev: Path, solution: Path) -> None:
    """It finds the module and gives its image the name that the deployment has. The image is a stand-in."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        pytest.skip("there is no Docker engine")
    (solution / "Dockerfile.cpu").write_text(DOCKERFILE)
    run_tool(iotedgedev, solution, "build", "-f", "deployment.cpu.template.json", "-P", "amd64")
    inspect = ["docker", "image", "rm", built_image("cpu")]
    assert subprocess.run(inspect, capture_output=True, check=False).returncode == 0
