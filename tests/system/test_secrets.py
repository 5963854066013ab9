"""Secrets: fed in through every carrier, hunted in everything that comes out."""

import base64
import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

import visionedge
from edge_runtime.runtime import EdgeRuntime
from module_process import ModuleProcess
from visionedge.config.documents import read_document
from visionedge.config.load import parse_config
from visionedge.errors import ConfigError
from visionedge.iothub.desired_properties import DESIRED_FILE_NAME as LAST_GOOD
from visionedge.runtime.logs import RedactingFormatter
from visionedge.runtime.redaction import KnownSecrets, find_secrets, redact, register_secrets

PASSWORDS = [
    "correct-horse",
    "p@ss/w#rd?1",
    "Größe&Maß=7",
    "a b+c%20d:e",
    "quote'\"back\\slash",
    "<script>&amp;",
    "12345678",
    "***still-one",
]


def spellings(secret: str) -> set[str]:
    """How a secret could be spelt in some output."""
    return {
        secret,
        quote(secret),
        quote(secret, safe=""),
        json.dumps(secret)[1:-1],
        repr(secret)[1:-1],
        base64.b64encode(secret.encode()).decode().rstrip("="),
    }


# --- the whole module -------------------------------------------------------------------------------------

RTSP, QUERY, HTTP, TOKEN, LATE, TWIN, WRONG, ASKED = (
    "rtsp-Pa55/w@rd",
    "query-s3cret",
    "http-p%41ss",
    "bearer-70ken",
    "f1le-secret",
    "tw1n/p@ss",
    "wr0ng-p@ss",
    "a5ked-p@ss",
)


PROXY, FETCHED = "pr0xy-s3cret", "f3tched-s3cret"

QUERY_NAMES = (
    *("loginuse", "loginpas", "psw", "p", "u", "pin", "sid", "session", "jwt", "hash", "code", "passphrase"),
)
HUNTED = {
    # Each '{}' is a bait of its own.
    **{
        f"login-{number}": f"rtsp://{login}@127.0.0.1:9/cam"
        for number, login in enumerate(
            (
                *("viewer-user:{} {}", "viewer-user:{}\t{}", "viewer-user:{}'{}", 'viewer-user:{}"{}'),
                *(
                    "viewer-user:{}<{}",
                    "viewer-user:{}>{}",
                    "{} {}:{}",
                    "{}",
                    "viewer-user:{}@{}",
                    "{}:{}%20{}",
                ),
            )
        )
    },
    "login-http": "http://viewer-user:{} {}@127.0.0.1:9/x.mjpg",
    **{f"query-{name}": f"http://127.0.0.1:9/cgi?channel=1&{name}={{}}" for name in QUERY_NAMES},
    "query-semicolon": "http://127.0.0.1:9/cgi?password=a;{}",
    "query-comma": "http://127.0.0.1:9/cgi?password=a,{}",
    "query-escaped": "http://127.0.0.1:9/cgi?token%3D{}",
    "query-list": "http://127.0.0.1:9/cgi?key[]={}",
    "query-bare": "http://127.0.0.1:9/cgi?{}",
    "path": "rtsp://127.0.0.1:9/user={}_password={}_channel=1_stream=0.sdp",
}
REFUSED = [f"rtsp://viewer-user:{{}}{character}{{}}@127.0.0.1:9/cam" for character in "#/?["]
BAITS: list[str] = []


def with_secret(template: str) -> str:
    """The address with new baits in it."""
    while "{}" in template:
        BAITS.append(f"b41t-{len(BAITS):03}")
        template = template.replace("{}", BAITS[-1], 1)
    return template


WORDS = {
    "camera:live": "word-0",
    "admin:admin": "word-1",
    "user:failed": "word-2",
    "root:cpu": "word-3",
    "demo:camera": "word-4",
}
"""Logins that are words of our own, and the cameras that have them."""


