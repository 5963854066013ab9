"""The shipped deployment manifests and module.json: the shapes that edgeAgent and edgeHub take."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import visionedge
from visionedge.config.load import parse_config
from visionedge.outbound.messages import DETECTIONS, EVENTS, SCENE
from visionedge.runtime.memory_requirement import CPU_MEMORY_MIB, GPU_MEMORY_MIB

REPOSITORY = Path(__file__).resolve().parents[3]
TEMPLATES = {"gpu": "deployment.template.json", "cpu": "deployment.cpu.template.json"}


def read(name: str) -> dict[str, Any]:
    """A JSON file of the repository without duplicate keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), f"{name}: a key is given twice among {[k for k, _ in pairs]}"
        return dict(pairs)

    document: dict[str, Any] = json.loads((REPOSITORY / name).read_text(), object_pairs_hook=unique)
    return document


@pytest.fixture(params=sorted(TEMPLATES))
def kind(request: pytest.FixtureRequest) -> str:
    """`cpu` or `gpu`."""
    return str(request.param)


@pytest.fixture
def content(kind: str) -> dict[str, Any]:
    """The modules' content of a template."""
    template = read(TEMPLATES[kind])
    assert template.keys() == {"$schema-template", "modulesContent"}
    assert template["$schema-template"] == "4.0.0"
    modules: dict[str, Any] = template["modulesContent"]
    return modules


@pytest.fixture
def agent(content: dict[str, Any]) -> dict[str, Any]:
    """The desired properties of edgeAgent."""
    desired: dict[str, Any] = content["$edgeAgent"]["properties.desired"]
    return desired


def test_the_schema_version_is_accepted_by_agent_and_hub(
    agent: dict[str, Any], content: dict[str, Any]
) -> None:
    """The agent refuses 1.2; start order and object routes need 1.1. The templates' schema wants hub 1.2."""
    assert agent["schemaVersion"] == "1.1"
    assert content["$edgeHub"]["properties.desired"]["schemaVersion"] == "1.2"


def test_the_system_modules_stay_on_the_working_release_line(agent: dict[str, Any]) -> None:
    """edgeHub 1.6.0 and 1.6.1 lose MQTT connections; the hub listens where modules and leaves expect it."""
    system = agent["systemModules"]
    assert system["edgeAgent"]["settings"]["image"].endswith("azureiotedge-agent:1.6.8")
    assert "startupOrder" not in system["edgeAgent"]
    assert system["edgeHub"]["settings"]["image"].endswith("azureiotedge-hub:1.6.8")
    ports = system["edgeHub"]["settings"]["createOptions"]["HostConfig"]["PortBindings"]
    assert ports == {f"{port}/tcp": [{"HostPort": str(port)}] for port in (5671, 8883, 443)}


def test_the_store_of_the_hub_outlives_its_container(agent: dict[str, Any]) -> None:
    """Its storage folder is a volume, not a path inside the container."""
    hub = agent["systemModules"]["edgeHub"]
    folder = hub["env"]["StorageFolder"]["value"]
    [bind] = hub["settings"]["createOptions"]["HostConfig"]["Binds"]
    assert bind.partition(":")[2] == folder


def test_every_output_has_a_route_and_events_have_priority(content: dict[str, Any]) -> None:
    """Messages without a route are acknowledged and dropped; priority 0 is the highest."""
    hub = content["$edgeHub"]["properties.desired"]
    routed = {}
    for name, route in hub["routes"].items():
        assert re.fullmatch(r"[^.$# ]+", name)
        found = re.fullmatch(r"FROM /messages/modules/vision/outputs/(\w+) INTO \$upstream", route["route"])
        assert found is not None
        assert 0 <= route["priority"] <= 9
        assert 0 <= route["timeToLiveSecs"] <= 4294967295
        routed[found[1]] = route["priority"]
    assert routed.keys() == {DETECTIONS, SCENE, EVENTS}
    assert routed[EVENTS] == 0 < routed[SCENE] < routed[DETECTIONS]
    assert hub["storeAndForwardConfiguration"]["timeToLiveSecs"] > 0


def test_the_module_is_always_running_after_the_hub(agent: dict[str, Any], kind: str) -> None:
    """`on-unhealthy` has no effect in IoT Edge: the module ends itself, the agent starts it again."""
    assert agent["modules"].keys() == {"vision"}
    module = agent["modules"]["vision"]
    assert (module["type"], module["status"], module["restartPolicy"]) == ("docker", "running", "always")
    assert module["startupOrder"] > agent["systemModules"]["edgeHub"]["startupOrder"]
    assert module["settings"]["image"] == f"${{MODULEDIR<./module>.amd64.{kind}}}"


