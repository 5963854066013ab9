"""Identity: read from what edgeAgent sets, whole or not at all."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from visionedge.errors import ConfigError
from visionedge.iothub.identity import EDGE_VARIABLES, Identity

EDGE = {
    "IOTEDGE_IOTHUBHOSTNAME": "hub.azure-devices.net",
    "IOTEDGE_DEVICEID": "press-7",
    "IOTEDGE_MODULEID": "vision",
    "IOTEDGE_GATEWAYHOSTNAME": "eflow-vm",
    "IOTEDGE_MODULEGENERATIONID": "638",
    "IOTEDGE_WORKLOADURI": "unix:///var/run/iotedge/workload.sock",
    "IOTEDGE_APIVERSION": "2022-08-03",
}
SIMULATOR = {
    "EdgeHubConnectionString": (
        "HostName=hub.azure-devices.net;GatewayHostName=localhost;DeviceId=dev;ModuleId=vision;"
        "SharedAccessKey=c2VjcmV0PT0="
    ),
    "EdgeModuleCACertificateFile": "/ca.pem",
}


def test_all_seven_variables_make_an_identity() -> None:
    """Other variables of the agent do not matter."""
    identity = Identity.from_environ({**EDGE, "IOTEDGE_AUTHSCHEME": "sasToken", "HOME": "/"})

    assert identity == Identity(
        hub="hub.azure-devices.net",
        device="press-7",
        module="vision",
        gateway="eflow-vm",
        generation="638",
        workload_uri="unix:///var/run/iotedge/workload.sock",
        api_version="2022-08-03",
    )


def test_outside_iot_edge_there_is_no_identity() -> None:
    """An environment without any of them is no error."""
    assert Identity.from_environ({"HOME": "/", "IOTEDGE_AUTHSCHEME": "sasToken"}) is None


@pytest.mark.parametrize("missing", EDGE_VARIABLES)
def test_a_missing_variable_is_named(missing: str) -> None:
    """Half an environment is a mistake, not a reason to run locally."""
    environ = {name: value for name, value in EDGE.items() if name != missing}

    with pytest.raises(ConfigError, match=missing) as caught:
        Identity.from_environ(environ)

    assert not any(name in str(caught.value) for name in EDGE_VARIABLES if name != missing)


def test_an_empty_variable_is_missing() -> None:
    """An empty value is what a forgotten placeholder leaves."""
    with pytest.raises(ConfigError, match="IOTEDGE_DEVICEID"):
        Identity.from_environ({**EDGE, "IOTEDGE_DEVICEID": ""})


def test_the_simulator_counts_as_iot_edge_and_its_key_is_not_kept() -> None:
    """The connection string gives the names; the key is nowhere in the identity."""
    identity = Identity.from_environ(SIMULATOR)

    assert identity is not None
    assert (identity.hub, identity.device, identity.module) == ("hub.azure-devices.net", "dev", "vision")
    assert (identity.gateway, identity.environment) == ("localhost", "simulator")
    assert "c2Vj" not in repr(identity)


def test_an_incomplete_simulator_environment_is_reported_without_its_key() -> None:
    """A connection string without the CA file, or with parts missing, says which."""
    string = SIMULATOR["EdgeHubConnectionString"]
    with pytest.raises(ConfigError, match="EdgeModuleCACertificateFile"):
        Identity.from_environ({"EdgeHubConnectionString": string})

    short = {**SIMULATOR, "EdgeHubConnectionString": string.replace("ModuleId", "Module")}
    with pytest.raises(ConfigError, match="has no ModuleId") as caught:
        Identity.from_environ(short)
    assert "c2Vj" not in str(caught.value)


def test_an_unusable_workload_socket_is_reported_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK says no more than 'Permission denied' and names no file."""
    path = tmp_path / "workload.sock"
    identity = Identity.from_environ({**EDGE, "IOTEDGE_WORKLOADURI": f"unix://{path}"})
    assert identity is not None
    assert f"the workload socket {path} does not exist; restart the module" in (
        identity.socket_problem() or ""
    )
    path.write_text("")
    assert f"{path} is not a socket; restart the module" in (identity.socket_problem() or "")
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert identity.socket_problem() is None
        monkeypatch.setattr(os, "access", lambda *_: False)  # root may do anything
        problem = identity.socket_problem() or ""
    assert f"user {os.getuid()} cannot open the workload socket {path}; edgeAgent creates it" in problem
    assert replace(identity, workload_uri="http://127.0.0.1:1").socket_problem() is None
