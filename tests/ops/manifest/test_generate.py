"""`visionedge manifest generate`: deployments, templates and layers without lint findings."""

import itertools
import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from command_line import CommandLine
from manifests import fresh_known_secrets
from repository_paths import REPOSITORY
from visionedge.config.load import parse_config
from visionedge.ops.manifest.lint import lint_manifest
from visionedge.runtime.memory_requirement import CPU_MEMORY_MIB, GPU_MEMORY_MIB, MORE_MODEL_MIB

__all__ = ["fresh_known_secrets"]

IMAGE = "registry.example.com/visionedge:1.0"
SECRETS = {
    "CONTAINER_REGISTRY_USERNAME": "puller",
    "CONTAINER_REGISTRY_PASSWORD": "hunter2222",
    "CONTAINER_REGISTRY_USERNAME_a": "puller-a",
    "CONTAINER_REGISTRY_PASSWORD_a": "hunter3333",
    "CONTAINER_REGISTRY_USERNAME_b": "puller-b",
    "CONTAINER_REGISTRY_PASSWORD_b": "hunter4444",
    "VISIONEDGE_HTTP_TOKEN": "hunter5555",
    "DOCK_PASSWORD": "hunter6666",
}
DOCUMENTED = {
    "deployment.template.json": ("--gpu", "gpu-pv"),
    "deployment.cpu.template.json": (),
}
REGISTRY = ("--registry", "visionedge=$CONTAINER_REGISTRY_ADDRESS")


