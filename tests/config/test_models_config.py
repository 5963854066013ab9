"""Several models, a camera's model, a second stage and attributes: a mistake is one line with its path."""

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import CommandLine
from drawn_clips import write_detector
from visionedge.config.documents import Document, read_document
from visionedge.config.load import find_local_only_problems, parse_config, redact_config
from visionedge.config.schema import MAX_PROBLEMS, Config, list_class_keys
from visionedge.errors import ConfigError
from visionedge.runtime.redaction import find_secrets, redact

TRIANGLE = [[0, 0], [1, 0], [1, 1]]
SHA256 = "0" * 64
MODELS: Document = {"helmet": {"path": "helmet.onnx"}, "small": {"path": "small.onnx"}}


def document(models: object = MODELS, defaults: Document | None = None, /, **keys: Any) -> Document:
    """A configuration with two cameras; `keys` are those of the first one."""
    cameras = {"dock": {"uri": "demo:", **keys}, "yard": {"uri": "demo:"}}
    made: Document = {"cameras": cameras, "cameraDefaults": defaults or {}}
    return made if models is None else {**made, "models": models}


def problems(document: Document) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(document)
    return list(caught.value.problems)


def zone(**attributes: object) -> Document:
    return {"gate": {"polygon": TRIANGLE, "attributes": attributes}}


def test_cameras_choose_their_models() -> None:
    """Without a choice the section `model` counts; a second stage turns tracking on."""
    then = {"model": "helmet", "classes": ["person"], "every": 5.0}
    given = document(model="small", then=then, zones=zone(helmet="no"))
    config = parse_config(
        {**given, "models": {**MODELS, "small": {"classes": ["person"], "confidence": 0.6}}}
    )
    dock, yard = config.cameras["dock"], config.cameras["yard"]
    assert (dock.model, yard.model, yard.then) == ("small", None, None)
    assert dock.then is not None
    assert (dock.then.model, dock.then.margin, dock.then.every) == ("helmet", 0.1, 5)
    assert (dock.is_tracked, yard.is_tracked) == (True, False)
    assert dock.zones["gate"].attributes == {"helmet": "no"}
    assert config.models["small"].path is None
    assert config.models["small"].confidence == 0.6
    assert list_class_keys("dock", dock) == {"cameras.dock.then.classes": ("person",)}
    assert parse_config(redact_config(config)) == config


def test_a_second_stage_asks_once_a_track_by_default() -> None:
    then = parse_config(document(then={"model": "helmet"})).cameras["dock"].then
    assert then is not None
    assert (then.every, then.classes) == ("track", None)


def test_defaults_for_all_cameras_may_choose_models() -> None:
    """Mapping by mapping, as for other keys."""
    defaults = {"model": "small", "then": {"model": "helmet", "classes": ["person"]}}
    cameras = parse_config(document(MODELS, defaults, model="helmet", then={"every": 7})).cameras
    assert (cameras["dock"].model, cameras["yard"].model) == ("helmet", "small")
    assert cameras["dock"].then is not None
    assert (cameras["dock"].then.model, cameras["dock"].then.every) == ("helmet", 7)


LIST = (
    "is a list; a camera has one model: set up a second camera with the same uri for another model,"
    " or look at the detections with a second one ('then')"
)
EVERY = "must be 'track' or a number of frames from 1 to 100000"
UNKNOWN = "is not one of 'models'"

