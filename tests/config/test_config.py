"""The configuration: one schema, every problem at once."""

from pathlib import Path
from typing import Any

import pytest

from visionedge.config.documents import read_document
from visionedge.config.load import merge, parse_config, parse_http_address, read_environment, redact_config
from visionedge.errors import ConfigError


def problems(document: object) -> list[str]:
    """The problems of a wrong document."""
    with pytest.raises(ConfigError) as caught:
        parse_config(document)
    return list(caught.value.problems)


def test_an_empty_document_is_all_defaults() -> None:
    """An empty document is a working configuration."""
    config = parse_config({})
    assert config.inference.device == "auto"
    assert config.http.host == "127.0.0.1"
    assert config.telemetry.interval_seconds == 1


def test_every_problem_is_reported_at_once_with_its_path() -> None:
    """A document with many faults names each of them."""
    found = problems(
        {
            "cameras": {"Dock!": {"uri": "demo:"}, "yard": {"uri": "gopher://x", "fps": 0}, "gate": {}},
            "inference": {"device": "npu", "confidence": 1.5, "maxBatch": "8", "classes": "person"},
            "telemtry": {},
            "http": {"port": 70000},
            "model": {"path": "a.onnx", "url": "https://h/a.onnx"},
        }
    )
    starts = {line.split(":")[0] for line in found}
    assert starts == {
        "cameras.Dock!",
        "cameras.yard.uri",
        "cameras.yard.fps",
        "cameras.gate.uri",
        "inference.device",
        "inference.confidence",
        "inference.maxBatch",
        "inference.classes",
        "telemtry",
        "http.port",
        "model",
    }


def test_defaults_for_all_cameras_apply_below_the_keys_of_each() -> None:
    """Mapping by mapping: a gate of a camera keeps the other keys of the defaults."""
    config = parse_config(
        {
            "cameraDefaults": {"fps": 5, "transport": "auto", "gate": {"everySeconds": 3}},
            "cameras": {"a": {"uri": "demo:"}, "b": {"uri": "demo:", "fps": 2, "gate": {"sensitivity": 1}}},
        }
    )
    a, b = config.cameras["a"], config.cameras["b"]
    assert (a.fps, a.transport, b.fps, b.transport) == (5, "auto", 2, "auto")
    assert a.gate is not None
    assert b.gate is not None
    assert (a.gate.every_seconds, b.gate.every_seconds, b.gate.sensitivity) == (3, 3, 1)
    assert a == parse_config({"cameras": {"a": redact_config(config)["cameras"]["a"]}}).cameras["a"]


def test_a_wrong_default_is_reported_once_at_its_own_path() -> None:
    """For any number of cameras that use it."""
    cameras = {name: {"uri": "demo:"} for name in "abc"}
    defaults = {"fpss": 5, "transport": "pigeon", "uri": "demo:", "gate": {"evrySeconds": 1}}
    assert problems({"cameraDefaults": defaults, "cameras": cameras}) == [
        "cameraDefaults.gate.evrySeconds: unknown key; did you mean 'everySeconds'?",
        "cameraDefaults.transport: must be 'tcp', 'udp' or 'auto'",
        "cameraDefaults.fpss: unknown key; did you mean 'fps'?",
        "cameraDefaults.uri: unknown key; known here: fps, enabled, gate, priority, transport, decoder, tls, "
        "followRedirects, loop, extraCodecs, extraContainers, classes, confidence, tracking, model, "
        "then",
    ]
    assert problems({"cameraDefaults": 5, "cameras": cameras}) == [
        "cameraDefaults: must be a mapping of keys"
    ]


@pytest.mark.parametrize("written", ["off", "on", "yes", "no", "1", "007", "1_0"])
def test_a_camera_name_that_yaml_reads_as_another_type_is_kept_as_written(
    tmp_path: Path, written: str
) -> None:
    """With quotes around it or without."""
    file = tmp_path / "c.yaml"
    for form in (written, f"'{written}'"):
        file.write_text(f"cameras:\n  {form}: {{uri: 'demo:'}}\n")
        assert list(parse_config(read_document(file)).cameras) == [written]


@pytest.mark.parametrize("written", ["No", "1.5", "~", "2026-01-01 10:00:00"])
def test_an_invalid_camera_name_is_reported_as_written(tmp_path: Path, written: str) -> None:
    """Not as the value that YAML reads."""
    file = tmp_path / "c.yaml"
    file.write_text(f"cameras:\n  {written}: {{uri: 'demo:'}}\n")
    (problem,) = problems(read_document(file))
    assert (
        problem == f"cameras.{written}: a camera's name must be 1 to 64 characters of a-z, 0-9, '_' and '-'"
    )


def test_a_camera_name_may_have_underscores() -> None:
    """Other programs use such names."""
    assert set(parse_config({"cameras": {"front_door-2": {"uri": "demo:"}}}).cameras) == {"front_door-2"}
    assert "cameras.Front Door" in problems({"cameras": {"Front Door": {"uri": "demo:"}}})[0]