@pytest.fixture
def visionedge(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Calls the command line in this process."""
    return CommandLine(capsys)


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment in which all placeholders have a value."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    """A configuration file with a bit of everything."""
    path = tmp_path / "vision.yaml"
    path.write_text(
        "cameras:\n"
        "  usb: {uri: 'v4l2:///dev/video0', priority: 2}\n"
        "  yard: {uri: 'https://192.0.2.6/yard.mjpg', fps: 2.5, gate: {}}\n"
        "inference: {classes: [person]}\n"
        "http: {host: 127.0.0.1, port: 9000}\n"
    )
    return path


def vision(text: str, module: str = "vision") -> dict[str, Any]:
    """The desired properties of the module."""
    document = json.loads(text)
    content = document.get("content", document)["modulesContent"]
    desired: dict[str, Any] = content[module]["properties.desired"]
    return desired


def options(text: str) -> dict[str, Any]:
    """The createOptions of the module `vision`."""
    agent = json.loads(text)["modulesContent"]["$edgeAgent"]["properties.desired"]
    found: dict[str, Any] = json.loads(agent["modules"]["vision"]["settings"]["createOptions"])
    return found


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_the_shipped_templates_are_what_generate_makes(visionedge: CommandLine, name: str) -> None:
    """Byte for byte, with the arguments that docs/iot-edge.md gives."""
    outcome = visionedge("manifest", "generate", "--template", *DOCUMENTED[name], *REGISTRY)
    assert outcome.out == (REPOSITORY / name).read_text()
    assert outcome.err == ""
    words = " ".join(("visionedge manifest generate --template", *DOCUMENTED[name]))
    assert words in (REPOSITORY / "docs" / "iot-edge.md").read_text()


FORMS = [(), ("--template",), ("--layered",)]
GPUS = ["none", "dda", "gpu-pv", "gpu-pv-by-hand"]
ONE = ("--registry", "a=registry.example.com")
REGISTRIES = [(), ONE, (*ONE, "--registry", "b=b.example.com")]
PUBLISHED = [(), ("--http", "0.0.0.0:80"), ("--no-http",)]


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gpu", GPUS)
def test_a_generated_manifest_has_no_findings(
    visionedge: CommandLine, configuration: Path, form: tuple[str, ...], gpu: str
) -> None:
    """Neither an error nor a warning, for any combination of options."""
    image = () if form == ("--template",) else ("--image", f"{IMAGE}-{'cpu' if gpu == 'none' else 'gpu'}")
    camera = ("--camera", "dock=rtsp://me:${DOCK_PASSWORD}@192.0.2.5/stream1")
    if form == ("--template",):
        camera = ("--camera", "dock=rtsp://${DOCK_USER}:${DOCK_PASSWORD}@192.0.2.5/stream1")
    cameras = [(), camera, ("--config", str(configuration)), ("--config", str(configuration), *camera)]
    registries = REGISTRIES[:1] if form == ("--layered",) else REGISTRIES
    ids = itertools.cycle([(), ("--module-id", "dock-camera_2")])
    for rest in itertools.product(cameras, registries, PUBLISHED):
        arguments = (*form, *image, "--gpu", gpu, *itertools.chain(*rest), *next(ids))
        outcome = visionedge("manifest", "generate", *arguments)
        assert outcome.code == 0, outcome.err
        report = lint_manifest(outcome.out.encode(), "deployment.json")
        assert report.findings == (), arguments
        assert len(report.modules) == 1


OPENVINO = {
    "GPU-PV": ("--device", "openvino-gpu"),
    "Linux": ("--gpu", "dri", "--render-group", "992"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("host", OPENVINO)
def test_a_manifest_for_an_intel_gpu_has_no_findings(
    visionedge: CommandLine, form: tuple[str, ...], host: str
) -> None:
    """It belongs to the CPU image, and requests nothing from an NVIDIA runtime."""
    image = () if form == ("--template",) else ("--image", f"{IMAGE}-cpu")
    outcome = visionedge("manifest", "generate", *form, *image, *OPENVINO[host])
    assert (outcome.code, outcome.err) == (0, "")
    report = lint_manifest(outcome.out.encode(), "deployment.json")
    assert report.findings == ()
    assert "DeviceRequests" not in outcome.out
    assert '"device": "openvino-gpu"' in outcome.out
    assert "amd64.gpu" not in outcome.out


def test_an_intel_gpu_on_linux_gets_its_render_nodes_and_their_group(visionedge: CommandLine) -> None:
    """The group of a video device comes on top."""
    command = ("manifest", "generate", "--image", IMAGE, *OPENVINO["Linux"])
    host = options(visionedge(*command, "--camera", "usb=v4l2:///dev/video0").out)["HostConfig"]
    assert [device["PathOnHost"] for device in host["Devices"]] == ["/dev/dri", "/dev/video0"]
    assert host["GroupAdd"] == ["992", "video"]


def test_an_intel_gpu_by_gpu_pv_gets_the_device_and_the_libraries_of_windows(visionedge: CommandLine) -> None:
    host = options(visionedge("manifest", "generate", "--image", IMAGE, *OPENVINO["GPU-PV"]).out)[
        "HostConfig"
    ]
    assert [device["PathOnHost"] for device in host["Devices"]] == ["/dev/dxg"]
    assert "/usr/lib/wsl:/usr/lib/wsl:ro" in host["Binds"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--device", "openvino-gpu", "--gpu", "dda"), "--gpu dda: openvino-gpu needs gpu-pv-by-hand"),
        (("--device", "openvino-gpu", "--gpu", "none"), "--gpu none: openvino-gpu needs gpu-pv-by-hand"),
        (("--gpu", "dri"), "stat -c %g /dev/dri/renderD128"),
        (("--gpu", "dri", "--render-group", "render"), "--render-group: name the number"),
        (("--gpu", "dri", "--render-group", "992", "--device", "cuda"), "not for cuda"),
        (("--render-group", "992"), "belongs to --gpu dri"),
    ],
)
def test_options_of_a_gpu_that_do_not_fit_together_are_refused(
    visionedge: CommandLine, arguments: tuple[str, ...], complaint: str
) -> None:
    outcome = visionedge("manifest", "generate", "--image", IMAGE, *arguments)
    assert outcome.code == 2
    assert complaint in outcome.complaints[0]


def test_a_layer_sets_its_sections_and_leaves_the_others_to_the_device(
    visionedge: CommandLine, tmp_path: Path
) -> None:
    """`properties.desired` as a whole would delete the cameras of the device's own twin."""
    settings = tmp_path / "shared.yaml"
    settings.write_text("{log: {level: warning}, x-site: {}}")
    arguments = ("manifest", "generate", "--layered", "--image", IMAGE, "--config")
    content = json.loads(visionedge(*arguments, settings).out)["content"]["modulesContent"]
    assert content["vision"] == {"properties.desired.log": {"level": "warning"}}
    settings.write_text("{}")
    content = json.loads(visionedge(*arguments, settings).out)["content"]["modulesContent"]
    assert "vision" not in content


def test_cameras_become_desired_properties(visionedge: CommandLine) -> None:
    """In place of the bundled clip; the rest is as in the shipped templates."""
    outcome = visionedge("manifest", "generate", "--image", IMAGE, "--camera", "dock=rtsp://192.0.2.5/a")
    desired = vision(outcome.out)
    assert desired["cameras"] == {"dock": {"uri": "rtsp://192.0.2.5/a"}}
    assert parse_config(desired).telemetry.mode == "changes"
    assert outcome.err == ""


def test_a_configuration_becomes_desired_properties(visionedge: CommandLine, configuration: Path) -> None:
    """With the cameras of the command line beside its own; a loopback address would lock everybody out."""
    outcome = visionedge(
        *("manifest", "generate", "--image", IMAGE, "--config", configuration, "--camera", "dock=demo:")
    )
    desired = vision(outcome.out)
    assert set(desired["cameras"]) == {"usb", "yard", "dock"}
    assert desired["http"] == {"port": 9000}
    assert "http.host" in outcome.complaints[0]
    host = options(outcome.out)["HostConfig"]
    assert host["PortBindings"] == {"9000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8080"}]}
    assert host["Devices"][0]["PathOnHost"] == "/dev/video0"
    assert host["GroupAdd"] == ["video"]


