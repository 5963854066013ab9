"""`visionedge manifest lint`: every problem of a deployment manifest, with its place and its remedy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import CommandLine
from manifests import (
    AGENT,
    FAULTS,
    HOST,
    HUB,
    IN_HUB,
    IN_MODULE,
    IN_OPTIONS,
    IN_VISION,
    MODULE,
    NOTHING,
    VISION,
    Manifest,
    change,
    finding_places,
    fresh_known_secrets,
    lint,
    valid_manifest,
    value_at,
)
from repository_paths import REPOSITORY
from visionedge.errors import ConfigError
from visionedge.ops.manifest.generate import ManifestRequest, generate_manifest
from visionedge.ops.manifest.lint import MAX_TWIN_BYTES, lint_manifest

__all__ = ["fresh_known_secrets"]


@pytest.fixture
def visionedge(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Calls the command line in this process."""
    return CommandLine(capsys)


@pytest.mark.parametrize("name", ["deployment.template.json", "deployment.cpu.template.json"])
def test_the_shipped_templates_have_no_findings(visionedge: CommandLine, name: str) -> None:
    """Neither an error nor a warning."""
    outcome = visionedge("manifest", "lint", REPOSITORY / name)
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1].endswith(f"{name}: no problems")


@pytest.mark.parametrize(
    ("path", "value", "severity", "place", "word"), [c[1:] for c in FAULTS], ids=[c[0] for c in FAULTS]
)
def test_a_problem_is_reported_at_its_path_with_a_remedy(
    path: tuple[Any, ...], value: Any, severity: str, place: str, word: str
) -> None:
    """With the severity that it has, and a word that helps."""
    report = lint(change(valid_manifest(), path, value))
    found = [f for f in report.findings if (f.severity, f.path) == (severity, place)]
    assert found, [finding.line() for finding in report.findings]
    assert any(word in finding.line() for finding in found)
    assert all(finding.remedy for finding in report.findings)


ROUTES = [
    ("FROM /messages/modules/vision/outputs/detections INTO $upstream", None),
    ("select * from /messages/* where cameras = 'a (b' into $Upstream", None),
    ('FROM /* WHERE $body.frames[0].camera = "dock" INTO $upstream', None),
    ("FROM /messages/modules/Vision/* INTO BrokeredEndpoint('/modules/vision/inputs/frames')", None),
    ("FROM /twinChangeNotifications INTO $upstream", None),
    ("", "is not a valid route"),
    ("INTO $upstream", "is not a valid route"),
    ("FROM /messages/modules/vision/outputs/detections", "is not a valid route"),
    ("FROM messages/* INTO $upstream", "is not a valid route"),
    ("FROM /messages/* INTO upstream", "has no valid sink"),
    ("FROM /messages/* INTO $downstream", "has no valid sink"),
    ('FROM /messages/* INTO BrokeredEndpoint("/modules/vision")', "has no valid sink"),
    ("FROM /messages/* WHERE a = 'b INTO $upstream", "unclosed quote"),
    ("FROM /messages/* WHERE (a = 'b' INTO $upstream", "unclosed quote or bracket"),
    ("FROM /messages/modules/press/outputs/x INTO $upstream", "no module press"),
    ('FROM /messages/* INTO BrokeredEndpoint("/modules/press/inputs/x")', "no module press"),
    ("FROM /messages/modules/vision/outputs/frames INTO $upstream", "no output frames"),
    ('FROM /messages/* INTO BrokeredEndpoint("/modules/vision/inputs/pictures")', "no input pictures"),
    ("FROM /messages/modules/vision/inputs/frames INTO $upstream", "no inputs as a source"),
    ("FROM /nowhere INTO $upstream", "there is no source"),
]


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize(("route", "problem"), ROUTES)
def test_a_route_is_read_as_edge_hub_reads_it(route: str, problem: str | None, as_object: bool) -> None:
    """As a text or an object, in any case; routes without a source or a target are reported."""
    manifest = valid_manifest()
    value_at(manifest, HUB)["routes"]["extra"] = {"route": route, "priority": 9} if as_object else route
    report = lint(manifest)
    if problem is None:
        assert report.findings == ()
    else:
        (finding,) = report.findings
        assert finding.path == f"{IN_HUB}.routes.extra" + (".route" if as_object else "")
        assert problem in finding.problem