WRONG_CAMERAS: dict[str, tuple[Document, str]] = {
    "a list of models": ({"model": ["small", "helmet"]}, f"model: {LIST}"),
    "an unknown model": ({"model": "smal"}, f"model: 'smal' {UNKNOWN}; did you mean 'small'?"),
    "a model of another name": (
        {"model": "vest"},
        f"model: 'vest' {UNKNOWN}; known here: helmet, small",
    ),
    "no name": ({"model": ""}, f"model: '' {UNKNOWN}; did you mean 'helmet'?"),
    "a name that could be none": (
        {"model": "Small Model!"},
        f"model: 'Small Model!' {UNKNOWN}; known here: helmet, small",
    ),
    "a word that YAML reads": (
        {"model": True},
        "model: must be a text; quote it (YAML reads on, off, yes and no as booleans)",
    ),
    "a second stage that is a name": ({"then": "helmet"}, "then: must be a mapping of keys"),
    "a second stage without a model": ({"then": {"every": 5}}, "then.model: is missing"),
    "an unknown second model": (
        {"then": {"model": "helmt"}},
        f"then.model: 'helmt' {UNKNOWN}; did you mean 'helmet'?",
    ),
    "an unknown second model, with attributes": (
        {"then": {"model": "helmt"}, "zones": zone(helmet="no")},
        f"then.model: 'helmt' {UNKNOWN}; did you mean 'helmet'?",
    ),
    "a second model that is a list": (
        {"then": {"model": ["helmet"]}, "zones": zone(helmet="no")},
        "then.model: must be a valid string",
    ),
    "an unknown key": (
        {"then": {"model": "helmet", "evry": 5}},
        "then.evry: unknown key; did you mean 'every'?",
    ),
    "no frames": ({"then": {"model": "helmet", "every": 0}}, f"then.every: {EVERY}"),
    "half a frame": ({"then": {"model": "helmet", "every": 1.5}}, f"then.every: {EVERY}"),
    "a wrong word": ({"then": {"model": "helmet", "every": "frame"}}, f"then.every: {EVERY}"),
    "a truth value": ({"then": {"model": "helmet", "every": True}}, f"then.every: {EVERY}"),
    "a negative margin": (
        {"then": {"model": "helmet", "margin": -0.1}},
        "then.margin: must be greater than or equal to 0",
    ),
    "no classes": ({"then": {"model": "helmet", "classes": []}}, "then.classes: must not be empty"),
    "one class without a list": (
        {"then": {"model": "helmet", "classes": "person"}},
        "then.classes: must be a list: [person]",
    ),
    "a class that the camera does not report": (
        {"classes": ["person"], "then": {"model": "helmet", "classes": ["persn"]}},
        "then.classes: 'persn' is not among the 'classes' of the camera",
    ),
    "no tracking": (
        {"then": {"model": "helmet"}, "tracking": "off"},
        "then: needs tracking; remove 'tracking: off'",
    ),
    "no tracking, as YAML reads the word": (
        {"then": {"model": "helmet"}, "tracking": False},
        "then: needs tracking; remove 'tracking: off'",
    ),
    "attributes without a second stage": (
        {"zones": zone(helmet="no")},
        "zones.gate.attributes.helmet: this camera has no 'then'",
    ),
    "attributes of another model": (
        {"then": {"model": "helmet"}, "zones": zone(small="no")},
        "zones.gate.attributes.small: 'then' has the model 'helmet'",
    ),
    "attributes of a line": (
        {
            "then": {"model": "helmet"},
            "lines": {"door": {"start": [0, 0], "end": [1, 1], "attributes": {"hlmet": "no"}}},
        },
        "lines.door.attributes.hlmet: 'then' has the model 'helmet'",
    ),
    "an unquoted no": (
        {"then": {"model": "helmet"}, "zones": zone(helmet=False)},
        'zones.gate.attributes.helmet: must be a text; quote it: "yes" or "no" (YAML reads them as booleans)',
    ),
    "an empty label": (
        {"then": {"model": "helmet"}, "zones": zone(helmet="")},
        "zones.gate.attributes.helmet: must not be empty",
    ),
    "several labels": (
        {"then": {"model": "helmet"}, "zones": zone(helmet=["no"])},
        "zones.gate.attributes.helmet: must be a valid string",
    ),
    "no attributes": (
        {"then": {"model": "helmet"}, "zones": zone()},
        "zones.gate.attributes: must not be empty",
    ),
}


@pytest.mark.parametrize("fault", WRONG_CAMERAS)
def test_a_mistake_at_a_camera_is_one_line_at_its_path(fault: str) -> None:
    keys, line = WRONG_CAMERAS[fault]
    assert problems(document(**keys)) == [f"cameras.dock.{line}"]


NAME = "a model's name must be 1 to 64 characters of a-z, 0-9, '_' and '-'"
WRONG_MODELS: dict[str, tuple[object, str]] = {
    "two locations": (
        {"a": {"path": "a", "url": "https://h/a.onnx", "sha256": SHA256}},
        "models.a: give 'path' or 'url', not both",
    ),
    "no checksum": ({"a": {"url": "https://h/a.onnx"}}, "models.a: 'url' and 'sha256' go together"),
    "a checksum alone": ({"a": {"sha256": SHA256}}, "models.a: 'url' and 'sha256' go together"),
    "a wrong checksum": (
        {"a": {"url": "https://h/a.onnx", "sha256": "zz"}},
        "models.a.sha256: must be 64 hexadecimal digits",
    ),
    "an insecure address": (
        {"a": {"url": "http://h/a.onnx", "sha256": SHA256}},
        "models.a.url: http: is not secure, give an https:// address;"
        " 'allowInsecure: true' beside it in the local file allows it",
    ),
    "a file alone": ({"a": "a.onnx"}, "models.a: must be a mapping of keys"),
    "a list": ([{"path": "a.onnx"}], "models: must be a mapping of keys"),
    "a blank in a name": ({"front door": {}}, f"models.front door: {NAME}"),
    "a capital letter": ({"Helmet": {}}, f"models.Helmet: {NAME}"),
    "an empty name": ({"": {}}, f"models.: {NAME}"),
    "a long name": ({"x" * 65: {}}, f"models.{'x' * 65}: {NAME}"),
    "an unknown key": ({"a": {"pth": "a"}}, "models.a.pth: unknown key; did you mean 'path'?"),
    "a score above 1": ({"a": {"confidence": 30}}, "models.a.confidence: must be less than or equal to 1"),
    "a class without a list": ({"a": {"classes": "car"}}, "models.a.classes: must be a list: [car]"),
}


