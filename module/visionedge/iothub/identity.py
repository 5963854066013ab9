"""Who we are inside IoT Edge: read from the environment that edgeAgent gives to every module."""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from visionedge.errors import ConfigError

_HUB = "IOTEDGE_IOTHUBHOSTNAME"
_DEVICE = "IOTEDGE_DEVICEID"
_MODULE = "IOTEDGE_MODULEID"
_GATEWAY = "IOTEDGE_GATEWAYHOSTNAME"
_GENERATION = "IOTEDGE_MODULEGENERATIONID"
_WORKLOAD = "IOTEDGE_WORKLOADURI"
_API = "IOTEDGE_APIVERSION"
EDGE_VARIABLES = (_HUB, _DEVICE, _MODULE, _GATEWAY, _GENERATION, _WORKLOAD, _API)
"""The seven that edgeAgent sets; the SDK needs them all."""

_CONNECTION_STRING = "EdgeHubConnectionString"
_CA_FILE = "EdgeModuleCACertificateFile"
_PARTS = ("HostName", "GatewayHostName", "DeviceId", "ModuleId", "SharedAccessKey")

_SOCKET_MODE_HINT = "edgeAgent makes it with mode 0666: restore that, or run the container as root"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the module is and where its hub and its workload API are; holds no secret.

    With the simulator (`carrier`) there is no workload API: its three fields are empty.
    """

    hub: str
    device: str
    module: str
    gateway: str
    generation: str = ""
    workload_uri: str = ""
    api_version: str = ""
    environment: Literal["edge", "simulator"] = "edge"

    @property
    def owner(self) -> str:
        """The module among all modules of all hubs: whose messages these are."""
        return f"{self.hub}/{self.device}/{self.module}"

    def socket_problem(self) -> str | None:
        """Why this user cannot reach the workload API, as far as its socket shows it; None where it can."""
        uri = urlsplit(self.workload_uri)
        if uri.scheme != "unix":
            return None
        path = Path(uri.path)
        try:
            is_socket = stat.S_ISSOCK(path.stat().st_mode)
        except FileNotFoundError:
            return (
                f"the workload socket {path} does not exist; restart the module: "
                "edgeAgent binds the socket when it makes the container"
            )
        except OSError as error:
            return f"the workload socket {path} cannot be reached ({error.strerror}); {_SOCKET_MODE_HINT}"
        if not is_socket:
            return f"{path} is no socket; restart the module: edgeAgent binds the workload socket there"
        if not os.access(path, os.R_OK | os.W_OK):
            return f"user {os.getuid()} may not open the workload socket {path}; {_SOCKET_MODE_HINT}"
        return None

    @staticmethod
    def from_environ(environ: Mapping[str, str]) -> "Identity | None":
        """The identity in the environment; None outside IoT Edge.

        Raises:
            ConfigError: part of what IoT Edge (or its simulator) sets is there and part is missing.
        """
        missing = [name for name in EDGE_VARIABLES if not environ.get(name)]
        if not missing:
            return _from_agent(environ)
        # The SDK falls back to the simulator's two whenever one of the seven is missing; so do we.
        simulator = [name for name in (_CONNECTION_STRING, _CA_FILE) if not environ.get(name)]
        if not simulator:
            return _from_simulator(environ[_CONNECTION_STRING])
        if len(missing) < len(EDGE_VARIABLES):
            raise ConfigError([_describe_missing("IOTEDGE_…", missing)])
        if len(simulator) == 1:
            raise ConfigError([_describe_missing("the simulator's", simulator)])
        return None


def _describe_missing(which: str, missing: list[str]) -> str:
    return (
        f"some of {which} variables are set, but not {', '.join(missing)}; "
        "set all of them, or none to run locally"
    )


def _from_agent(environ: Mapping[str, str]) -> Identity:
    return Identity(
        hub=environ[_HUB],
        device=environ[_DEVICE],
        module=environ[_MODULE],
        gateway=environ[_GATEWAY],
        generation=environ[_GENERATION],
        workload_uri=environ[_WORKLOAD],
        api_version=environ[_API],
    )


def _from_simulator(connection_string: str) -> Identity:
    pairs = (part.partition("=") for part in connection_string.split(";"))
    parts = {name.strip(): value for name, _, value in pairs}
    missing = [name for name in _PARTS if not parts.get(name)]
    if missing:
        raise ConfigError([f"{_CONNECTION_STRING}: has no {', '.join(missing)}"])
    return Identity(
        hub=parts["HostName"],
        device=parts["DeviceId"],
        module=parts["ModuleId"],
        gateway=parts["GatewayHostName"],
        environment="simulator",
    )