@pytest.mark.parametrize(
    ("route", "place"),
    [
        ({"route": "FROM /* INTO $upstream", "priority": 10}, "routes.a.priority"),
        ({"route": "FROM /* INTO $upstream", "timeToLiveSecs": 2**32}, "routes.a.timeToLiveSecs"),
        ({"priority": 1}, "routes.a.route"),
        (["FROM /* INTO $upstream"], "routes.a"),
        (None, "routes.a"),
    ],
)
def test_the_number_and_length_of_routes_are_limited(route: Any, place: str) -> None:
    """Priority 0 to 9, a time of 32 bits, and a text in any case."""
    manifest = change(valid_manifest(), (*HUB, "routes", "a"), route)
    assert finding_places(lint(manifest)) == {("error", f"{IN_HUB}.{place}")}


def test_an_object_route_needs_schema_1_1() -> None:
    """Under 1.0 edgeHub takes texts only."""
    report = lint(change(valid_manifest(), (*HUB, "schemaVersion"), "1.0"))
    assert finding_places(report) == {
        ("error", f"{IN_HUB}.routes.vision{output}") for output in ("Events", "Scene", "Detections")
    }


def test_a_module_that_sends_only_events_needs_no_route_for_detections() -> None:
    """With telemetry.mode none."""
    manifest = change(valid_manifest(), (*VISION, "telemetry", "mode"), "none")
    del value_at(manifest, HUB)["routes"]["visionDetections"]
    assert lint(manifest).findings == ()


def test_a_module_without_zones_and_lines_needs_no_route_for_scene() -> None:
    """As far as its twin tells; with one of them the absence is named."""
    manifest = valid_manifest()
    del value_at(manifest, HUB)["routes"]["visionScene"]
    assert lint(manifest).findings == ()
    cameras = value_at(manifest, VISION)["cameras"]
    cameras[next(iter(cameras))]["lines"] = {"door": {"start": [0.5, 0.2], "end": [0.5, 0.8]}}
    (finding,) = lint(manifest).findings
    assert (finding.severity, finding.path) == ("warning", f"{IN_HUB}.routes")
    assert "outputs/scene" in finding.remedy


def test_create_options_may_be_split_into_consecutive_parts() -> None:
    """createOptions, createOptions01, …; a gap is an error, a piece above 512 characters a warning."""
    manifest = valid_manifest()
    settings_ = value_at(manifest, (*MODULE, "settings"))
    text = json.dumps(settings_.pop("createOptions"))
    cut = [text[i : i + 100] for i in range(0, len(text), 100)]
    settings_ |= {f"createOptions{i:02d}" if i else "createOptions": piece for i, piece in enumerate(cut)}
    assert lint(manifest).findings == ()
    settings_["createOptions42"] = settings_.pop("createOptions01")
    assert ("error", f"{IN_MODULE}.settings.createOptions42") in finding_places(lint(manifest))
    settings_ |= {key: NOTHING for key in list(settings_) if key.startswith("createOptions")}
    value_at(manifest, MODULE)["settings"] = {
        "image": settings_["image"],
        "createOptions": text[:-1].ljust(600),
        "createOptions01": text[-1],
    }
    assert finding_places(lint(manifest)) == {("warning", IN_OPTIONS)}