@pytest.mark.usefixtures("secrets")
def test_placeholders_are_filled_from_the_environment(visionedge: CommandLine) -> None:
    """Passwords come neither from the command line nor from a file; a note names where they are stored."""
    outcome = visionedge(
        *("manifest", "generate", "--image", IMAGE, "--registry", "mine=r.example.com"),
        *("--camera", "dock=rtsp://me:${DOCK_PASSWORD}@192.0.2.5/"),
    )
    assert "hunter2222" in outcome.out
    assert "rtsp://me:hunter6666@192.0.2.5/" in outcome.out
    assert "hunter" not in outcome.err
    assert "VISIONEDGE_CONFIG" in outcome.complaints[0]


@pytest.mark.usefixtures("secrets")
def test_http_for_other_machines_has_the_token_of_the_configuration_else_of_the_environment(
    visionedge: CommandLine, tmp_path: Path
) -> None:
    outcome = visionedge("manifest", "generate", "--image", IMAGE, "--http", "0.0.0.0:80")
    assert vision(outcome.out)["http"] == {"token": "hunter5555"}
    path = tmp_path / "vision.json"
    path.write_text('{"cameras": {"a": {"uri": "demo:"}}, "http": {"token": "own-token"}}')
    outcome = visionedge("manifest", "generate", "--image", IMAGE, "--http", "0.0.0.0:80", "--config", path)
    assert vision(outcome.out)["http"] == {"token": "own-token"}