@pytest.mark.parametrize("fault", WRONG_MODELS)
def test_a_mistake_in_models_is_one_line_at_its_path(fault: str) -> None:
    models, line = WRONG_MODELS[fault]
    assert problems(document(models)) == [line]


def test_a_wrong_list_of_models_is_reported_once_and_not_for_each_camera() -> None:
    assert problems(document([], model="small", then={"model": "helmet"})) == [
        "models: must be a mapping of keys"
    ]


@pytest.mark.parametrize("models", [None, {}])
def test_a_camera_cannot_have_a_model_where_there_is_none(models: object) -> None:
    assert problems(document(models, model="small")) == [
        "cameras.dock.model: 'small' is not one of 'models', which is empty"
    ]


def test_very_many_wrong_names_are_reported_as_the_first_ones_in_short_lines() -> None:
    """With very many models, which are not all compared or listed."""
    models: Document = {f"model-{number}": {} for number in range(3000)}
    cameras = {f"camera-{number}": {"uri": "demo:", "model": f"modell-{number}"} for number in range(3000)}
    found = [line for line in problems({"models": models, "cameras": cameras}) if line.startswith("cameras.")]
    assert found[0] == "cameras.camera-0.model: 'modell-0' is not one of 'models'"
    assert len(found) == MAX_PROBLEMS


WRONG_DEFAULTS: dict[str, tuple[Document, list[str]]] = {
    "an unknown model": (
        {"model": "smal"},
        [f"cameraDefaults.model: 'smal' {UNKNOWN}; did you mean 'small'?"],
    ),
    "an unknown second model": (
        {"then": {"model": "helmt"}},
        [f"cameraDefaults.then.model: 'helmt' {UNKNOWN}; did you mean 'helmet'?"],
    ),
    "both": (
        {"model": "vest", "then": {"model": "vest"}},
        [
            f"cameraDefaults.{key}: 'vest' {UNKNOWN}; known here: helmet, small"
            for key in ("model", "then.model")
        ],
    ),
    "a list": ({"model": ["small"]}, [f"cameraDefaults.model: {LIST}"]),
    "a wrong key of the second stage": (
        {"then": {"model": "helmet", "every": 0}},
        [f"cameraDefaults.then.every: {EVERY}"],
    ),
    "no tracking": (
        {"then": {"model": "helmet"}, "tracking": "off"},
        ["cameraDefaults.then: needs tracking; remove 'tracking: off'"],
    ),
}


@pytest.mark.parametrize("fault", WRONG_DEFAULTS)
def test_a_mistake_in_the_defaults_is_reported_once(fault: str) -> None:
    """Also where the rules of a camera build on it."""
    defaults, lines = WRONG_DEFAULTS[fault]
    rules = {"zones": zone(helmet="no")} if "then" in defaults else {}
    assert problems(document(MODELS, defaults, **rules)) == lines


def test_a_camera_that_turns_off_the_tracking_of_a_default_is_named() -> None:
    defaults = {"then": {"model": "helmet"}}
    assert problems(document(MODELS, defaults, tracking="off")) == [
        "cameras.dock.tracking: is off, but 'cameraDefaults.then' needs tracking"
    ]


def test_rules_are_judged_by_the_classes_of_the_camera_s_model() -> None:
    """They replace those of the section `inference`, and the camera's own replace both."""
    models = {**MODELS, "small": {"classes": ["car"]}}
    zones = {"gate": {"polygon": TRIANGLE, "classes": ["car"]}}
    inference = {"classes": ["person"]}
    parse_config({**document(models, model="small", zones=zones), "inference": inference})
    parse_config({**document(models, classes=["car"], zones=zones), "inference": inference})
    assert problems({**document(models, zones=zones), "inference": inference}) == [
        "cameras.dock.zones.gate.classes: 'car' is not among 'inference.classes'"
    ]
    zones["gate"]["classes"] = ["person"]
    assert problems(document(models, model="small", zones=zones)) == [
        "cameras.dock.zones.gate.classes: 'person' is not among 'models.small.classes'"
    ]


def test_servers_run_one_model() -> None:
    remote = {"device": "remote", "remote": {"url": "https://h", "model": "m"}}
    assert problems({**document(), "inference": remote}) == [
        "models: servers of 'device: remote' run one model; leave 'models' out"
    ]
    assert parse_config({**document({}), "inference": remote}).models == {}