def test_create_options_may_be_an_object_only_in_templates() -> None:
    """A deployment has a text there; a template may have either."""
    manifest = valid_manifest()
    data = json.dumps(manifest).encode()
    assert ("error", IN_OPTIONS) in finding_places(lint_manifest(data, "deployment.json"))
    assert lint_manifest(data, "deployment.template.json").findings == ()


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("x" * 4097, "4097 bytes"),
        (2**52, "52 bits"),
        ([1, None], "null in a list"),
        ({"a.b": 1}, "name that a twin cannot store"),
        ({"a b": 1}, "name that a twin cannot store"),
        ({"$a": 1}, "name that a twin cannot store"),
        ({"k" * 1025: 1}, "1025 bytes"),
        ({"x\x07": 1}, "name that a twin cannot store"),
        ({str(i): "y" * 4000 for i in range(9)}, f"is {MAX_TWIN_BYTES}"),
        ([[[[[[[[[[1]]]]]]]]]], "10 levels"),
    ],
)
def test_the_limits_of_a_twin_are_checked(value: Any, word: str) -> None:
    """They are those of IoT Hub and edgeHub, for the twin of every module."""
    manifest = valid_manifest()
    value_at(manifest, AGENT)["modules"]["other"] = value_at(manifest, MODULE) | {
        "settings": {"image": "registry.example.com/other:1"}
    }
    manifest["modulesContent"]["other"] = {"properties.desired": {"value": value}}
    report = lint(manifest)
    assert report.errors >= 1
    assert any(word in finding.line() for finding in report.findings)


def test_numbers_that_cannot_be_stored_are_reported() -> None:
    """JSON has them, and Python makes an infinity of them."""
    text = json.dumps(valid_manifest()).replace('"fps": 5', '"fps": 1e999')
    assert "infinite number" in lint_manifest(text.encode(), "m.template.json").to_text()


def test_a_duplicate_key_is_reported() -> None:
    """Tools disagree on which one wins."""
    text = json.dumps(valid_manifest()).replace(
        '"restartPolicy": "always"', '"restartPolicy": "always", "restartPolicy": "never"'
    )
    assert ("error", f"{IN_MODULE}.restartPolicy") in finding_places(
        lint_manifest(text.encode(), "m.template.json")
    )


def test_a_layered_deployment_is_checked_without_its_base() -> None:
    """Keys of the base are not reported as missing; existing keys are checked."""
    layer = json.loads(
        generate_manifest(ManifestRequest(image="r.example.com/visionedge:1.0-cpu", form="layered"), {}).text
    )
    assert lint(layer).findings == ()
    content = layer["content"]["modulesContent"]
    content["vision"] = {"properties.desired.cameras.yard": {"uri": "demo:", "fps": 0}}
    content["$edgeHub"]["properties.desired.routes.other"] = "FROM /messages/modules/press/* INTO $upstream"
    content["$edgeHub"]["properties.desired.routes.wrong"] = "FROM here"
    content["$edgeAgent"]["properties.desired.modules.vision"]["restartPolicy"] = "yes"
    assert finding_places(lint(layer)) == {
        ("error", '$.content.modulesContent.vision["properties.desired.cameras.yard"].fps'),
        ("error", '$.content.modulesContent["$edgeHub"]["properties.desired.routes.wrong"]'),
        (
            "error",
            '$.content.modulesContent["$edgeAgent"]["properties.desired.modules.vision"].restartPolicy',
        ),
    }


def test_a_layer_may_change_only_the_configuration() -> None:
    """Of a module that the deployment below runs."""
    layer = {"modulesContent": {"vision": {"properties.desired.telemetry": {"mode": "some"}}}}
    (finding,) = lint(layer).findings
    assert finding.path == '$.modulesContent.vision["properties.desired.telemetry"].mode'


def test_cameras_may_be_in_a_file_on_the_device() -> None:
    """With VISIONEDGE_CONFIG the twin may omit them or change some keys."""
    manifest = change(valid_manifest(), (*VISION, "cameras"), {"dock": {"fps": 3}})
    assert lint(manifest).errors == 1
    value_at(manifest, MODULE)["env"] = {"VISIONEDGE_CONFIG": {"value": "/data/vision.yaml"}}
    assert lint(manifest).findings == ()
    del value_at(manifest, VISION)["cameras"]
    assert lint(manifest).findings == ()


@pytest.mark.parametrize(
    ("option", "value"),
    [("PortBindings", {"8080/tcp": [{"HostPort": "8080"}]}), ("NetworkMode", "host")],
    ids=["a port on every address", "the host's network"],
)
@pytest.mark.parametrize(
    "http", [{}, {"allowAnonymous": True}, {"allowAnonymous": True, "token": "${TOKEN}"}]
)
def test_http_that_other_machines_reach_without_a_token_is_a_warning(
    option: str, value: Any, http: dict[str, Any]
) -> None:
    """Without `allowAnonymous` the module makes a token at its first start."""
    manifest = change(valid_manifest(), (*HOST, option), value)
    value_at(manifest, VISION)["http"] = http
    found = [f for f in lint(manifest).findings if "without a token" in f.problem]
    assert len(found) == (http == {"allowAnonymous": True})
    assert all("remove http.allowAnonymous" in str(f.remedy) for f in found)


