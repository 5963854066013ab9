"""`visionedge token`: print the HTTP token that is in force."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from visionedge.cli.arguments import Subparsers, add_command, configuration_file, data_folder
from visionedge.config.documents import read_configuration
from visionedge.config.load import merge, read_environment
from visionedge.config.made_token import MadeToken
from visionedge.config.schema import HttpConfig
from visionedge.errors import VisionedgeError
from visionedge.runtime.redaction import register_secrets


def add_parser(subparsers: Subparsers) -> None:
    """Add the command `token`."""
    parser = add_command(
        subparsers,
        "token",
        _token,
        "print the token that HTTP clients must send: the configured one, else the one that the module made",
        "  visionedge token\n"
        "  docker exec vision visionedge token                   in the module's container\n"
        '  curl -H "Authorization: Bearer $(visionedge token)" http://127.0.0.1:8080/api/v1/status',
        codes=(0, 1, 2),
        notes="A module makes a token when other machines can reach it and http.token is not set;\n"
        "http.allowAnonymous: true prevents that.",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="the configuration of the module (default: VISIONEDGE_CONFIG)"
    )


def _token(arguments: argparse.Namespace) -> int:
    path, data = configuration_file(arguments, os.environ), data_folder(os.environ)
    http = read_http_in_force(path, data, os.environ)
    if http.token is None:
        raise VisionedgeError(
            "there is no token: http.allowAnonymous is true"
            if http.allow_anonymous
            else f"there is no token: none is configured, and the module has made none in {data}"
            " (it makes one when it listens on more than loopback)"
        )
    print(http.token)
    return 0


def read_http_in_force(path: Path | None, data: Path, environ: Mapping[str, str]) -> HttpConfig:
    """The section `http` of the module with this configuration and data folder, with the token it asks for.

    Inside IoT Edge the last good desired properties are laid over file and environment, as the module does.
    """
    from visionedge.iothub.desired_properties import DESIRED_FILE_NAME, ConfigurationSources, LastGoodFile
    from visionedge.iothub.identity import Identity

    document = merge(read_configuration(path, environ) if path else {}, read_environment(environ))
    identity = Identity.from_environ(environ)
    last_good = LastGoodFile(data / DESIRED_FILE_NAME, identity.owner) if identity else None
    http = ConfigurationSources.read(document, last_good).start.config.http
    # The module may listen elsewhere than this environment says: `run --http` is not known here.
    token = http.token or (None if http.allow_anonymous else MadeToken(data).read())
    register_secrets([token] if token else [])
    return http.model_copy(update={"token": token})
