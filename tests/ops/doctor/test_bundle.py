"""doctor --bundle: everything a colleague needs, and nothing that anybody must not see."""

import io
import json
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doctor_hosts import DATA, HostBuilder, linux
from visionedge.config.load import parse_config
from visionedge.config.schema import Config
from visionedge.errors import VisionedgeError
from visionedge.ops.doctor.bundle import (
    MAX_TEXT_CHARACTERS,
    MODULE_FILES,
    SecretScrubber,
    pack_bundle,
    write_bundle,
)
from visionedge.ops.doctor.facts import DoctorRequest
from visionedge.ops.doctor.report import examine
from visionedge.runtime.redaction import UNMASKED_WORDS

PASSWORD, USER, TOKEN, QUERY, SIGNATURE, OTHER_SIGNATURE, KEY = (
    'p@ss/w"rd#Ü',
    "bait-operator",
    "bait-http-token",
    "bait-query",
    "bait-signature%3D",
    "bait-second-signature%3D",
    "YmFpdC1zaGFyZWQta2V5LWJhaXQ=",
)
SECRETS = (PASSWORD, USER, TOKEN, QUERY, SIGNATURE, OTHER_SIGNATURE, KEY)


def spellings(secret: str) -> set[str]:
    """The ways in which a secret might still be read."""
    escaped = {json.dumps(secret, ensure_ascii=only)[1:-1] for only in (True, False)}
    return {secret, quote(secret), quote(secret, safe="")} | escaped


class UnmaskedModule(BaseHTTPRequestHandler):
    """A module that masks nothing."""

    def do_GET(self) -> None:
        authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.send_response((503 if self.path == "/readyz" else 200) if authorised else 401)
        self.end_headers()
        leaks = " ".join([*SECRETS, f"rtsp://{USER}:{quote(PASSWORD, safe='')}@192.0.2.5/", f"?key={QUERY}"])
        document = {"path": self.path, "leak": leaks, "sas": f"SharedAccessSignature sr=x&sig={SIGNATURE}"}
        self.wfile.write(json.dumps(document).encode() if authorised else b"")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as the base class has it
        """Log nothing."""


@contextmanager
def careless_module() -> Iterator[int]:
    """It, running; its port."""
    server = HTTPServer(("127.0.0.1", 0), UnmaskedModule)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def secret_configuration(root: Path) -> HostBuilder:
    """A machine whose environment is full of secrets."""
    machine = linux(root).container().cpu_wheel()
    machine.environ |= {
        "EdgeHubConnectionString": f"HostName=h;DeviceId=d;ModuleId=m;SharedAccessKey={KEY}",
        "VISIONEDGE_HTTP_TOKEN": TOKEN,
        "MY_PASSWORD": PASSWORD,
        "NVIDIA_VISIBLE_DEVICES": "all",
        "HARMLESS": "not asked for",
    }
    return machine


def configuration(port: int) -> Config:
    """A configuration with a secret in every possible place."""
    uri = f"rtsp://{USER}:{quote(PASSWORD, safe='')}@192.0.2.5/stream1?token={QUERY}"
    return parse_config(
        {
            "cameras": {"dock": {"uri": uri}},
            "model": {"url": f"https://blobs.example.net/m.onnx?sig={SIGNATURE}", "sha256": "ab" * 32},
            "models": {"small": {"url": f"https://h/s.onnx?sig={OTHER_SIGNATURE}", "sha256": "cd" * 32}},
            "http": {"port": port, "token": TOKEN},
        }
    )


def make_bundle(tmp_path: Path, config: Config) -> dict[str, str]:
    """The texts of the bundle on a secretive machine."""
    host = secret_configuration(tmp_path / "root").host()
    path = tmp_path / "doctor.zip"
    write_bundle(path, examine(DoctorRequest("auto", config, DATA), host), config, host)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_the_bundle_contains_no_secret_in_any_spelling(tmp_path: Path) -> None:
    """Even if the running module shows every one of them."""
    with careless_module() as port:
        texts = make_bundle(tmp_path, configuration(port))
    assert {
        "doctor.txt",
        "doctor.json",
        "config.json",
        "module/status.json",
        "module/log.txt",
    } <= texts.keys()
    for name, text in texts.items():
        for secret in SECRETS:
            found = [spelling for spelling in spellings(secret) if spelling in text]
            assert not found, (name, found)


