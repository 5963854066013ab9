"""`visionedge manifest lint`: every problem of a deployment manifest, with its place and its remedy."""

import json
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
    at,
    change,
    forgetful,
    judge,
    sound,
    told,
)
from repository_paths import REPOSITORY
from visionedge.errors import ConfigError
from visionedge.ops.manifest.generate import ManifestRequest, generate_manifest
from visionedge.ops.manifest.lint import MAX_TWIN_BYTES, lint_manifest

__all__ = ["forgetful"]


@pytest.fixture
def visionedge(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Calls the command line in this process."""
    return CommandLine(capsys)


@pytest.mark.parametrize("name", ["deployment.template.json", "deployment.cpu.template.json"])
def test_nothing_is_wrong_with_the_shipped_templates(visionedge: CommandLine, name: str) -> None:
    """Neither an error nor a warning."""
    outcome = visionedge("manifest", "lint", REPOSITORY / name)
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1].endswith(f"{name}: no problems")


@pytest.mark.parametrize(
    ("path", "value", "severity", "place", "word"), [c[1:] for c in FAULTS], ids=[c[0] for c in FAULTS]
)
def test_a_fault_is_told_at_its_place_with_a_remedy(
    path: tuple[Any, ...], value: Any, severity: str, place: str, word: str
) -> None:
    """With the severity that it has, and a word that helps."""
    report = judge(change(sound(), path, value))
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
    """As a text or in an object, in any case; what leads nowhere or comes from nobody is told."""
    manifest = sound()
    at(manifest, HUB)["routes"]["extra"] = {"route": route, "priority": 9} if as_object else route
    report = judge(manifest)
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
def test_what_surrounds_a_route_has_bounds(route: Any, place: str) -> None:
    """Priority 0 to 9, a time of 32 bits, and a text in any case."""
    manifest = change(sound(), (*HUB, "routes", "a"), route)
    assert told(judge(manifest)) == {("error", f"{IN_HUB}.{place}")}


def test_an_object_route_needs_schema_1_1() -> None:
    """Under 1.0 edgeHub takes texts only."""
    report = judge(change(sound(), (*HUB, "schemaVersion"), "1.0"))
    assert told(report) == {
        ("error", f"{IN_HUB}.routes.vision{output}") for output in ("Events", "Detections")
    }


def test_a_module_that_only_tells_events_needs_no_route_for_detections() -> None:
    """With telemetry.mode none."""
    manifest = change(sound(), (*VISION, "telemetry", "mode"), "none")
    del at(manifest, HUB)["routes"]["visionDetections"]
    assert judge(manifest).findings == ()


def test_create_options_may_come_in_pieces_that_follow_one_another() -> None:
    """createOptions, createOptions01, …; a gap is an error, a piece above 512 characters a warning."""
    manifest = sound()
    settings_ = at(manifest, (*MODULE, "settings"))
    text = json.dumps(settings_.pop("createOptions"))
    cut = [text[i : i + 100] for i in range(0, len(text), 100)]
    settings_ |= {f"createOptions{i:02d}" if i else "createOptions": piece for i, piece in enumerate(cut)}
    assert judge(manifest).findings == ()
    settings_["createOptions42"] = settings_.pop("createOptions01")
    assert ("error", f"{IN_MODULE}.settings.createOptions42") in told(judge(manifest))
    settings_ |= {key: NOTHING for key in list(settings_) if key.startswith("createOptions")}
    at(manifest, MODULE)["settings"] = {
        "image": settings_["image"],
        "createOptions": text[:-1].ljust(600),
        "createOptions01": text[-1],
    }
    assert told(judge(manifest)) == {("warning", IN_OPTIONS)}


def test_an_object_for_create_options_is_for_templates() -> None:
    """A deployment has a text there; a template may have either."""
    manifest = sound()
    data = json.dumps(manifest).encode()
    assert ("error", IN_OPTIONS) in told(lint_manifest(data, "deployment.json"))
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
def test_a_twin_has_limits(value: Any, word: str) -> None:
    """They are those of IoT Hub and edgeHub, for every module's."""
    manifest = sound()
    at(manifest, AGENT)["modules"]["other"] = at(manifest, MODULE) | {
        "settings": {"image": "registry.example.com/other:1"}
    }
    manifest["modulesContent"]["other"] = {"properties.desired": {"value": value}}
    report = judge(manifest)
    assert report.errors >= 1
    assert any(word in finding.line() for finding in report.findings)


def test_numbers_that_nothing_can_hold_are_told() -> None:
    """JSON has them, and Python makes an infinity of them."""
    text = json.dumps(sound()).replace('"fps": 5', '"fps": 1e999')
    assert "infinite number" in lint_manifest(text.encode(), "m.template.json").to_text()


def test_a_key_that_is_given_twice_is_told() -> None:
    """Tools disagree on which one wins."""
    text = json.dumps(sound()).replace(
        '"restartPolicy": "always"', '"restartPolicy": "always", "restartPolicy": "never"'
    )
    assert ("error", f"{IN_MODULE}.restartPolicy") in told(lint_manifest(text.encode(), "m.template.json"))


def test_a_layered_deployment_is_judged_without_what_lies_below_it() -> None:
    """Nothing is missing that the base may have; what is there is judged at its own key."""
    layer = json.loads(
        generate_manifest(ManifestRequest(image="r.example.com/visionedge:1.0-cpu", form="layered"), {}).text
    )
    assert judge(layer).findings == ()
    content = layer["content"]["modulesContent"]
    content["vision"] = {"properties.desired.cameras.yard": {"uri": "demo:", "fps": 0}}
    content["$edgeHub"]["properties.desired.routes.other"] = "FROM /messages/modules/press/* INTO $upstream"
    content["$edgeHub"]["properties.desired.routes.wrong"] = "FROM here"
    content["$edgeAgent"]["properties.desired.modules.vision"]["restartPolicy"] = "yes"
    assert told(judge(layer)) == {
        ("error", '$.content.modulesContent.vision["properties.desired.cameras.yard"].fps'),
        ("error", '$.content.modulesContent["$edgeHub"]["properties.desired.routes.wrong"]'),
        (
            "error",
            '$.content.modulesContent["$edgeAgent"]["properties.desired.modules.vision"].restartPolicy',
        ),
    }


def test_a_layer_may_change_the_configuration_alone() -> None:
    """Of a module that the deployment below runs."""
    layer = {"modulesContent": {"vision": {"properties.desired.telemetry": {"mode": "some"}}}}
    (finding,) = judge(layer).findings
    assert finding.path == '$.modulesContent.vision["properties.desired.telemetry"].mode'


def test_cameras_may_stand_in_a_file_on_the_device() -> None:
    """With VISIONEDGE_CONFIG the twin may leave them out, or say something more of them."""
    manifest = change(sound(), (*VISION, "cameras"), {"dock": {"fps": 3}})
    assert judge(manifest).errors == 1
    at(manifest, MODULE)["env"] = {"VISIONEDGE_CONFIG": {"value": "/data/vision.yaml"}}
    assert judge(manifest).findings == ()
    del at(manifest, VISION)["cameras"]
    assert judge(manifest).findings == ()


def test_the_folder_of_visionedge_data_needs_a_volume() -> None:
    manifest = sound()
    at(manifest, MODULE)["env"] = {"VISIONEDGE_DATA": {"value": "/state"}}
    (finding,) = judge(manifest).findings
    assert "no volume is mounted at /state" in finding.problem


def test_secrets_are_never_shown_and_a_template_should_hold_none() -> None:
    """A manifest has to hold them; what it is made of is kept and shared."""
    manifest = change(
        sound(), (*VISION, "cameras", "dock"), {"uri": "rtsp://me:hunter2@192.0.2.5/", "fps": "hunter2"}
    )
    at(manifest, VISION)["http"] = {"token": "hunter3", "tokn": "hunter3"}
    at(manifest, AGENT)["runtime"]["settings"]["registryCredentials"] = {
        "a": {"address": "r.example.com", "username": "somebody", "password": "hunter4"},
        "hunter4": "hunter4",
    }
    for name in ("deployment.json", "deployment.template.json"):
        report = judge(manifest, name)
        text = report.to_text() + json.dumps(report.document())
        assert not any(secret in text for secret in ("hunter2", "hunter3"))
        warned = {f.path for f in report.findings if "secret" in f.problem}
        assert (f"{IN_VISION}.cameras.dock.uri" in warned) == name.endswith(".template.json")


def test_placeholders_are_at_home_in_templates() -> None:
    """Whatever key they stand for."""
    manifest = sound()
    at(manifest, VISION)["inference"]["device"] = "${DEVICE}"
    at(manifest, VISION)["cameras"]["dock"] = {"uri": "rtsp://${USER}:${PASSWORD}@192.0.2.5/"}
    at(manifest, MODULE)["settings"]["image"] = "$CONTAINER_REGISTRY_ADDRESS/visionedge:${TAG}"
    assert judge(manifest, "a.template.json").findings == ()
    report = judge(manifest)
    assert report.errors >= 3
    assert "$CONTAINER_REGISTRY_ADDRESS" in report.to_text()


def test_a_module_is_known_by_its_id_its_image_or_by_name() -> None:
    """Without any, lint says so."""
    manifest = sound(module="dock-camera")
    assert list(judge(manifest).modules) == ["dock-camera"]
    at(manifest, (*AGENT, "modules", "dock-camera"))["settings"]["image"] = (
        "registry.example.com/mine:1.0-cpu"
    )
    assert told(judge(manifest)) == {("warning", "$.modulesContent")}
    assert judge(manifest, modules=("dock-camera",)).findings == ()
    with pytest.raises(ConfigError, match=r"no module yard; there are .*dock-camera"):
        judge(manifest, modules=("yard",))


def test_lint_ends_with_2_if_something_is_wrong_and_tells_it_line_by_line(
    visionedge: CommandLine, tmp_path: Path
) -> None:
    """A warning alone ends with 0; `--json` is one document."""
    path = tmp_path / "deployment.json"
    path.write_text(json.dumps(change(sound(), (*MODULE, "type"), "podman")))
    outcome = visionedge("manifest", "lint", path)
    assert outcome.code == 2
    assert outcome.err == ""
    assert f"error: {IN_MODULE}.type: is not a value that IoT Edge accepts; write docker" in outcome.out
    document = json.loads(visionedge("manifest", "lint", path, "--json").out)
    assert document["schema"] == "visionedge/manifest-lint/1"
    assert document["kind"] == "deployment"
    assert document["errors"] == len([f for f in document["findings"] if f["severity"] == "error"])
    path = tmp_path / "w.template.json"
    path.write_text(json.dumps(change(sound(), (*HOST, "Binds"), [])))
    outcome = visionedge("manifest", "lint", path)
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1] == f"{path}: no errors, 1 warning"