def test_the_folder_of_visionedge_data_needs_a_volume() -> None:
    manifest = valid_manifest()
    value_at(manifest, MODULE)["env"] = {"VISIONEDGE_DATA": {"value": "/state"}}
    (finding,) = lint(manifest).findings
    assert "no volume is mounted at /state" in finding.problem


def test_secrets_are_never_shown_and_are_reported_in_a_template() -> None:
    manifest = change(
        valid_manifest(),
        (*VISION, "cameras", "dock"),
        {"uri": "rtsp://me:hunter2@192.0.2.5/", "fps": "hunter2"},
    )
    value_at(manifest, VISION)["http"] = {"token": "hunter3", "tokn": "hunter3"}
    value_at(manifest, AGENT)["runtime"]["settings"]["registryCredentials"] = {
        "a": {"address": "r.example.com", "username": "somebody", "password": "hunter4"},
        "hunter4": "hunter4",
    }
    for name in ("deployment.json", "deployment.template.json"):
        report = lint(manifest, name)
        text = report.to_text() + json.dumps(report.document())
        assert not any(secret in text for secret in ("hunter2", "hunter3"))
        warned = {f.path for f in report.findings if "secret" in f.problem}
        assert (f"{IN_VISION}.cameras.dock.uri" in warned) == name.endswith(".template.json")


def test_only_secrets_count_as_secrets_of_a_template() -> None:
    """Variables with the name of one too; the user of a container, placeholders, yes and no are none."""
    manifest = valid_manifest()
    value_at(manifest, MODULE)["settings"]["createOptions"]["User"] = "10001:10001"
    values = {
        "A_PASSWORD": "$PASSWORD",
        "B_TOKEN": "${TOKEN}",
        "EMPTY_PASSWORD": "yes",
        "TZ": "Europe/Berlin",
    }
    env = {name: {"value": value} for name, value in values.items()}
    value_at(manifest, MODULE)["env"] = env
    assert lint(manifest, "a.template.json").findings == ()
    env["DB_PASSWORD"] = {"value": "hunter2"}
    (finding,) = lint(manifest, "a.template.json").findings
    assert finding.path == f"{IN_MODULE}.env.DB_PASSWORD.value"


def test_placeholders_are_allowed_only_in_templates() -> None:
    """For any key."""
    manifest = valid_manifest()
    value_at(manifest, VISION)["inference"]["device"] = "${DEVICE}"
    value_at(manifest, VISION)["cameras"]["dock"] = {"uri": "rtsp://${USER}:${PASSWORD}@192.0.2.5/"}
    value_at(manifest, MODULE)["settings"]["image"] = "$CONTAINER_REGISTRY_ADDRESS/visionedge:${TAG}"
    assert lint(manifest, "a.template.json").findings == ()
    report = lint(manifest)
    assert report.errors >= 3
    assert "$CONTAINER_REGISTRY_ADDRESS" in report.to_text()


def test_a_module_is_recognised_by_its_id_its_image_or_an_argument() -> None:
    """Without any of these, a note says so: the manifest may be that of another module."""
    manifest = valid_manifest(module="dock-camera")
    assert list(lint(manifest).modules) == ["dock-camera"]
    value_at(manifest, (*AGENT, "modules", "dock-camera"))["settings"]["image"] = (
        "registry.example.com/mine:1.0-cpu"
    )
    report = lint(manifest)
    assert finding_places(report) == {("note", "$.modulesContent")}
    assert report.to_text().endswith("deployment.json: no problems\n")
    assert [report.document()[key] for key in ("errors", "warnings", "notes")] == [0, 0, 1]
    assert lint(manifest, modules=("dock-camera",)).findings == ()
    with pytest.raises(ConfigError, match=r"no module yard; there are .*dock-camera"):
        lint(manifest, modules=("yard",))


