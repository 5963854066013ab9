"""The token in force: of the twin, of file and environment, or made. For `token` and the doctor's bundle."""

from pathlib import Path

import pytest

from visionedge.cli.token import read_http_in_force
from visionedge.config.made_token import MadeToken
from visionedge.config.schema import HttpConfig
from visionedge.iothub.desired_properties import DESIRED_FILE_NAME, DesiredDocument, LastGoodFile
from visionedge.iothub.identity import Identity
from visionedge.runtime.redaction import KnownSecrets, redact

EDGE = {
    "IOTEDGE_IOTHUBHOSTNAME": "hub.azure-devices.net",
    "IOTEDGE_DEVICEID": "press-7",
    "IOTEDGE_MODULEID": "vision",
    "IOTEDGE_GATEWAYHOSTNAME": "eflow-vm",
    "IOTEDGE_MODULEGENERATIONID": "638",
    "IOTEDGE_WORKLOADURI": "unix:///var/run/iotedge/workload.sock",
    "IOTEDGE_APIVERSION": "2022-08-03",
    "IOTEDGE_AUTHSCHEME": "sasToken",
}


@pytest.fixture(autouse=True)
def fresh_known_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionedge.runtime.redaction._known", KnownSecrets())


def make_token(data: Path) -> str:
    """The token that a module made in this folder."""
    token = MadeToken(data).lay_under(HttpConfig(host="0.0.0.0"), make=True).token
    assert token
    return token


def keep_desired(data: Path, http: dict[str, object]) -> None:
    """The desired properties that were last in force in this folder."""
    identity = Identity.from_environ(EDGE)
    assert identity
    LastGoodFile(data / DESIRED_FILE_NAME, identity.owner).keep(DesiredDocument(3, {"http": http}))


def test_the_token_of_the_twin_wins_inside_iot_edge(tmp_path: Path) -> None:
    make_token(tmp_path)
    keep_desired(tmp_path, {"token": "token-of-the-twin", "port": 9090})
    environ = {**EDGE, "VISIONEDGE_HTTP_TOKEN": "token-of-the-environment"}
    http = read_http_in_force(None, tmp_path, environ)
    assert (http.token, http.port) == ("token-of-the-twin", 9090)
    outside = read_http_in_force(None, tmp_path, {"VISIONEDGE_HTTP_TOKEN": "token-of-the-environment"})
    assert outside.token == "token-of-the-environment"


def test_else_it_is_the_made_one_unless_everybody_may_ask(tmp_path: Path) -> None:
    assert read_http_in_force(None, tmp_path, {}).token is None
    made = make_token(tmp_path)
    assert read_http_in_force(None, tmp_path, {}).token == made
    keep_desired(tmp_path, {"allowAnonymous": True})
    assert read_http_in_force(None, tmp_path, EDGE).token is None


def test_it_is_masked_from_then_on(tmp_path: Path) -> None:
    made = make_token(tmp_path)
    read_http_in_force(None, tmp_path, {})
    assert made not in redact(f"a line with {made} in it")
