"""The identity of the module inside IoT Edge, from the environment variables that edgeAgent sets."""

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
"""The variables that edgeAgent sets; the SDK needs all seven."""

_CONNECTION_STRING = "EdgeHubConnectionString"
_CA_FILE = "EdgeModuleCACertificateFile"
_PARTS = ("HostName", "GatewayHostName", "DeviceId", "ModuleId", "SharedAccessKey")

_SOCKET_MODE_HINT = "edgeAgent creates it with mode 0666: restore that mode, or run the container as root"


@dataclass(frozen=True, slots=True)
class Identity:
    """The names of hub, device and module, and the address of the workload API. Contains no secret.

    With the simulator there is no workload API: `generation`, `workload_uri` and `api_version` are empty.
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
        """A name of this module that is unique over all hubs; state files with another owner are not used."""
        return f"{self.hub}/{self.device}/{self.module}"

    def socket_problem(self) -> str | None:
        """Why this user cannot open the socket of the workload API; None without a problem or a socket."""
        uri = urlsplit(self.workload_uri)
        if uri.scheme != "unix":
            return None
        path = Path(uri.path)
        try:
            is_socket = stat.S_ISSOCK(path.stat().st_mode)
        except FileNotFoundError:
            return (
                f"the workload socket {path} does not exist; restart the module: "
                "edgeAgent binds the socket when it creates the container"
            )
        except OSError as error:
            return f"the workload socket {path} cannot be opened: {error.strerror}; {_SOCKET_MODE_HINT}"
        if not is_socket:
            return f"{path} is not a socket; restart the module: edgeAgent binds the workload socket there"
        if not os.access(path, os.R_OK | os.W_OK):
            return f"user {os.getuid()} cannot open the workload socket {path}; {_SOCKET_MODE_HINT}"
        return None

    @staticmethod
    def from_environ(environ: Mapping[str, str]) -> "Identity | None":
        """The identity in the environment variables; None outside IoT Edge.

        Raises:
            ConfigError: only some of the variables of IoT Edge (or of its simulator) are set.
        """
        missing = [name for name in EDGE_VARIABLES if not environ.get(name)]
        if not missing:
            return _from_agent(environ)
        # Like the SDK: if one of the seven is missing, use the simulator's two variables.
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