def test_lint_exits_with_2_and_prints_a_line_per_problem(visionedge: CommandLine, tmp_path: Path) -> None:
    """A warning alone ends with 0; `--json` is one document."""
    path = tmp_path / "deployment.json"
    path.write_text(json.dumps(change(valid_manifest(), (*MODULE, "type"), "podman")))
    outcome = visionedge("manifest", "lint", path)
    assert outcome.code == 2
    assert outcome.err == ""
    assert (
        f"{path}:1: error: {IN_MODULE}.type: is not a value that IoT Edge accepts; write docker"
        in outcome.out
    )
    document = json.loads(visionedge("manifest", "lint", path, "--json").out)
    assert document["schema"] == "visionedge/manifest-lint/1"
    assert document["kind"] == "deployment"
    assert document["errors"] == len([f for f in document["findings"] if f["severity"] == "error"])
    path = tmp_path / "w.template.json"
    path.write_text(json.dumps(change(valid_manifest(), (*HOST, "Binds"), [])))
    outcome = visionedge("manifest", "lint", path)
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1] == f"{path}: no errors, 1 warning"


def test_a_finding_has_the_line_of_its_place_in_the_file() -> None:
    """A missing key has that of the object; text with quotes, brackets and line ends is no obstacle."""
    manifest = valid_manifest()
    value_at(manifest, VISION)["cameras"]["demo"]["fps"] = "5"
    value_at(manifest, MODULE)["version"] = 'a "quoted" [text]: {"with": \\ "more"}\n\t,'
    del value_at(manifest, AGENT)["runtime"]
    value_at(manifest, HUB)["routes"]["wrong"] = "FROM here"
    text = json.dumps(manifest, indent=1)
    lines = text.splitlines()
    found = {
        f.path.rpartition(".")[2]: lines[f.line_number - 1]
        for f in lint_manifest(text.encode(), "a.template.json").findings
    }
    assert found.keys() == {"fps", "runtime", "wrong"}
    assert '"fps": "5"' in found["fps"]
    assert '"FROM here"' in found["wrong"]
    assert lines.index(found["runtime"]) == 3
    assert '"properties.desired": {' in found["runtime"]


def test_keys_that_occur_twice_do_not_shift_the_lines() -> None:
    text = json.dumps(valid_manifest(), indent=1).replace(
        '"restartPolicy": "always",', '"restartPolicy": ["always", {"a": "b"}],\n"restartPolicy": "yes",'
    )
    report = lint_manifest(text.encode(), "a.template.json")
    lines = {text.splitlines()[f.line_number - 1].strip() for f in report.findings}
    assert lines == {'"restartPolicy": "yes",'}


def test_the_old_key_of_the_content_is_not_that_of_a_module_configuration() -> None:
    """`moduleContent` is both: `az` reads it as a deployment if it has modules."""
    manifest = valid_manifest()
    old = {"moduleContent": manifest["modulesContent"]}
    assert lint(old).findings == ()
    configuration = {"content": {"moduleContent": {"properties.desired.settings": {"a": 1}}}}
    assert ("error", "$.content.modulesContent") in finding_places(lint(configuration))


@pytest.mark.parametrize("spelling", [str.lower, str.upper])
def test_options_are_read_in_any_case(spelling: Callable[[str], str]) -> None:
    """As Docker and edgeAgent do; the data folder, the port and the devices are found."""

    def spelt(value: Any) -> Any:
        if isinstance(value, list):
            return [spelt(item) for item in value]
        return {spelling(k): spelt(v) for k, v in value.items()} if isinstance(value, dict) else value

    manifest = valid_manifest("gpu-pv-by-hand", document={"cameras": {"usb": {"uri": "v4l2:///dev/video0"}}})
    settings_ = value_at(manifest, MODULE)["settings"]
    options = {**settings_["createOptions"]}
    tmpfs = options["HostConfig"].pop("Tmpfs")  # its keys are paths
    del (
        options["HostConfig"]["LogConfig"]["Config"],
        options["HostConfig"]["PortBindings"],
        options["ExposedPorts"],
    )
    options["HostConfig"]["LogConfig"]["Type"] = "local"
    settings_["createOptions"] = spelt(options)
    settings_["createOptions"][spelling("HostConfig")][spelling("Tmpfs")] = tmpfs
    assert lint(manifest).findings == ()