def test_an_unknown_key_names_the_likely_one() -> None:
    """A typing error is answered with the probable key."""
    assert problems({"inference": {"confidance": 0.3}}) == [
        "inference.confidance: unknown key; did you mean 'confidence'?"
    ]


def test_values_that_may_be_secrets_are_never_in_a_problem() -> None:
    """The text of a problem contains no password."""
    found = problems({"cameras": {"dock": {"uri": "gopher://me:hunter2@h/x"}}, "http": {"token": 5}})
    assert not any("hunter2" in line for line in found)


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"http": {"token": ""}}, "http.token: must not be empty"),
        ({"inference": {"remote": {"url": [], "model": "m"}}}, "inference.remote.url: must not be empty"),
        (
            {"cameras": {"a": {"uri": "demo:", "extraCodecs": ["H.264"]}}},
            "cameras.a.extraCodecs.0: must be 1 to 32 of a-z, 0-9 and '_'",
        ),
        (
            {"model": {"url": "https://h/m.onnx", "sha256": "zz"}},
            "model.sha256: must be 64 hexadecimal digits",
        ),
    ],
)
def test_an_empty_or_wrong_text_is_explained(document: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(document)
    assert raised.value.problems == (problem,)


@pytest.mark.parametrize("document", [None, [], "text", 5])
def test_a_document_that_is_not_a_mapping_is_refused(document: object) -> None:
    """The outermost level must be keys."""
    assert "must be a mapping" in problems(document)[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "0.5"])
def test_a_number_must_be_a_number(value: object) -> None:
    """Neither texts nor truth values nor NaN pass for a number."""
    assert problems({"inference": {"confidence": value}})


def test_a_merge_overrides_keys_and_null_removes_them() -> None:
    """Later carriers win key by key; null means the default again."""
    base = {"http": {"port": 1, "host": "a"}, "cameras": {"x": {"uri": "demo:"}}}
    assert merge(base, {"http": {"port": 2}, "cameras": {"x": None}}) == {
        "http": {"port": 2, "host": "a"},
        "cameras": {},
    }
    assert base["http"] == {"port": 1, "host": "a"}


def test_the_environment_carries_the_few_keys_a_container_needs() -> None:
    """Model, device, address and token come from VISIONEDGE_…"""
    document = read_environment(
        {
            "VISIONEDGE_MODEL": "m.onnx",
            "VISIONEDGE_DEVICE": "cpu",
            "VISIONEDGE_HTTP": "0.0.0.0:80",
            "OTHER": "1",
        }
    )
    config = parse_config(document)
    assert (config.model.path, config.inference.device) == ("m.onnx", "cpu")
    assert (config.http.host, config.http.port) == ("0.0.0.0", 80)


def test_yaml_and_json_files_read_alike(tmp_path: Path) -> None:
    """Both carriers give the same document."""
    (tmp_path / "a.yaml").write_text("cameras:\n  dock: {uri: 'demo:', fps: 5}\n")
    (tmp_path / "a.json").write_text('{"cameras": {"dock": {"uri": "demo:", "fps": 5}}}')
    assert read_document(tmp_path / "a.yaml") == read_document(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "a: [1", "is not valid YAML"),
        ("a.yaml", "a: 1\na: 2\n", "given twice"),
        ("a.yaml", "- 1\n", "must be a mapping"),
        ("a.json", "{", "is not valid JSON"),
        ("a.json", None, "cannot be read"),
    ],
)
def test_an_unreadable_file_gives_a_one_line_error(
    tmp_path: Path, name: str, text: str | None, says: str
) -> None:
    """The line names the file and the error."""
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_document(tmp_path / name)
    (line,) = caught.value.problems
    assert says in line
    assert name in line
    assert "\n" not in line


def test_the_shown_configuration_contains_no_secret() -> None:
    """URIs and tokens are masked before anyone sees them."""
    document: dict[str, Any] = {
        "cameras": {"dock": {"uri": "rtsp://me:hunter2@h/s"}},
        "http": {"token": "hunter2"},
        "inference": {"remote": {"token": "hunter2"}},
        "model": {"url": "https://h/m.onnx?sig=hunter2", "sha256": "0" * 64},
    }
    assert "hunter2" not in str(redact_config(parse_config(document)))


def test_problems_of_a_section_and_of_its_keys_are_reported_together() -> None:
    """A typing error hides neither two model locations nor a missing checksum."""
    found = problems({"model": {"path": "a.onnx", "url": "https://h/a.onnx", "maxMegabytes": 0, "pfad": "x"}})
    assert [line.split(":")[0] for line in found] == ["model.maxMegabytes", "model.pfad", "model", "model"]


