"""Twins of Spatial Analysis become configurations; what has no counterpart is named."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from command_line import CommandLine
from spatial_analysis_twins import LINE, OPERATION, ZONE, change, make_graph, make_space, make_twin
from visionedge.config.documents import fill_variables
from visionedge.config.load import parse_config
from visionedge.config.schema import Config
from visionedge.config.spatial_analysis import ImportedConfig, import_spatial_analysis
from visionedge.errors import ConfigError

_SPACE = "graphs.a.parameters.SPACEANALYTICS_CONFIG"


def load(imported: ImportedConfig) -> Config:
    """The configuration in force, with a word for each variable."""
    return parse_config(fill_variables(imported.document, dict.fromkeys(imported.variables, "word")))


def problems_of(document: object) -> list[str]:
    with pytest.raises(ConfigError) as error:
        import_spatial_analysis(document)
    return [*error.value.problems]


@pytest.fixture
def visionedge(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)


# --- what is translated -------------------------------------------------------------------------------------


def test_a_twin_with_two_cameras_becomes_two_cameras() -> None:
    imported = import_spatial_analysis(make_twin())
    config = load(imported)
    assert list(config.cameras) == ["lobby-camera-1", "dock"]
    lobby = config.cameras["lobby-camera-1"]
    assert (lobby.uri, lobby.source_id, lobby.classes) == (
        "rtsp://192.0.2.5/stream1",
        "Lobby Camera 1",
        ("person",),
    )
    assert lobby.zones["queue"].polygon == ((0.3, 0.3), (0.3, 0.9), (0.6, 0.9), (0.6, 0.3))
    assert lobby.zones["queue"].anchor == "bottom-center"
    assert lobby.zones["queue"].spatial_analysis == ("count", "zonecrossing", "zonedwelltime")
    assert (lobby.lines["door"].start, lobby.lines["door"].end) == ((0.0, 0.5), (1.0, 0.5))
    assert config.cameras["dock"].source_id is None
    assert (config.telemetry.mode, config.telemetry.format) == ("none", "spatial-analysis")
    assert imported.variables == {}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda graphs: {"graphs": graphs},
        lambda graphs: {"properties": {"desired": {"graphs": graphs, "$version": 3}, "reported": {}}},
        lambda graphs: {"content": {"modulesContent": {"sa": {"properties.desired": {"graphs": graphs}}}}},
        lambda graphs: {"modulesContent": {"$edgeHub": {}, "sa": {"properties.desired.graphs": graphs}}},
        lambda graphs: json.dumps({"graphs": graphs}),
    ],
    ids=["bare", "twin", "deployment", "layered deployment", "a text"],
)
def test_graphs_are_found_wherever_a_twin_or_a_manifest_has_them(wrap: Callable[[Any], Any]) -> None:
    graphs = make_twin()["graphs"]
    assert import_spatial_analysis(wrap(graphs)).document == import_spatial_analysis(make_twin()).document


def test_parameters_of_an_instance_win_over_those_of_its_graph() -> None:
    own = make_space(zones=[{**ZONE, "name": "own"}])
    graph = make_graph(instances={"1": {"parameters": {"SPACEANALYTICS_CONFIG": own}}, "2": {}})
    config = load(import_spatial_analysis({"graphs": {"shop": graph}}))
    (camera,) = config.cameras.values()  # both have the address of the graph, so they are one camera
    assert [*camera.zones] == ["own", "queue"]


def test_graphs_of_one_camera_become_one_camera_with_all_events_of_a_zone() -> None:
    count = make_space(zones=[{**ZONE, "events": [{"type": "count"}]}])
    crossing = make_space(zones=[{**ZONE, "events": [{"type": "zonecrossing"}]}], lines=[LINE])
    graphs = {
        "a": make_graph("-personcount", SPACEANALYTICS_CONFIG=count),
        "b": make_graph(SPACEANALYTICS_CONFIG=crossing),
    }
    (camera,) = load(import_spatial_analysis({"graphs": graphs})).cameras.values()
    assert camera.zones["queue"].spatial_analysis == ("count", "zonecrossing")
    assert [*camera.lines] == ["door"]


@pytest.mark.parametrize(
    ("operation", "events"),
    [
        ("", ("count", "zonecrossing", "zonedwelltime")),
        ("-personcount", ("count",)),
        ("-personcrossingpolygon", ("zonecrossing", "zonedwelltime")),
        ("-personcrossingpolygon.debug", ("zonecrossing", "zonedwelltime")),
        ("-personcrossingline", ()),
        ("-persondistance", ()),
    ],
)
def test_a_zone_without_events_sends_those_of_its_operation(operation: str, events: tuple[str, ...]) -> None:
    space = make_space(zones=[{"name": "queue", "polygon": ZONE["polygon"]}])
    imported = import_spatial_analysis({"graphs": {"a": make_graph(operation, SPACEANALYTICS_CONFIG=space)}})
    (camera,) = load(imported).cameras.values()
    assert [zone.spatial_analysis for zone in camera.zones.values()] == ([events] if events else [])
    assert any("so the zone is left out" in line for line in imported.ignored) == (not events)


@pytest.mark.parametrize(
    ("focus", "anchor"),
    [("footprint", "bottom-center"), ("bottom_center", "bottom-center"), ("center", "center")],
)
def test_the_focus_of_events_is_the_anchor(focus: str, anchor: str) -> None:
    config = {"focus": focus}
    space = make_space(
        zones=[{**ZONE, "events": [{"type": "count", "config": config}]}],
        lines=[{**LINE, "events": [{"type": "linecrossing", "config": config}]}],
    )
    imported = import_spatial_analysis({"graphs": {"a": make_graph(SPACEANALYTICS_CONFIG=space)}})
    (camera,) = load(imported).cameras.values()
    assert (camera.zones["queue"].anchor, camera.lines["door"].anchor) == (anchor, anchor)


def test_a_recording_begins_again_at_its_end() -> None:
    """As Spatial Analysis plays it."""
    for word, loop in ((False, True), ("false", True), (True, False), ("True", False)):
        graph = make_graph(VIDEO_URL="/videos/shop.mp4", VIDEO_IS_LIVE=word)
        (camera,) = load(import_spatial_analysis({"graphs": {"a": graph}})).cameras.values()
        assert (camera.uri, camera.loop) == ("/videos/shop.mp4", loop)


def test_a_bare_space_is_a_camera_whose_address_is_to_be_set() -> None:
    space = {"zones": [ZONE], "lines": [LINE]}
    for document in (space, json.dumps(space)):
        imported = import_spatial_analysis(document)
        assert imported.document["cameras"]["camera"]["uri"] == "${CAMERA_URI}"
        assert [*imported.variables] == ["CAMERA_URI"]
        assert [*load(imported).cameras["camera"].zones] == ["queue"]


@pytest.mark.parametrize(
    ("source_ids", "names"),
    [
        (["Lobby", "lobby", "LOBBY"], ["lobby", "lobby-2", "lobby-3"]),
        (["Café 1", "入口", ""], ["cafe-1", "camera", "a2"]),
        (["x" * 100, 7, "on"], ["x" * 64, "7", "on"]),
        (["${SITE} 1", "${1}", "a\x1b[2J\ud800"], ["site-1", "1", "a-2j"]),
    ],
)
def test_names_of_cameras_are_plain_and_unique_and_source_ids_stay(
    source_ids: list[Any], names: list[str]
) -> None:
    graphs = {
        f"a{number}": make_graph(VIDEO_SOURCE_ID=source_id, VIDEO_URL=f"rtsp://192.0.2.{number}/")
        for number, source_id in enumerate(source_ids)
    }
    imported = import_spatial_analysis({"graphs": graphs})
    assert [*load(imported).cameras] == names
    cameras = imported.document["cameras"].items()
    shown = [camera.get("sourceId", name) for name, camera in cameras]
    if str(source_ids[0]).isascii() and "${" not in str(source_ids[0]):
        assert shown == [*map(str, source_ids)]


def test_two_zones_with_one_name_get_two_and_stderr_names_the_new_one() -> None:
    other = {**ZONE, "polygon": [[0, 0], [0, 1], [1, 1]]}
    line = {**LINE, "name": "queue"}
    space = make_space(zones=[ZONE, other, {**ZONE, "name": "Größe"}], lines=[line])
    imported = import_spatial_analysis({"graphs": {"a": make_graph(SPACEANALYTICS_CONFIG=space)}})
    (camera,) = load(imported).cameras.values()
    assert ([*camera.zones], [*camera.lines]) == (["queue", "queue-2", "Gro-e"], ["queue-3"])
    path = _SPACE
    assert [line for line in imported.ignored if "here and in messages" in line] == [
        f"{path}.zones.1.name: is 'queue-2' here and in messages",
        f"{path}.zones.2.name: is 'Gro-e' here and in messages",
        f"{path}.lines.0.name: is 'queue-3' here and in messages",
    ]


def test_a_thousand_zones_are_translated() -> None:
    zones = [{**ZONE, "name": f"zone {number}"} for number in range(1000)]
    graph = make_graph(SPACEANALYTICS_CONFIG=make_space(zones=zones))
    (camera,) = load(import_spatial_analysis({"graphs": {"a": graph}})).cameras.values()
    assert len(camera.zones) == 1000


def test_zones_that_instances_multiply_are_bounded() -> None:
    """A file of 300 KB may hold millions."""
    zones = [{**ZONE, "name": f"zone {number}"} for number in range(1000)]
    instances = {str(n): {"parameters": {"VIDEO_URL": f"/{n}", "VIDEO_SOURCE_ID": n}} for n in range(1000)}
    graph = make_graph(instances=instances, SPACEANALYTICS_CONFIG=make_space(zones=zones))
    assert problems_of({"graphs": {"a": graph}}) == [
        "graphs: there are more than 2000 cameras, zones and lines; import them in parts"
    ]
    for space, problem in (
        (make_space(), "graphs: there are"),
        ("[" * 60 + "]" * 60, f"{_SPACE}: is nested"),
    ):
        instances = {
            str(n): {"parameters": {"VIDEO_URL": f"/{n}", "VIDEO_SOURCE_ID": n}} for n in range(8000)
        }
        graph = make_graph(instances=instances, SPACEANALYTICS_CONFIG=space)
        (line,) = problems_of({"graphs": {"a": graph}})
        assert line.startswith(problem)


# --- secrets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "uri", "values"),
    [
        (
            "rtsp://oper:hunter2@192.0.2.5/a",
            "rtsp://${DOCK_USER}:${DOCK_PASSWORD}@192.0.2.5/a",
            {"DOCK_USER": "oper", "DOCK_PASSWORD": "hunter2"},
        ),
        (
            "https://store.example/clip.mp4?sv=1&sig=hunter2",
            "https://store.example/clip.mp4?${DOCK_QUERY}",
            {"DOCK_QUERY": "sv=1&sig=hunter2"},
        ),
        (
            "rtsp://192.0.2.5/user=oper_password=hunter2_channel=1.sdp",
            "rtsp://192.0.2.5/${DOCK_PATH}",
            {"DOCK_PATH": "user=oper_password=hunter2_channel=1.sdp"},
        ),
        ("rtsp://oper@192.0.2.5", "rtsp://${DOCK_USER}@192.0.2.5", {"DOCK_USER": "oper"}),
        ("rtsp://${U}:${P}@192.0.2.5/", "rtsp://${U}:${P}@192.0.2.5/", {"U": "oper", "P": "hunter2"}),
        ("${URL}", "${URL}", {"URL": "rtsp://192.0.2.5/"}),
    ],
)
def test_secrets_of_an_address_become_variables_on_request(
    url: str, uri: str, values: dict[str, str]
) -> None:
    """With the values as they were written the address is the same."""
    graph = make_graph(VIDEO_URL=url, VIDEO_SOURCE_ID="dock")
    imported = import_spatial_analysis({"graphs": {"a": graph}}, hide_credentials=True)
    assert imported.document["cameras"]["dock"]["uri"] == uri
    assert imported.variables.keys() == values.keys()
    assert "hunter2" not in str(imported)
    filled = fill_variables(imported.document, values)["cameras"]["dock"]["uri"]
    assert filled == fill_variables({"uri": url}, values)["uri"]


def test_the_variables_of_two_cameras_differ() -> None:
    graphs = {
        name: make_graph(VIDEO_URL=f"rtsp://me:{name}pass@192.0.2.5/{name}", VIDEO_SOURCE_ID=name)
        for name in ("a-b", "a_b", "1", "visionedge-mqtt")
    }
    imported = import_spatial_analysis({"graphs": graphs}, hide_credentials=True)
    prefixes = ("A_B", "A_B_2", "CAMERA_1", "CAMERA_VISIONEDGE_MQTT")
    assert [*imported.variables] == [f"{prefix}_{end}" for prefix in prefixes for end in ("USER", "PASSWORD")]
    load(imported)


@pytest.mark.parametrize("password", ["hunter2", "a$b", "x${1}y"])
def test_credentials_of_an_address_stay(password: str) -> None:
    """What only looks like a variable is escaped; the camera gets it unescaped."""
    graph = make_graph(VIDEO_URL=f"rtsp://me:{password}@192.0.2.5/?channel=1", VIDEO_SOURCE_ID="dock")
    imported = import_spatial_analysis({"graphs": {"a": graph}})
    escaped = password.replace("${", "%24{")
    assert imported.variables == {}
    assert load(imported).cameras["dock"].uri == f"rtsp://me:{escaped}@192.0.2.5/?channel=1"


# --- what has no counterpart --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "key", "value", "words"),
    [
        ("graph", "operationId", f"{OPERATION}.debug", "'.debug' has no counterpart"),
        ("graph", "sharedNodes", {}, "has no counterpart here and is ignored"),
        ("parameters", "DETECTOR_NODE_CONFIG", "{}", "is ignored: inference.device"),
        ("parameters", "TRACKER_NODE_CONFIG", "{}", "is ignored: the tracker"),
        ("parameters", "CAMERACALIBRATOR_NODE_CONFIG", "{}", "is ignored: cameras are not calibrated"),
        ("parameters", "CALIBRATION_CONFIG", "{}", "is ignored: cameras are not calibrated"),
        ("parameters", "CAMERA_CONFIG", "{}", "is ignored: cameras are not calibrated"),
        ("parameters", "VIDEO_DECODE_GPU_INDEX", 0, "is ignored: the CPU decodes"),
        ("parameters", "INPUT_VIDEO_WIDTH", 1920, "is ignored: pictures"),
        ("parameters", "ENABLE_FACE_MASK_CLASSIFIER", True, "is ignored: face masks"),
        ("parameters", "STATIONARY_TARGET_REMOVER_CONFIG", "{}", "is ignored"),
        ("zone", "threshold", 0.02, "is ignored: 'minSeconds'"),
        ("zone", "target_side", 1, "is ignored: it needs the orientation"),
        ("line", "threshold", 0.02, "is ignored: 'minSeconds'"),
        ("config", "trigger", "interval", "'interval' has no counterpart here"),
        ("config", "output_frequency", 2, "every event is sent"),
        ("config", "aggregation_method", "mode", "is ignored"),
        ("event", "type", "persondistance", "persondistance is left out"),
    ],
)
def test_a_thing_without_counterpart_is_named_with_its_path(
    where: str, key: str, value: object, words: str
) -> None:
    """One line; the rest is translated."""
    twin, path = change(where, key, value)
    imported = import_spatial_analysis(twin)
    if where == "event":
        path = path.partition(".events")[0]
    assert [line for line in imported.ignored if line.startswith(f"{path}: ") and words in line]
    load(imported)


def test_defaults_of_spatial_analysis_are_not_reported() -> None:
    event = {"type": "count", "config": {"trigger": "event", "output_frequency": 1, "focus": "footprint"}}
    space = make_space(zones=[{**ZONE, "events": [event]}])
    assert import_spatial_analysis({"graphs": {"a": make_graph(SPACEANALYTICS_CONFIG=space)}}).ignored == ()


def test_a_disabled_graph_is_left_out_whatever_is_in_it() -> None:
    graphs = {"a": make_graph(), "b": {"enabled": False, "parameters": 7}, "c": {"enabled": "false"}}
    imported = import_spatial_analysis({"graphs": graphs})
    assert len(imported.document["cameras"]) == 1
    assert imported.ignored == tuple(f"graphs.{name}: is disabled, so it is left out" for name in "bc")


def test_what_stands_beside_the_graphs_is_named() -> None:
    twin = {"properties": {"desired": {"globalSettings": {}, "$version": 1, "graphs": {"a": make_graph()}}}}
    assert import_spatial_analysis(twin).ignored == (
        "properties.desired.globalSettings: has no counterpart here and is ignored",
    )


# --- wrong documents ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ([], "the document is a list without 'graphs', 'zones' or 'lines'"),
        (None, "the document is empty without"),
        ("7", "the document is a number without"),
        ("{", "the text:1: is not valid JSON"),
        ({}, "the document is a mapping without"),
        ({"graphs": {}}, "graphs: is empty"),
        ({"graphs": []}, "graphs: is a list; it must be a mapping"),
        ({"graphs": {"a": 1}}, "graphs.a: is a number; it must be a mapping"),
        ({"graphs": {"a": None}}, "graphs: no graph is left"),
        ({"graphs": {"a": {"enabled": False}}}, "graphs: no graph is left"),
        ({"zones": 1}, "zones: is a number; it must be a list"),
        ({"lines": {}}, "lines: is a mapping; it must be a list"),
        ({"zones": [1]}, "zones.0: is a number; it must be a mapping"),
    ],
)
def test_a_document_that_is_no_twin_is_refused(document: object, problem: str) -> None:
    (line,) = problems_of(document)
    assert line.startswith(problem)


@pytest.mark.parametrize(
    ("where", "key", "value", "problem"),
    [
        ("graph", "operationId", "cognitiveservices.vision.vehicleanalysis", "must be one of cognitive"),
        ("graph", "operationId", "spatialanalysis", "must be one of cognitive"),
        ("graph", "operationId", 7, "must be one of cognitive"),
        ("graph", "operationId", None, "must be one of cognitive"),
        ("graph", "enabled", "maybe", "must be true or false"),
        ("graph", "parameters", [], "is a list; it must be a mapping"),
        ("graph", "instances", [], "is a list; it must be a mapping"),
        ("parameters", "VIDEO_URL", 7, "must be the address of a camera"),
        ("parameters", "VIDEO_URL", " ", "must be the address of a camera"),
        ("parameters", "VIDEO_URL", "c2VjcmV0", "must be rtsp://, http(s):// or the absolute path"),
        ("parameters", "VIDEO_URL", "<Replace RTSP URL>", "must be rtsp://, http(s):// or the absolute path"),
        ("parameters", "VIDEO_URL", "gopher://host/", "unknown scheme 'gopher:'"),
        ("parameters", "VIDEO_URL", "rtsp://me:a/b@host/", "the user name or password in the camera URI"),
        ("parameters", "VIDEO_SOURCE_ID", {}, "must be a text"),
        ("parameters", "VIDEO_SOURCE_ID", True, "must be a text"),
        ("parameters", "VIDEO_IS_LIVE", 2, "must be true or false"),
        ("parameters", "SPACEANALYTICS_CONFIG", None, "is missing"),
        ("parameters", "SPACEANALYTICS_CONFIG", "[]", "is a list; it must be a mapping"),
        ("parameters", "SPACEANALYTICS_CONFIG", '{"zones": NaN}', "NaN is not a number in JSON"),
        ("parameters", "SPACEANALYTICS_CONFIG", '{"a": 1, "a": 2}', "key 'a' is given twice"),
        ("parameters", "SPACEANALYTICS_CONFIG", "[" * 60 + "]" * 60, "is nested deeper than 50 levels"),
        ("parameters", "SPACEANALYTICS_CONFIG", "[" * 90_000, "is nested deeper than 50 levels"),
        ("parameters", "SPACEANALYTICS_CONFIG", f'{{"a": {"9" * 5000}}}', "cannot be read; quote it"),
        ("zone", "name", None, "is missing"),
        ("zone", "name", 7, "must be a text"),
        ("zone", "polygon", None, "is missing"),
        ("zone", "polygon", {"x": 1}, "must be a list of points"),
        ("zone", "polygon", [[0, 0], [1, 1], [0, 0]], "has 2 points; a polygon needs 3 to 64"),
        ("zone", "polygon", [[0, 0], [1, 0], [0, 1], [1, 1], [0, 0]], "crosses or touches itself"),
        ("zone", "polygon", [[0, 0], [0, 0], [0, 1], [1, 1]], "has the same point twice in a row"),
        ("zone", "events", {}, "is a mapping; it must be a list"),
        ("line", "line", [[0, 0], [1, 1]], "is a list; it must be a mapping"),
        ("line", "line", {"start": {"x": 0, "y": 0}, "end": {"x": 0, "y": 0}}, "are the same point"),
        ("line", "name", "", "must be a text"),
        ("event", "type", "linecrossing", "must be one of count, zonecrossing, zonedwelltime"),
        ("event", "type", "enter/exit", "must be one of count, zonecrossing, zonedwelltime"),
        ("event", "type", {}, "must be one of count, zonecrossing, zonedwelltime"),
        ("event", "config", "x", "is a text; it must be a mapping"),
        ("config", "focus", "head", "must be one of footprint, bottom_center, center"),
        ("config", "focus", [], "must be one of footprint, bottom_center, center"),
        ("config", "trigger", "sometimes", "must be event or interval"),
    ],
)
def test_a_wrong_value_is_one_line_with_its_path(where: str, key: str, value: object, problem: str) -> None:
    twin, path = change(where, key, value)
    lines = problems_of(twin)
    assert len(lines) == 1
    assert lines[0].startswith(path)
    assert problem in lines[0]


@pytest.mark.parametrize(
    "point", [[2, 0], [-0.1, 0], [10**400, 0], [True, 0], ["0", 0], [0], [0, 0, 0], None, {"x": 0}, 1e308]
)
def test_a_point_outside_the_picture_is_refused_wherever_it_stands(point: object) -> None:
    for where, key, value, path in (
        ("zone", "polygon", [[0, 0], point, [1, 1]], "polygon.1"),
        ("line", "line", {"start": point, "end": {"x": 1, "y": 1}}, "line.start"),
    ):
        twin, base = change(where, key, value)
        (line,) = problems_of(twin)
        assert line == f"{base.rpartition('.')[0]}.{path}: must be a point, x and y from 0 to 1"


def test_a_graph_without_a_camera_says_where_it_belongs() -> None:
    twin = make_twin()
    del twin["graphs"]["shop"]["instances"]["2"]["parameters"]["VIDEO_URL"]
    assert problems_of(twin) == ["graphs.shop.instances.2.parameters.VIDEO_URL: is missing"]
    graph = make_graph()
    del graph["parameters"]["VIDEO_URL"], graph["parameters"]["SPACEANALYTICS_CONFIG"]
    assert problems_of({"graphs": {"a": graph}}) == [
        "graphs.a.parameters.VIDEO_URL: is missing",
        "graphs.a.parameters.SPACEANALYTICS_CONFIG: is missing",
    ]


def test_every_problem_is_reported_at_once() -> None:
    space = make_space(zones=[{"name": 1, "polygon": 1}], lines=[{"line": {}}])
    graph = make_graph("-x", VIDEO_URL="x", SPACEANALYTICS_CONFIG=space)
    graphs = {"a": graph, "b": {**graph, "operationId": OPERATION}, "c": 1}
    assert len(problems_of({"graphs": graphs})) == 8


def test_a_secret_of_an_address_is_in_no_problem() -> None:
    twin, _ = change("parameters", "VIDEO_URL", "gopher://oper:hunter2@host/?sig=hunter3")
    assert not {"hunter2", "hunter3"} & {
        word for word in ("hunter2", "hunter3") if word in str(problems_of(twin))
    }


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.floats(0, 1)
    | st.sampled_from(["", "a", "${x", "false"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "y", "name"]), inner),
    max_leaves=6,
)
_PLACES = [
    *(("graph", key) for key in ("enabled", "operationId", "parameters", "instances")),
    *(("parameters", key) for key in ("VIDEO_URL", "VIDEO_SOURCE_ID", "VIDEO_IS_LIVE")),
    *(("zone", key) for key in ("name", "polygon", "events", "threshold")),
    *(("line", key) for key in ("name", "line", "events")),
    *(("event", key) for key in ("type", "config")),
    *(("config", key) for key in ("focus", "trigger", "output_frequency")),
]


@given(st.lists(st.tuples(st.sampled_from(_PLACES), _JSON), min_size=1, max_size=3))
def test_whatever_a_twin_holds_gives_problems_or_a_valid_configuration(
    changes: list[tuple[tuple[str, str], object]],
) -> None:
    twin = None
    for (where, key), value in changes:
        twin, _ = change(where, key, value, twin)
    try:
        imported = import_spatial_analysis(twin)
    except ConfigError:
        return
    load(imported)


# --- the command --------------------------------------------------------------------------------------------


def test_the_printed_yaml_is_a_configuration_without_problems(
    visionedge: CommandLine, tmp_path: Path
) -> None:
    source, target = tmp_path / "twin.json", tmp_path / "vision.yaml"
    source.write_bytes(b"\xef\xbb\xbf" + json.dumps(make_twin()).encode())
    outcome = visionedge("config", "import-spatial-analysis", source)
    assert outcome.code == 0
    target.write_text(outcome.out)
    assert visionedge("config", "check", target).code == 0
    assert yaml.safe_load(outcome.out) == import_spatial_analysis(make_twin()).document
    config = "graphs.shop.parameters.SPACEANALYTICS_CONFIG.zones.0.events.0.config"
    assert f"visionedge: {config}.trigger: 'interval' has no counterpart here: each change is sent" in (
        outcome.complaints
    )
    assert any(line.startswith(f"visionedge: {config}.output_frequency: ") for line in outcome.complaints)


def test_the_variables_to_set_are_named_on_stderr(
    visionedge: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "twin.json", tmp_path / "vision.yaml"
    graph = make_graph(VIDEO_URL="rtsp://oper:hunter2@192.0.2.5/", VIDEO_SOURCE_ID="dock")
    source.write_text(json.dumps({"graphs": {"a": graph}}))
    outcome = visionedge("config", "import-spatial-analysis", source, "--hide-credentials")
    assert [line.split(": ")[1] for line in outcome.complaints] == [
        "set the environment variable DOCK_USER",
        "set the environment variable DOCK_PASSWORD",
    ]
    assert "hunter2" not in outcome.out + outcome.err
    target.write_text(outcome.out)
    assert visionedge("config", "check", target).code == 2
    monkeypatch.setenv("DOCK_USER", "oper")
    monkeypatch.setenv("DOCK_PASSWORD", "hunter2")
    assert visionedge("config", "check", target).code == 0
    kept = visionedge("config", "import-spatial-analysis", source)
    assert "uri: rtsp://oper:hunter2@192.0.2.5/" in kept.out
    assert "hunter2" not in kept.err
    target.write_text(kept.out)
    assert visionedge("config", "check", target).code == 0


def test_a_twin_is_read_from_stdin(visionedge: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def give(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    give(json.dumps(make_twin()).encode())
    outcome = visionedge("config", "import-spatial-analysis", "-", "--json")
    document = json.loads(outcome.out)
    assert (document["schema"], document["problems"]) == ("visionedge/config-import/1", [])
    assert document["configuration"] == import_spatial_analysis(make_twin()).document
    assert [f"visionedge: {line}" for line in document["ignored"]] == outcome.complaints
    for content, words in (
        (b"\xff", "is not UTF-8 text"),
        (b" " * (2**20 + 1), "larger than 1 MiB"),
        (b"<html>", "is not valid JSON"),
        (b"", "is not valid JSON"),
    ):
        give(content)
        refused = visionedge("config", "import-spatial-analysis", "-")
        assert (refused.code, refused.out, len(refused.complaints)) == (2, "", 1)
        assert refused.complaints[0].startswith("visionedge: -")
        assert words in refused.complaints[0]


def test_problems_are_in_the_json_document(visionedge: CommandLine, tmp_path: Path) -> None:
    source = tmp_path / "twin.json"
    source.write_text('{"graphs": {}}')
    outcome = visionedge("config", "import-spatial-analysis", source, "--json")
    assert outcome.code == 2
    document = json.loads(outcome.out)
    assert document["problems"] == ["graphs: is empty; there is no camera to import"]
    assert document["configuration"] is None
    missing = visionedge("config", "import-spatial-analysis", tmp_path / "none.json")
    assert (missing.code, missing.out, len(missing.complaints)) == (2, "", 1)