@pytest.mark.parametrize(
    ("option", "value", "place"),
    [
        ("PortBindings", {"8080/tcp": [{"HostPort": "8080"}]}, 'PortBindings["8080/tcp"]'),
        ("NetworkMode", "host", "NetworkMode"),
    ],
)
def test_http_that_anybody_may_use_is_reported(option: str, value: Any, place: str) -> None:
    """Only with allowAnonymous: else the module makes a token."""
    manifest = change(valid_manifest(), (*HOST, option), value)
    assert lint(manifest).findings == ()
    value_at(manifest, VISION)["http"] = {"allowAnonymous": True}
    (finding,) = lint(manifest).findings
    assert (finding.severity, finding.path) == ("warning", f"{IN_OPTIONS}.HostConfig.{place}")
    assert "token" in finding.remedy


def two() -> Manifest:
    """A manifest with two modules that are visionedge and get in each other's way nowhere."""
    manifest = valid_manifest()
    second = json.loads(json.dumps(value_at(manifest, MODULE)))
    host = second["settings"]["createOptions"]["HostConfig"]
    host["Binds"] = ["second-data:/data"]
    host["PortBindings"]["8080/tcp"][0]["HostPort"] = "8081"
    value_at(manifest, AGENT)["modules"]["second"] = second
    manifest["modulesContent"]["second"] = json.loads(json.dumps(manifest["modulesContent"]["vision"]))
    for output in ("events", "detections"):
        route = f"FROM /messages/modules/second/outputs/{output} INTO $upstream"
        value_at(manifest, HUB)["routes"][f"second-{output}"] = route
    return manifest


@pytest.mark.parametrize(
    ("address", "port", "problem"),
    [
        ("127.0.0.1", "8081", None),
        ("127.0.0.2", "8080", None),
        ("127.0.0.1", "8080", "as vision does"),
        ("127.0.0.1", "70000", "invalid port"),
        ("127.0.0.1", "http", "invalid port"),
        ("localhost", "8081", "invalid address"),
        ("127.0.0.1", "443", "as edgeHub does"),
    ],
)
def test_a_port_of_the_device_is_published_once(address: str, port: str, problem: str | None) -> None:
    """By one module, at one address; edgeHub's own ports count."""
    manifest = two()
    bindings = [{"HostIp": address, "HostPort": port}]
    host = value_at(manifest, (*AGENT, "modules", "second"))["settings"]["createOptions"]["HostConfig"]
    host["PortBindings"] = {"8080/tcp": bindings}
    findings = lint(manifest).findings
    assert [problem in finding.problem for finding in findings if problem] == [True] * (problem is not None)
    assert all(finding.severity == "error" for finding in findings)


def test_two_modules_do_not_share_a_data_folder() -> None:
    """The spool of one would be locked for the other."""
    manifest = two()
    assert lint(manifest).findings == ()
    host = value_at(manifest, (*AGENT, "modules", "second"))["settings"]["createOptions"]["HostConfig"]
    host["Binds"] = ["visionedge-data:/data"]
    (finding,) = lint(manifest).findings
    assert "second-data:/data" in finding.remedy


@pytest.mark.parametrize(
    ("image", "ours"),
    [
        ("registry.example.com/visionedge:1", True),
        ("registry.example.com/visionedge/cpu", True),
        ("visionedge", True),
        ("visionedge.example.com/sensor:1", False),
        ("$CONTAINER_REGISTRY_ADDRESS/visionedge:1", True),
        ("${MODULES.vision.amd64.cpu}", True),
        ("${MODULES.visionary.amd64.cpu}", False),
    ],
)
def test_the_publisher_of_an_image_is_recognised_by_its_name(image: str, ours: bool) -> None:
    """That of its registry does not."""
    manifest = valid_manifest(module="camera")
    value_at(manifest, (*AGENT, "modules", "camera"))["settings"]["image"] = image
    assert ("camera" in lint(manifest, "a.template.json").modules) == ours