@pytest.mark.parametrize(
    ("text", "document"),
    [
        ("8080", {"port": 8080}),
        (":8080", {"port": 8080}),
        ("0.0.0.0:80", {"host": "0.0.0.0", "port": 80}),
        ("[::]:80", {"host": "::", "port": 80}),
        ("localhost:0", {"host": "localhost", "port": 0}),
    ],
)
def test_an_address_may_be_a_port_alone(text: str, document: dict[str, object]) -> None:
    """The host keeps its value."""
    assert parse_http_address(text, "--http") == document
    assert parse_config({"http": document}).http.port == document["port"]


@pytest.mark.parametrize("text", ["", "localhost", "localhost:", "a:b", "80x", "\uff18\uff10"])
def test_an_address_without_a_port_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--http: .* must be HOST:PORT or PORT, such as"):
        parse_http_address(text, "--http")


def test_http_names_must_be_host_names() -> None:
    config = parse_config({"http": {"names": ["vision.example", "hmi-7", "edge_1.local."]}})
    assert config.http.names == ("vision.example", "hmi-7", "edge_1.local.")
    for name in ("http://vision.example", "vision.example:80", "", "a b", "*", "x" * 64):
        assert problems({"http": {"names": [name]}}), name


# --- inference.remote ---------------------------------------------------------------------------------------


def remote(url: object, **keys: object) -> dict[str, object]:
    """A document with a remote device."""
    return {"inference": {"device": "remote", "remote": {"url": url, "model": "m", **keys}}}


@pytest.mark.parametrize(
    "url",
    ["https://a.example", "https://a.example:8443/base/", "grpcs://a.example", "https://[2001:db8::1]:1"],
)
def test_a_remote_device_has_one_address_or_a_list(url: str) -> None:
    for given, expected in ((url, (url,)), ([url, "https://b"], (url, "https://b"))):
        section = parse_config(remote(given)).inference.remote
        assert section is not None
        assert section.url == expected


NO_SECRETS = "must have no user name, query or fragment; give a token in VISIONEDGE_REMOTE_TOKEN"
WRONG_URLS = {
    "http://127.0.0.1:1": "http: does not encrypt pictures; use https://, or allow it with"
    " 'inference.remote.insecure: true'",
    "grpc://h:8001": "grpc: does not encrypt pictures; use grpcs://, or allow it with"
    " 'inference.remote.insecure: true'",
    "ftp://h": "must be an https:// or grpcs:// address",
    "h:8000": "must be an https:// or grpcs:// address",
    "https://": "has no host",
    "https://h:port": "cannot be read as an address; write https://HOST:PORT",
    "https://me:hunter2@h": NO_SECRETS,
    "https://h?token=hunter2": NO_SECRETS,
    "https://h/a b": "has spaces in it",
    "grpcs://h/path": "gRPC has no path: write grpcs://HOST:PORT",
}


@pytest.mark.parametrize("url", WRONG_URLS)
def test_a_wrong_address_of_a_server_is_refused_without_its_secrets(url: str) -> None:
    (found,) = problems(remote(url))
    assert found == f"inference.remote.url: {WRONG_URLS[url]}"


@pytest.mark.parametrize("url", ["http://h", "grpc://h:8001"])
def test_unencrypted_connections_must_be_allowed_also_on_loopback(url: str) -> None:
    assert parse_config(remote(url, insecure=True)).inference.device == "remote"


@pytest.mark.parametrize(
    ("section", "missing"),
    [({}, "'url' and 'model'"), ({"url": "https://h"}, "'model'"), ({"model": "m"}, "'url'")],
)
def test_a_remote_device_needs_its_servers(section: dict[str, object], missing: str) -> None:
    """Whatever the environment adds; for other devices the keys may wait."""
    over = read_environment({"VISIONEDGE_REMOTE_TOKEN": "a-token"})
    document = merge({"inference": {"device": "remote", "remote": section}}, over)
    assert problems(document) == [f"inference.remote: 'device: remote' needs {missing}"]
    assert parse_config(merge(document, {"inference": {"device": "cpu"}})).inference.device == "cpu"
    assert problems({"inference": {"device": "remote"}}) == [
        "inference.remote: 'device: remote' needs 'url' and 'model'"
    ]


def test_the_token_of_the_servers_comes_from_the_environment() -> None:
    document = merge(remote("https://h"), read_environment({"VISIONEDGE_REMOTE_TOKEN": "a-token"}))
    section = parse_config(document).inference.remote
    assert section is not None
    assert section.token == "a-token"


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "ümlaut"])
def test_a_token_that_no_header_can_carry_is_refused_without_being_shown(token: str) -> None:
    (found,) = problems(remote("https://h", token=token))
    assert found == "inference.remote.token: must be 1 to 8192 printable ASCII characters without spaces"


def test_the_same_server_twice_is_refused() -> None:
    assert problems(remote(["https://h", "https://h"])) == ["inference.remote.url: has an address twice"]


def test_an_unknown_key_of_the_remote_device_names_the_likely_one() -> None:
    assert problems(remote("https://h", timeoutSecond=1)) == [
        "inference.remote.timeoutSecond: unknown key; did you mean 'timeoutSeconds'?"
    ]