def test_the_bundle_has_report_configuration_versions_and_module_state(tmp_path: Path) -> None:
    with careless_module() as port:
        texts = make_bundle(tmp_path, configuration(port))
    assert texts["doctor.txt"].startswith("visionedge ")
    assert json.loads(texts["doctor.json"])["schema"] == "visionedge/doctor/1"
    assert json.loads(texts["config.json"])["cameras"]["dock"]["uri"].startswith("rtsp://***@192.0.2.5/")
    assert json.loads(texts["versions.json"])["packages"]["onnxruntime"] == "1.31.1"
    assert json.loads(texts["environment.json"]) == {"NVIDIA_VISIBLE_DEVICES": "all"}
    requested = {
        json.loads(texts[f"module/{name}"])["path"] for name in ("status.json", "ready.json", "metrics.txt")
    }
    assert requested == {"/api/v1/status", "/readyz", "/metrics"}


def test_without_a_running_module_the_bundle_says_so(tmp_path: Path) -> None:
    texts = make_bundle(tmp_path, configuration(1))
    assert "http://127.0.0.1:1/api/v1/status" in texts["module/missing.txt"]
    assert "doctor.txt" in texts


def test_the_bundle_that_a_module_makes_of_itself_contains_no_secret(tmp_path: Path) -> None:
    """Its texts do not come over HTTP, so nothing has masked them before; a long log keeps its end."""
    host = secret_configuration(tmp_path / "root").host()
    config = configuration(1)
    leaks = " ".join([*SECRETS, f"rtsp://{USER}:{quote(PASSWORD, safe='')}@192.0.2.5/", f"?key={QUERY}"])
    log = f"{leaks}\n" + "x" * MAX_TEXT_CHARACTERS + f"\n{leaks}\nthe end\n"
    module = {name: json.dumps({"leak": leaks}) for name in MODULE_FILES} | {"module/log.txt": log}
    data = pack_bundle(examine(DoctorRequest("auto", config, DATA), host), config, host, module)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert texts.keys() >= {"doctor.txt", "doctor.json", "config.json", *MODULE_FILES}
    for name, text in texts.items():
        for secret in SECRETS:
            assert not [spelling for spelling in spellings(secret) if spelling in text], name
    assert len(texts["module/log.txt"]) <= MAX_TEXT_CHARACTERS
    assert texts["module/log.txt"].endswith("\nthe end\n")


def test_an_unwritable_path_gives_a_one_line_error(tmp_path: Path) -> None:
    host = secret_configuration(tmp_path / "root").host()
    config = configuration(1)
    report = examine(DoctorRequest("auto", config, DATA), host)
    with pytest.raises(VisionedgeError, match=r"no-such/doctor\.zip: cannot be written: No such file"):
        write_bundle(tmp_path / "no-such" / "doctor.zip", report, config, host)


TEXTS = st.text(st.characters(exclude_characters="*", exclude_categories=["Cs", "Cc"]), max_size=24)


@given(
    secret=TEXTS.filter(lambda text: len(text) >= 6 and text.casefold() not in UNMASKED_WORDS),
    before=TEXTS,
    after=TEXTS,
)
def test_a_known_secret_is_masked_in_every_spelling_and_position(
    secret: str, before: str, after: str
) -> None:
    scrub = SecretScrubber([secret])
    for spelling in spellings(secret):
        assert spelling not in scrub(f"{before}{spelling}{after}")


def test_module_words_and_camera_names_stay_readable() -> None:
    """A user `live` makes no state unreadable, and a camera may be called like a password."""
    config = parse_config({"cameras": {"harbour-7": {"uri": "rtsp://live:harbour-7@192.0.2.5/s"}}})
    scrub = SecretScrubber.of(config, {"http_proxy": "http://me:proxy-word@192.0.2.9:3128"})
    status = {
        "name": "harbour-7",
        "state": "live",
        "lastError": "rtsp://live:harbour-7@192.0.2.5/s: proxy-word",
    }
    assert json.loads(scrub(json.dumps(status))) == {**status, "lastError": "rtsp://***@192.0.2.5/s: ***"}


def test_a_long_one_line_document_is_not_truncated() -> None:
    """The status of two hundred cameras is longer than any text that is redacted as a whole."""
    status = {"cameras": [{"name": f"camera-{number}", "state": "live"} for number in range(1_000)]}
    assert json.loads(SecretScrubber([])(json.dumps(status))) == status