def configuration(folder: Path) -> Path:
    """A configuration with secrets at all possible places."""
    document = {
        "cameras": {
            "dock": {"uri": "demo:", "fps": 5},
            "gate": {"uri": f"rtsp://viewer-user:{quote(RTSP, safe='')}@127.0.0.1:9/live?token={QUERY}"},
            "yard": {"uri": f"http://viewer-user:{HTTP}@127.0.0.1:9/x.mjpg?pwd={QUERY}"},
            "lost": {"uri": f"{folder}/no-such-file?password={LATE}"},
            **{name: {"uri": with_secret(template)} for name, template in HUNTED.items()},
            **{name: {"uri": f"rtsp://{login}@127.0.0.1:9/s"} for login, name in WORDS.items()},
        },
        "telemetry": {"mode": "all", "intervalSeconds": 0.2, "fillSeconds": 0},
        "http": {"token": TOKEN},
    }
    path = folder / "vision.json"
    path.write_text(json.dumps(document))
    return path


def ask(url: str, token: str | None, method: str = "GET", body: bytes | None = None) -> bytes:
    """The answer of a path, with headers and errors."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, body, headers, method=method)  # noqa: S310 - http, by ready()
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310 - as above
            return str(answer.headers).encode() + bytes(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return str(error.headers).encode() + error.read()


def answers(url: str) -> Iterator[tuple[str, bytes]]:
    """Every document that HTTP gives, with the right token, a wrong one and none."""
    paths = [
        *("", "healthz", "readyz", "metrics", "openapi.json", "api/v1/status", "api/v1/cameras"),
        *(f"api/v1/cameras/{name}" for name in ("dock", "gate", "yard", "lost", "none")),
        *("api/v1/cameras/gate/frame", "api/v1/cameras/dock/frame", "api/v1/doctor", "api/v1/log", "v2"),
        f"api/v1/none?token={TOKEN}",
        f"api/v1/cameras/{quote(RTSP, safe='')}",
    ]
    for path in paths:
        yield path, ask(f"{url}{path}", TOKEN)
    for token in ("wrong", None):
        yield f"asked with {token}", ask(f"{url}api/v1/status", token)
    yield "detect", ask(f"{url}api/v1/detect", TOKEN, "POST", b"rtsp://u:none@h")


def cloud(runtime: EdgeRuntime) -> Iterator[tuple[str, bytes]]:
    """Secrets in valid and invalid desired properties, in calls and in requests; returns the answers."""
    right = {"cameras": {"twin": {"uri": f"rtsp://viewer-user:{quote(TWIN, safe='')}@127.0.0.1:9/t"}}}
    bad = f"foo://viewer-user:{quote(WRONG, safe='')}@h/?token={WRONG}"
    wrong = {"cameras": {"lost": {"uri": bad}}, "http": {"token": {"password": WRONG}, "port": bad}}
    url = f"https://viewer-user:{quote(FETCHED)}@127.0.0.1:9/m.onnx?x={FETCHED}"
    fetched = {"model": {"url": url, "sha256": "ab" * 32}, "cameras": {"lost": None}}
    raw = {"cameras": {f"raw-{number}": {"uri": with_secret(uri)} for number, uri in enumerate(REFUSED)}}
    for patch in (right, wrong, {**raw, "http": None}, {"cameras": dict.fromkeys(raw["cameras"]), **fetched}):
        version = runtime.desire(patch)
        runtime.wait_until(lambda wanted=version: _acknowledged(runtime, wanted), 60)  # type: ignore[misc]
    asked = f"rtsp://viewer-user:{quote(ASKED, safe='')}@h/x"
    calls: tuple[tuple[str, object], ...] = (
        ("status", None),
        ("snapshot", {"camera": "dock"}),
        ("snapshot", {"camera": asked}),
        ("restartCamera", {"camera": "twin"}),
        ("restartCamera", {asked: asked}),
        (
            "validateConfig",
            {"cameras": {"x": {"uri": asked.replace("rtsp", "foo")}}, "http": {"token": ASKED}},
        ),
        ("validateConfig", {asked: ASKED}),
        (f"key={ASKED}", None),
    )
    yield from remote_bundle(runtime)
    for number, (name, payload) in enumerate(calls):
        answer = runtime.invoke(quote(name, safe=""), payload)
        yield f"call {number}: {answer.status}", json.dumps(answer.payload).encode()
    runtime.input("frames", b"no picture", {"camera": asked, "token": ASKED, "$.mid": "question"})


def remote_bundle(runtime: EdgeRuntime) -> Iterator[tuple[str, bytes]]:
    """The support bundle over the direct method."""
    # Each call waits for some seconds while the bundle is made.
    answers = (runtime.invoke("bundle", {}) for _ in range(20))
    first = next(answer.payload for answer in answers if answer.status == 200)
    parts = [runtime.invoke("bundle", {"id": first["id"], "chunk": n}) for n in range(first["chunks"])]
    data = b"".join(base64.b64decode(part.payload["data"]) for part in parts)
    assert hashlib.sha256(data).hexdigest() == first["sha256"]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {"doctor.txt", "config.json", "module/status.json", "module/log.txt"} <= set(
            archive.namelist()
        )
        for name in archive.namelist():
            yield f"bundle method {name}", archive.read(name)


def bundled(folder: Path, url: str, environ: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    """The output of `doctor`, and the bundle about the running module."""
    document = json.loads((folder / "vision.json").read_text())
    document["http"]["port"] = urlsplit(url).port
    path = folder / "doctor.json"
    path.write_text(json.dumps(document))
    command = [
        sys.executable,
        "-m",
        "visionedge",
        "doctor",
        "--config",
        str(path),
        "--bundle",
        str(folder / "b.zip"),
    ]
    paths = {"PYTHONPATH": str(Path(visionedge.__file__).parents[1]), "VISIONEDGE_DATA": str(folder / "data")}
    done = subprocess.run(command, env={**os.environ, **environ, **paths}, capture_output=True, check=False)
    yield "doctor", done.stdout + done.stderr
    with zipfile.ZipFile(folder / "b.zip") as archive:
        assert "module/status.json" in archive.namelist()
        for name in archive.namelist():
            yield f"bundle {name}", archive.read(name)


def environments(pid: int) -> Iterator[tuple[str, bytes]]:
    """Environment and command line of every process that a process has started."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    numbers = {number for path in children for number in path.read_text().split()}
    assert numbers, "the engine computes in a process of its own"
    for number in numbers:
        for name in ("environ", "cmdline"):
            yield f"{name} of {number}", Path(f"/proc/{number}/{name}").read_bytes()