def test_only_the_gpu_manifest_requests_a_gpu(agent: dict[str, Any], kind: str) -> None:
    """A container with DeviceRequests does not even start where there is no GPU, so there are two manifests.

    Capabilities are a list of lists; the flat list is the usual mistake.
    """
    module = agent["modules"]["vision"]
    host = module["settings"]["createOptions"]["HostConfig"]
    if kind == "gpu":
        assert host["DeviceRequests"] == [{"Count": -1, "Capabilities": [["gpu"]]}]
        assert module["env"]["NVIDIA_DISABLE_REQUIRE"] == {"value": "1"}
    else:
        assert "DeviceRequests" not in host
        assert "env" not in module


def test_the_module_runs_with_the_least_privileges(agent: dict[str, Any], kind: str) -> None:
    """Read-only, no capabilities, a limit of memory, a volume for state, rotated logs, local HTTP."""
    options = agent["modules"]["vision"]["settings"]["createOptions"]
    host = options["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert host["Init"] is True  # else what `docker exec` leaves behind stays a zombie
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["Memory"] == {"cpu": CPU_MEMORY_MIB, "gpu": GPU_MEMORY_MIB}[kind] * 2**20
    assert "/tmp" in host["Tmpfs"]  # noqa: S108 - a path inside the container
    assert [bind.partition(":")[2] for bind in host["Binds"]] == ["/data"]
    assert host["LogConfig"]["Config"].keys() == {"max-size", "max-file"}
    assert host["PortBindings"].keys() == options["ExposedPorts"].keys() == {"8080/tcp"}
    assert all(p["HostIp"] == "127.0.0.1" for ports in host["PortBindings"].values() for p in ports)
    # The agent joins the module to its network only where the options leave networks alone.
    assert "NetworkingConfig" not in options
    assert "NetworkMode" not in host
    assert "Privileged" not in host


def test_create_options_are_objects_and_small_enough(agent: dict[str, Any]) -> None:
    """In a template they are objects; as the string of a manifest each fits into 4 KB of the twin."""
    for module in [*agent["systemModules"].values(), *agent["modules"].values()]:
        options = module["settings"]["createOptions"]
        assert isinstance(options, dict)
        assert len(json.dumps(options)) < 4096


def test_the_example_twin_is_a_valid_configuration(content: dict[str, Any]) -> None:
    """Desired properties are the configuration, so the shipped ones pass its schema."""
    config = parse_config(content["vision"]["properties.desired"])
    assert config.cameras
    assert len(json.dumps(content["vision"])) < 32_768


def test_the_manifests_contain_no_secret(content: dict[str, Any], agent: dict[str, Any]) -> None:
    """Credentials come from the environment of the user who generates the manifest."""
    for registry in agent["runtime"]["settings"]["registryCredentials"].values():
        assert all(value.startswith("$CONTAINER_REGISTRY_") for value in registry.values())
    assert "SharedAccessKey" not in json.dumps(content)


def test_the_two_manifests_differ_only_in_what_a_gpu_needs() -> None:
    """Every fix must be in both."""
    gpu, cpu = (json.dumps(read(TEMPLATES[kind]), sort_keys=True) for kind in ("gpu", "cpu"))
    request = '"DeviceRequests": [{"Capabilities": [["gpu"]], "Count": -1}], '
    env = '"env": {"NVIDIA_DISABLE_REQUIRE": {"value": "1"}}, '
    memory = {mib: f'"Memory": {mib * 2**20},' for mib in (GPU_MEMORY_MIB, CPU_MEMORY_MIB)}
    made = gpu.replace(request, "").replace(env, "").replace("amd64.gpu", "amd64.cpu")
    made = made.replace(memory[GPU_MEMORY_MIB], memory[CPU_MEMORY_MIB])
    assert made.replace('"device": "auto"', '"device": "cpu"') == cpu


def test_module_json_names_the_dockerfiles_and_the_version() -> None:
    """Its platforms are those of the manifests; the build context is the repository."""
    module = read("module/module.json")
    image = module["image"]
    assert module["$schema-version"] == "0.0.1"
    assert module["language"] == "python"
    assert image["tag"]["version"] == visionedge.__version__
    assert image["tag"]["platforms"].keys() >= {f"amd64.{kind}" for kind in TEMPLATES}
    folder = REPOSITORY / "module"
    assert (folder / image["contextPath"]).resolve() == REPOSITORY
    for kind in TEMPLATES:
        assert (
            folder / image["tag"]["platforms"][f"amd64.{kind}"]
        ).resolve() == REPOSITORY / f"Dockerfile.{kind}"
        assert (REPOSITORY / f"Dockerfile.{kind}").is_file()