def test_only_the_local_file_may_allow_insecure_addresses() -> None:
    insecure = {"url": "http://h/a.onnx", "sha256": SHA256, "allowInsecure": True}
    desired = document({"a": insecure, "b": {"path": "b"}})
    assert parse_config(desired).models["a"].allow_insecure
    assert find_local_only_problems({**desired, "model": insecure}) == [
        f"{path}.allowInsecure: can only be set in the local configuration file"
        for path in ("model", "models.a")
    ]


@pytest.mark.parametrize("written", ["yes", "no", "on", "off", "007", "1"])
def test_a_name_that_yaml_reads_as_another_type_is_kept_as_written(tmp_path: Path, written: str) -> None:
    """As the name of a model; where it is a value it needs quotes."""
    file = tmp_path / "c.yaml"
    file.write_text(f"models: {{{written}: {{}}}}\ncameras: {{dock: {{uri: 'demo:', model: '{written}'}}}}\n")
    assert parse_config(read_document(file)).cameras["dock"].model == written


def test_config_check_looks_for_labels_in_the_model_that_is_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a camera's rules in its own model, for attributes in the second one; a detector may find none."""
    write_detector(tmp_path / "figures.onnx")
    figures = {"path": str(tmp_path / "figures.onnx")}
    zones = {
        "right": {"polygon": TRIANGLE, "classes": ["car"], "attributes": {"second": "none"}},
        "wrong": {"polygon": TRIANGLE, "classes": ["zebra"], "attributes": {"second": "No"}},
    }
    given = document(
        {"figures": {**figures, "classes": ["yak"]}, "second": figures, "far": {"path": "/nowhere.onnx"}},
        model="figures",
        classes=["car", "zebra"],
        then={"model": "second"},
        zones=zones,
    )
    given["cameras"]["yard"] |= {"classes": ["zebra"]}
    given["models"]["plain"] = figures
    given["cameras"]["plain"] = {"uri": "demo:", "model": "plain"}
    given["inference"] = {"classes": ["cow"]}  # the bundled model has cows; `second` answers about objects
    given["cameras"]["far"] = {"uri": "demo:", "model": "far", "classes": ["anything"]}
    file = tmp_path / "vision.json"
    file.write_text(json.dumps(given))
    outcome = CommandLine(capsys)("config", "check", file)
    assert outcome.code == 2
    found = [line.split("; ")[0].removeprefix(f"visionedge: {file}:1: ") for line in outcome.complaints]
    assert found == [
        "models.figures.classes: figures has no class 'yak'",
        "cameras.dock.classes: figures has no class 'zebra'",
        "cameras.dock.zones.wrong.classes: figures has no class 'zebra'",
        "cameras.dock.zones.wrong.attributes.second: second has no class 'No'",
        "inference.classes: plain has no class 'cow'",
    ]


# --- secrets ------------------------------------------------------------------------------------------------

SECRET_URL = "https://u5er:hunter2@blobs.example/m.onnx?sv=2024-x1&sig=abcDEF123%2F"
SECRET_PARTS = ("u5er", "hunter2", "2024-x1", "abcDEF123")


def with_address() -> Config:
    return parse_config(document({"small": {"url": SECRET_URL, "sha256": SHA256}}, model="small"))


def test_the_shown_configuration_masks_the_addresses_of_all_models() -> None:
    shown = redact_config(with_address())
    assert shown["models"]["small"]["url"] == "https://***@blobs.example/m.onnx?sv=***&sig=***"
    assert not any(part in str(shown) for part in SECRET_PARTS)


def test_a_document_that_is_read_registers_the_secrets_of_all_models() -> None:
    """So that a message of a library that quotes them is masked, also if the document is refused."""
    found = find_secrets({"models": {"small": {"url": SECRET_URL}}})
    assert {"hunter2", "2024-x1", "abcDEF123%2F"} <= found
    wrong = {"small": {"url": SECRET_URL, "sha256": "zz"}}
    assert not any(part in line for line in problems(document(wrong)) for part in SECRET_PARTS)
    shown = redact("GET abcDEF123/ by hunter2 failed")
    assert not any(part in shown for part in SECRET_PARTS)


def test_a_label_is_no_secret_whatever_its_model_is_called() -> None:
    """A name such as user-badge or pass would otherwise hide the label in every message."""
    given = document(
        {"pass": {}, "user": {}},
        then={"model": "pass"},
        zones={"gate": {"polygon": TRIANGLE, "attributes": {"pass": "visitor", "user": "employee"}}},
    )
    assert not find_secrets(given) & {"visitor", "employee", "pass", "user"}