def two() -> Manifest:
    """A manifest with two modules that are visionedge and get in each other's way nowhere."""
    manifest = sound()
    second = json.loads(json.dumps(at(manifest, MODULE)))
    host = second["settings"]["createOptions"]["HostConfig"]
    host["Binds"] = ["second-data:/data"]
    host["PortBindings"]["8080/tcp"][0]["HostPort"] = "8081"
    at(manifest, AGENT)["modules"]["second"] = second
    manifest["modulesContent"]["second"] = json.loads(json.dumps(manifest["modulesContent"]["vision"]))
    for output in ("events", "detections"):
        route = f"FROM /messages/modules/second/outputs/{output} INTO $upstream"
        at(manifest, HUB)["routes"][f"second-{output}"] = route
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
    host = at(manifest, (*AGENT, "modules", "second"))["settings"]["createOptions"]["HostConfig"]
    host["PortBindings"] = {"8080/tcp": bindings}
    findings = judge(manifest).findings
    assert [problem in finding.problem for finding in findings if problem] == [True] * (problem is not None)
    assert all(finding.severity == "error" for finding in findings)


def test_two_modules_do_not_share_a_data_folder() -> None:
    """The spool of one would be locked for the other."""
    manifest = two()
    assert judge(manifest).findings == ()
    host = at(manifest, (*AGENT, "modules", "second"))["settings"]["createOptions"]["HostConfig"]
    host["Binds"] = ["visionedge-data:/data"]
    (finding,) = judge(manifest).findings
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
def test_the_name_of_an_image_tells_whose_it_is(image: str, ours: bool) -> None:
    """That of its registry does not."""
    manifest = sound(module="camera")
    at(manifest, (*AGENT, "modules", "camera"))["settings"]["image"] = image
    assert ("camera" in judge(manifest, "a.template.json").modules) == ours