def ask_json(url: str) -> bytes:
    """The body of an answer, asked with the token."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})  # noqa: S310 - as above
    with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310 - as above
        return bytes(answer.read())


def _acknowledged(runtime: EdgeRuntime, version: int) -> bool:
    acknowledged = runtime.broker.twin.reported.get("config", {})
    return bool(acknowledged) and all(entry["version"] == version for entry in acknowledged.values())


def test_no_output_contains_a_secret(tmp_path: Path, edge_runtime: EdgeRuntime) -> None:
    """Log (at its most talkative), HTTP, messages, twin, metrics, spool and every file of the state."""
    key = base64.b64encode(edge_runtime.account.key).decode()
    out = tmp_path / "messages.jsonl"
    arguments = ("--config", str(configuration(tmp_path)), "--messages", str(out), "--log-level", "debug")
    proxy = {"HTTPS_PROXY": f"http://viewer-user:{PROXY}@127.0.0.1:9", "DOCK_PASSWORD": PROXY}
    environ = {**edge_runtime.simulator_environ, "VISIONEDGE_HTTP_TOKEN": TOKEN, **proxy}
    with ModuleProcess(tmp_path / "data", *arguments, environ=environ) as module:
        edge_runtime.wait_for(lambda got: sum(m.output == "detections" for m in got) >= 2, 60)
        edge_runtime.wait_for(lambda got: sum(b'"lost"' in m.body for m in got) >= 1, 60)
        module.ready()
        seen = dict(cloud(edge_runtime))
        edge_runtime.wait_for(lambda got: sum(b"input-picture-refused" in m.body for m in got) >= 1, 60)
        seen |= dict(answers(module.ready()))
        seen |= dict(bundled(tmp_path, module.ready(), environ))
        seen |= dict(environments(module.pid))
        words = {
            camera["name"]: camera
            for camera in json.loads(ask_json(f"{module.ready()}api/v1/cameras"))["cameras"]
        }
        # The hub disappears and returns with a wrong signature, so the SDK logs errors about tokens.
        edge_runtime.faults.refuse_code = 5
        edge_runtime.cut()
        edge_runtime.wait_for_attempts(3)
        edge_runtime.faults.end()
        module.stop(10)
        seen["log"] = module.log.encode()
    seen["messages file"] = out.read_bytes()
    for file in (tmp_path / "data").rglob("*"):
        if file.is_file() and file.name != LAST_GOOD:
            seen[file.name] = file.read_bytes()
    for number, message in enumerate(edge_runtime.messages):
        seen[f"message {number}"] = message.topic.encode() + message.body
    seen["twin"] = json.dumps(edge_runtime.broker.twin.patches).encode()

    # The only file that may contain them, for cameras without a hub; and only those in force.
    kept = tmp_path / "data" / LAST_GOOD
    assert kept.stat().st_mode & 0o777 == 0o600
    assert quote(TWIN, safe="") in kept.read_text()
    assert WRONG not in kept.read_text()
    assert quote(WRONG, safe="") not in kept.read_text()
    assert b"gate" in seen["log"]
    for file in (tmp_path / "data").rglob("*"):
        assert file.stat().st_mode & 0o077 == 0, f"{file} can be read by others"
    for login, name in WORDS.items():
        assert words[name]["uri"] == "rtsp://***@127.0.0.1:9/s"
        assert words[name]["state"] == "failed"
        assert f"camera {name}: connection refused by 127.0.0.1:9" in module.log
        assert [where for where, what in seen.items() if f"{login}@".encode() in what] == []
    secrets = (RTSP, QUERY, HTTP, TOKEN, LATE, TWIN, WRONG, ASKED, PROXY, FETCHED, key, "viewer-user", *BAITS)
    assert len(BAITS) > 40
    for secret in secrets:
        for spelling in spellings(secret):
            # A path that holds a secret echoes nothing either.
            leaks = [where for where, what in seen.items() if spelling.encode() in what]
            assert leaks == [], f"{spelling} in {leaks}"


def test_the_command_line_and_its_errors_contain_no_secret(tmp_path: Path) -> None:
    """Arguments that are wrong are quoted back without their secrets."""
    for arguments in (
        ("--camera", f"dock=foo://me:{LATE}@h/x"),
        ("--camera", f"Dock=rtsp://me:{LATE}@h/x"),
        ("--http", f"rtsp://me:{LATE}@h"),
        ("--model", f"https://me:{LATE}@h/model.onnx"),
        ("--no-such-option", f"rtsp://me:{LATE}@h/x"),
    ):
        with ModuleProcess(tmp_path / "data", *arguments) as module:
            assert module.wait(60) in (1, 2, 3)
        assert LATE not in module.log
        assert module.log


# --- errors and logs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("password", PASSWORDS)
def test_no_exception_contains_a_password(password: str) -> None:
    """At any place of a configuration, and with any error in it."""
    escaped = quote(password, safe="")
    for document in (
        {"cameras": {"dock": {"uri": f"foo://me:{escaped}@host/x"}}},
        {"cameras": {"dock": {"uri": f"rtsp://me:{escaped}@host:port/x"}}},
        {"cameras": {"dock": {"uri": f"rtsp://me:{escaped}@/x"}}},
        {"cameras": {"dock": {"uri": "demo:", f"rtsp://me:{escaped}@host/x": 1}}},
        {"cameras": {f"rtsp://me:{escaped}@host/x": {"uri": "demo:"}}},
        {"http": {"token": {"password": password}}},
        {"http": {"port": f"http://me:{escaped}@h"}},
        {"http": {"token": password, "host": 1, "unknown": password}},
        {"model": {"url": f"https://h/m.onnx?sig={escaped}", "path": "x"}},
        {"models": {"a": {"url": f"https://h/m.onnx?sig={escaped}", "path": "x"}}},
        {"models": {f"rtsp://me:{escaped}@host/x": {"url": f"http://me:{escaped}@h/m.onnx"}}},
        {"cameras": {"dock": {"uri": "demo:", "model": f"rtsp://me:{escaped}@{'host' * 50}/x"}}},
        {"cameras": {"dock": {"uri": "demo:", "then": {"model": f"rtsp://me:{escaped}@host/x"}}}},
        [f"rtsp://me:{escaped}@host/x"],
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config(document)
        shown = f"{caught.value} {caught.value!r}"
        assert not any(spelling in shown for spelling in spellings(password)), shown


@pytest.mark.parametrize(
    "text",
    [
        "http: {token: *secret-one}",
        "http: {token: !secret-one}",
        "cameras: {dock: {uri: 'rtsp://me:secret-one@h', uri: 'x'}}",
        "cameras:\n\tdock: 'rtsp://me:secret-one@h'",
        "rtsp://me:secret-one@h: 1\nrtsp://me:secret-one@h: 2",
        "http: {token: @secret-one}",
    ],
)
def test_the_error_about_invalid_yaml_quotes_no_secret(tmp_path: Path, text: str) -> None:
    """An alias or a tag of YAML may be a token that is not quoted."""
    path = tmp_path / "vision.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_config(read_document(path))
    assert "secret-one" not in str(caught.value)


@pytest.mark.parametrize("password", PASSWORDS)
def test_log_lines_of_libraries_are_masked(password: str) -> None:
    """Far from any URI, in any spelling, in a traceback as well."""
    register_secrets(
        find_secrets({"cameras": {"dock": {"uri": f"rtsp://me:{quote(password, safe='')}@h/x"}}})
    )
    formatter = RedactingFormatter("%(message)s")
    for spelling in (password, quote(password, safe=""), json.dumps(password), repr(password)):
        info = (RuntimeError, RuntimeError(f"login with {spelling} failed"), None)
        record = logging.LogRecord("x", logging.ERROR, "x", 1, f"saw {spelling} here", None, info)
        shown = formatter.format(record)
        assert not any(each in shown for each in spellings(password)), shown
        assert "failed" in shown


# --- which, and how ---------------------------------------------------------------------------------------


def test_secrets_are_found_by_their_position() -> None:
    """URIs, secret queries and secret keys anywhere; names of cameras and settings are none."""
    found = find_secrets(
        {
            "cameras": {
                "dock": {"uri": "rtsp://admin:hunter2@h/s?user=bob-user&channel=1"},
                "gate": {"uri": "rtsp://dock:gate@h/s?channel=1&psw=psw-one"},
            },
            "http": {"token": 4711, "port": 8080, "host": "localhost"},
            "list": ["https://h/x?sig=abc%2Fdef"],
        }
    )
    logins = {"admin", "hunter2", "admin:hunter2", "dock:gate"}
    assert found == {*logins, "bob-user", "psw-one", "4711", "abc%2Fdef"}


def test_short_secrets_are_masked_as_words_only() -> None:
    """A password of three letters must not make logs unreadable, and one letter hides nothing."""
    known = KnownSecrets()
    known.add(["cat", "x", "", "catalogue"])
    assert known.mask("cat: concatenated a cat, (cat) x catalogue") == "***: concatenated a ***, (***) x ***"


def test_the_number_of_known_secrets_is_bounded() -> None:
    """A twin with ever new passwords does not leak memory; the newest ones are masked."""
    known = KnownSecrets(limit=10)
    for number in range(100):
        known.add([f"secret-{number:03}"])
    assert known.mask("secret-000 secret-099") == "secret-000 ***"
    assert len(known._kept) == 10


def test_ordinary_text_is_unchanged() -> None:
    """Without known secrets and patterns nothing changes."""
    text = "camera dock is live: 25 frames/s from rtsp://192.0.2.5/stream1"
    assert redact(text) == text


def test_a_long_traceback_keeps_its_end() -> None:
    """The last line contains the error; the middle is left out, and each line is redacted."""
    frames = "\n".join(f"  File {number}, token=hidden-{number}" for number in range(5_000))
    record = logging.LogRecord("x", logging.ERROR, "x", 1, "it failed", None, None)
    record.exc_text = f"Traceback\n{frames}\nValueError: the last line"
    shown = RedactingFormatter("%(message)s").format(record)
    assert shown.endswith("ValueError: the last line")
    assert shown.startswith("it failed\nTraceback\n")
    assert "lines)" in shown
    assert "hidden" not in shown
    assert len(shown.splitlines()) < 100


def test_a_text_that_contains_addresses_is_not_an_address() -> None:
    """Text between an address and a later '@' is not a password."""
    options = (
        '{"Env": ["PROXY=http://me:hunter2@192.0.2.9:3128"], "Image": "vision@sha256:ab", "Port": "9:9"}'
    )
    assert find_secrets([options]) == {"me", "hunter2", "me:hunter2"}
    assert find_secrets(["dock=rtsp://me:hunter 2@192.0.2.5/s"]) >= {"me", "hunter 2", "me:hunter 2"}