def test_without_a_token_the_module_makes_one_and_a_note_says_so(
    visionedge: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VISIONEDGE_HTTP_TOKEN", raising=False)
    outcome = visionedge("manifest", "generate", "--image", IMAGE, "--http", "0.0.0.0:80")
    assert outcome.code == 0
    assert "http" not in vision(outcome.out)
    assert any("docker exec vision visionedge token" in line for line in outcome.err.splitlines())


def test_a_missing_variable_is_reported(visionedge: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them at once; nothing is written."""
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    outcome = visionedge("manifest", "generate", "--image", IMAGE, "--registry", "mine=r.example.com")
    assert outcome.code == 2
    assert outcome.out == ""
    assert [line.split()[5].strip(";") for line in outcome.complaints] == [
        "CONTAINER_REGISTRY_PASSWORD",
        "CONTAINER_REGISTRY_USERNAME",
    ]


BAD: list[tuple[tuple[str, ...], str]] = [
    ((), "--image"),
    (("--image", IMAGE, "--gpu", "tpu"), "--gpu"),
    (("--image", IMAGE, "--camera", "Dock=demo:"), "--camera"),
    (("--image", IMAGE, "--camera", "dock=gopher://me:hunter7777@h/"), "cameras.dock.uri"),
    (("--image", IMAGE, "--registry", "r.example.com"), "--registry"),
    (("--image", IMAGE, "--registry", "a=x", "--registry", "a=y"), "--registry a"),
    (("--image", IMAGE, "--layered", "--registry", "a=x"), "--registry"),
    (("--image", IMAGE, "--layered", "--template"), "not allowed"),
    (("--image", IMAGE, "--http", "eighty"), "--http"),
    (("--image", IMAGE, "--http", "127.0.0.1:70000"), "invalid port"),
    (("--image", IMAGE, "--http", "localhost:8080"), "invalid address"),
    (("--image", IMAGE, "--module-id", "a.b"), "not a valid module name"),
    (("--image", IMAGE, "--runtime", "1.6.1"), "MQTT"),
    (("--image", "vision edge"), "not a valid image name"),
    (("--image", IMAGE, "--config", "no-such.yaml"), "no-such.yaml"),
]


DIGEST = f"sha256:{'0123456789abcdef' * 4}"
BAD += [
    (("--image", IMAGE, "--memory", "512 apples"), "write a size such as 768m"),
    (("--image", IMAGE, "--memory", "0"), "write a size"),
    (("--image", IMAGE, "--memory", "0.5g"), "write a size"),
    (("--image", IMAGE, "--memory", "128m"), "does not start"),
    (("--image", IMAGE, "--cpus", "0"), "--cpus"),
    (("--image", IMAGE, "--cpus", "nan"), "--cpus"),
    (("--image", IMAGE, "--pids", "1.5"), "--pids"),
    (("--image", IMAGE, "--pids", "10"), "too low"),
    (("--image", IMAGE, "--env", "=hunter7777"), "--env: write NAME=VALUE"),
    (("--image", IMAGE, "--env", "A B=hunter7777"), "--env: write NAME=VALUE"),
    (("--image", IMAGE, "--env", "A=hunter7777\n"), "--env A: the value has control characters"),
    (("--image", IMAGE, "--env", "A=hunter7777", "--env", "A=2"), "--env A: the name is given twice"),
    (("--image", IMAGE, "--env", "NO_SUCH_VARIABLE"), "the environment has no NO_SUCH_VARIABLE"),
    (("--image", IMAGE, "--env", "VISIONEDGE_LOG_LEVEL=loud"), "log.level"),
    (("--image", IMAGE, "--dns", "dns.example.com"), "is not an IP address"),
    (("--image", IMAGE, "--label", "site"), "--label 'site': write NAME=VALUE"),
    (("--image", IMAGE, "--label", "a=1", "--label", "a=2"), "--label a: the name is given twice"),
    (("--image", IMAGE, "--digest", "sha256:0f3a"), "64 digits"),
    (("--image", f"{IMAGE}@{DIGEST}", "--digest", DIGEST), "--digest: belongs to an --image without one"),
    (("--template", "--digest", DIGEST), "--digest: belongs to an --image"),
]
BAD += [
    (("--image", IMAGE, "--bind", bind), words)
    for bind, words in [
        ("models:/models", "must be absolute"),
        ("/srv/models:models:ro", "must be absolute"),
        ("/srv/../models:/models", "must be absolute"),
        ("//srv/models:/models", "must be absolute"),
        ("/srv/models", "write HOST:CONTAINER"),
        ("/srv/models:/models:ro:z", "write HOST:CONTAINER"),
        ("/srv/models:/models:read", "write HOST:CONTAINER"),
        ("/srv/models:/", "is already used in the container"),
        ("/srv/models:/data/", "is already used in the container"),
        ("/srv/a\nb:/models", "must be absolute"),
    ]
]


@pytest.mark.parametrize(("arguments", "word"), BAD)
def test_wrong_arguments_give_a_one_line_error(
    visionedge: CommandLine, arguments: tuple[str, ...], word: str
) -> None:
    """And exit 2, without a manifest and without a secret."""
    outcome = visionedge("manifest", "generate", *arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert word in outcome.complaints[0]
    assert "hunter7777" not in outcome.err


def test_the_container_is_limited_to_what_the_module_needs(visionedge: CommandLine) -> None:
    """So that a leak ends the module and not edgeHub; another limit or none can be chosen."""
    command = ("manifest", "generate", "--image", IMAGE)
    limits = {
        (): {"Memory": CPU_MEMORY_MIB * 2**20},
        ("--gpu", "dda"): {"Memory": GPU_MEMORY_MIB * 2**20},
        ("--memory", "none"): {},
        ("--memory", "1G"): {"Memory": 2**30},
        ("--memory", "805306368", "--cpus", "1.5", "--pids", "256"): {
            "Memory": 805306368,
            "NanoCpus": 1_500_000_000,
            "PidsLimit": 256,
        },
    }
    for arguments, expected in limits.items():
        outcome = visionedge(*command, *arguments)
        assert (outcome.code, outcome.err) == (0, "")
        host = options(outcome.out)["HostConfig"]
        assert {k: host[k] for k in ("Memory", "NanoCpus", "PidsLimit") if k in host} == expected


def test_each_further_model_raises_the_limit(visionedge: CommandLine, tmp_path: Path) -> None:
    """The limit that lint recommends, too."""
    config = tmp_path / "vision.yaml"
    config.write_text("models: {a: {path: /data/a.onnx}, b: {path: /data/b.onnx}}\n")
    command = ("manifest", "generate", "--image", IMAGE, "--config", config)
    outcome = visionedge(*command)
    needed_mib = CPU_MEMORY_MIB + 2 * MORE_MODEL_MIB
    assert options(outcome.out)["HostConfig"]["Memory"] == needed_mib * 2**20
    assert "recommended" not in outcome.err
    outcome = visionedge(*command, "--memory", f"{needed_mib - 1}m")
    assert any(f"{needed_mib} MiB are recommended" in line for line in outcome.complaints)


def test_a_limit_below_the_need_is_reported(visionedge: CommandLine) -> None:
    """And written all the same."""
    outcome = visionedge("manifest", "generate", "--image", IMAGE, "--memory", "512m", "--pids", "32")
    assert outcome.code == 0
    assert options(outcome.out)["HostConfig"]["Memory"] == 512 * 2**20
    assert ["768 MiB are recommended" in outcome.complaints[0], "each thread" in outcome.complaints[1]] == [
        True
    ] * 2


def module(text: str) -> dict[str, Any]:
    """The module `vision` of edgeAgent."""
    agent = json.loads(text)["modulesContent"]["$edgeAgent"]["properties.desired"]
    found: dict[str, Any] = agent["modules"]["vision"]
    return found


@pytest.mark.usefixtures("secrets")
def test_variables_dns_and_labels_reach_the_module(visionedge: CommandLine, tmp_path: Path) -> None:
    """A secret comes from the environment, is never printed, and makes the file its owner's only."""
    path = tmp_path / "deployment.json"
    given = ("--gpu", "gpu-pv", "--env", "TZ=Europe/Berlin", "--env", "DOCK_PASSWORD", "--env", "EMPTY=")
    more = ("--dns", "192.0.2.53", "--dns", "2001:db8::53", "--label", "site=hall 4")
    outcome = visionedge("manifest", "generate", "--image", IMAGE, *given, *more, "-o", path)
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert module(path.read_text())["env"] == {
        "NVIDIA_DISABLE_REQUIRE": {"value": "1"},
        "TZ": {"value": "Europe/Berlin"},
        "DOCK_PASSWORD": {"value": "hunter6666"},
        "EMPTY": {"value": ""},
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = options(path.read_text())
    assert found["Labels"] == {"site": "hall 4"}
    assert found["HostConfig"]["Dns"] == ["192.0.2.53", "2001:db8::53"]


def test_a_template_keeps_a_variable_of_the_environment(visionedge: CommandLine, tmp_path: Path) -> None:
    """Its value would be stored and shared."""
    path = tmp_path / "deployment.template.json"
    outcome = visionedge("manifest", "generate", "--template", "--env", "MQTT_PASSWORD", "-o", path)
    assert (outcome.code, outcome.err) == (0, "")
    assert module(path.read_text())["env"]["MQTT_PASSWORD"] == {"value": "${MQTT_PASSWORD}"}
    assert stat.S_IMODE(path.stat().st_mode) != 0o600
    outcome = visionedge("manifest", "generate", "--template", "--env", "MQTT_PASSWORD=hunter7777")
    assert "contains a secret in plain text" in outcome.err
    assert "hunter7777" not in outcome.err


@pytest.mark.parametrize("form", ["--template", "--layered", "--force"])
def test_an_image_can_be_given_by_digest(visionedge: CommandLine, form: str) -> None:
    """In every form."""
    outcome = visionedge("manifest", "generate", form, "--image", IMAGE, "--digest", DIGEST)
    assert (outcome.code, outcome.err) == (0, "")
    assert f'"image": "{IMAGE}@{DIGEST}"' in outcome.out


def test_folders_of_the_host_are_bound_into_the_module(visionedge: CommandLine) -> None:
    """Behind the volume of its state, and two never at one place."""
    first, second = "/srv/models:/models:ro", "/srv/ca.pem:/config/ca.pem"
    command = ("manifest", "generate", "--image", IMAGE, "--gpu", "gpu-pv-by-hand")
    outcome = visionedge(*command, "--bind", first, "--bind", second)
    assert (outcome.code, outcome.err) == (0, "")
    binds = options(outcome.out)["HostConfig"]["Binds"]
    assert binds[1:] == ["visionedge-data:/data", first, second]
    for taken in ("/models/", "/usr/lib/wsl"):
        outcome = visionedge(*command, "--bind", first, "--bind", f"/srv/other:{taken}")
        assert outcome.code == 2
        assert f"{taken} is already used in the container" in outcome.complaints[0]


@pytest.mark.parametrize("path", ["best.onnx", "/models/best.onnx"])
def test_a_model_that_is_not_mounted_gives_a_warning_with_the_mount_option(
    visionedge: CommandLine, tmp_path: Path, path: str
) -> None:
    """Else the device rejects the section, and the bundled model computes instead."""
    configuration = tmp_path / "vision.yaml"
    configuration.write_text(f"cameras: {{a: {{uri: 'demo:'}}}}\nmodel: {{path: {path}}}\n")
    outcome = visionedge("manifest", "generate", "--image", IMAGE, "--config", configuration)
    assert outcome.code == 0
    assert "model.path" in outcome.complaints[0]
    assert "--bind FOLDER:FOLDER:ro" in outcome.complaints[0]
    bound = ("--config", configuration, "--bind", "/srv/models:/models:ro")
    outcome = visionedge("manifest", "generate", "--image", IMAGE, *bound)
    assert [path in line for line in outcome.complaints] == ([True] if path == "best.onnx" else [])


def test_yaml_anchor_keys_are_not_put_into_the_twin(visionedge: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "vision.yaml"
    path.write_text("x-a: &a {fps: 2}\nx-b: '${NO_SUCH}'\ncameras: {hall: {<<: *a, uri: 'demo:'}}\n")
    outcome = visionedge("manifest", "generate", "--image", IMAGE, "--config", path)
    assert outcome.code == 0
    assert vision(outcome.out) == {"cameras": {"hall": {"fps": 2, "uri": "demo:"}}}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("cameras: [a]\nhttp: 5\n", "cameras"),
        ("http: {port: 0}\n", "http.port"),
        ("model: {allowInsecure: true}\n", "model.allowInsecure"),
        ("telemetry: {mode: some}\n", "telemetry.mode"),
        ("inference: {classes: [" + ", ".join(f"label-{i:05d}" for i in range(4000)) + "]}\n", "32768"),
    ],
)
def test_a_configuration_too_large_for_a_twin_is_refused(
    visionedge: CommandLine, tmp_path: Path, text: str, word: str
) -> None:
    """With its problems, and exit 2."""
    path = tmp_path / "vision.yaml"
    path.write_text(text)
    outcome = visionedge("manifest", "generate", "--image", IMAGE, "--config", path)
    assert outcome.code == 2
    assert outcome.out == ""
    assert any(word in line for line in outcome.complaints)


@pytest.mark.usefixtures("secrets")
def test_a_file_is_written_atomically_and_never_overwrites_another(
    visionedge: CommandLine, tmp_path: Path
) -> None:
    """Without --force; with passwords in it, it is its owner's only."""
    path = tmp_path / "deployment.json"
    command = ("manifest", "generate", "--image", IMAGE, "-o", str(path))
    outcome = visionedge(*command)
    assert (outcome.code, outcome.out) == (0, "")
    first = path.read_text()
    outcome = visionedge(*command, "--camera", "dock=demo:")
    assert outcome.code == 2
    assert "--force" in outcome.complaints[0]
    assert path.read_text() == first
    assert visionedge(*command, "--camera", "dock=demo:", "--force").code == 0
    assert path.read_text() != first
    assert visionedge(*command, "--registry", "a=r.example.com", "--force").code == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["deployment.json"]


@pytest.mark.parametrize("target", ["absent/deployment.json", "folder", "a\0b", "x" * 300, "folder/.."])
def test_an_unwritable_file_gives_a_one_line_error(
    visionedge: CommandLine, tmp_path: Path, target: str
) -> None:
    """Exit 1, and no file is left."""
    (tmp_path / "folder").mkdir()
    outcome = visionedge("manifest", "generate", "--image", IMAGE, "-o", tmp_path / target, "--force")
    assert outcome.code == 1
    assert "cannot be written" in outcome.complaints[0]
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("arguments", [("manifest",), ("manifest", "generate"), ("manifest", "lint")])
def test_help_has_examples_and_exit_codes(visionedge: CommandLine, arguments: tuple[str, ...]) -> None:
    """With examples and exit codes."""
    outcome = visionedge(*arguments, "--help")
    assert outcome.code == 0
    assert "examples:" in outcome.out
    assert "exit codes" in outcome.out


def test_every_option_is_documented(visionedge: CommandLine) -> None:
    """docs/iot-edge.md has the options of generate and of lint."""
    text = (REPOSITORY / "docs" / "iot-edge.md").read_text()
    help_text = "".join(
        visionedge("manifest", subcommand, "--help").out for subcommand in ("generate", "lint")
    )
    options = set(re.findall(r"^  (?:-\w \w+, )?(--[a-z-]+)", help_text, re.MULTILINE)) - {"--log-level"}
    assert {"--image", "--gpu", "--module", "--json"} <= options
    assert [option for option in sorted(options) if option not in text] == ["--output"]
