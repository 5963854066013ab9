"""`visionedge run`: the module."""

import argparse
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from visionedge import config
from visionedge.cli.arguments import Verbs, add_model_and_device, cameras, data_folder, seconds, verb
from visionedge.documents import Document, read_file
from visionedge.uris import FORMS

INJECT = "VISIONEDGE_INJECT_FAULTS"
"""The variable that lets `--inject` exist."""

_INJECTING = "visionedge.inference.inject"


def add_parser(verbs: Verbs) -> None:
    """Add the verb `run`."""
    parser = verb(
        verbs,
        "run",
        _run,
        "the module: analyse cameras, answer over HTTP, send what was seen to IoT Hub",
        "  visionedge run                                        the bundled clip, on http://127.0.0.1:8080/\n"
        "  visionedge run --camera dock=rtsp://192.0.2.5/stream1 --camera yard=yard.mp4\n"
        "  visionedge run --config vision.yaml --http 0.0.0.0:8080\n"
        "  visionedge run --messages out.jsonl --duration 60     see what IoT Hub would get",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON; also VISIONEDGE_CONFIG")
    parser.add_argument(
        "--camera",
        action="append",
        default=[],
        metavar="NAME=URI",
        help=f"repeatable; {FORMS.replace('%', '%%')}",
    )
    add_model_and_device(parser)
    parser.add_argument("--http", metavar="HOST:PORT", help="where to listen (default: 127.0.0.1:8080)")
    parser.add_argument(
        "--messages", metavar="FILE", help="also append every outgoing message to this JSON Lines file"
    )
    parser.add_argument(
        "--duration",
        type=seconds,
        metavar="SECONDS",
        help="stop by itself so long after it was ready, or after it began to wait for its model or device",
    )
    if _injects(os.environ):
        parser.add_argument("--inject", metavar="FILE", help="a script of faults for the engine, for tests")


def _injects(environ: Mapping[str, str]) -> bool:
    """Whether faults may be injected: only if asked for, and never where the package leaves that part out."""
    return environ.get(INJECT) == "1" and importlib.util.find_spec(_INJECTING) is not None


def _run(arguments: argparse.Namespace) -> int:
    from visionedge.edge.desired import Carriers
    from visionedge.edge.identity import Identity
    from visionedge.edge.last_good import FILE_NAME, LastGood
    from visionedge.service import Options, run

    identity, data = Identity.from_environ(os.environ), data_folder(os.environ)

    def read() -> Document:
        return run_document(arguments, os.environ, inside_iot_edge=identity is not None)

    document = read()
    last_good = LastGood(data / FILE_NAME, identity.owner) if identity else None
    return run(
        Options(
            carriers=Carriers.read(document, last_good),
            data=data,
            messages=Path(arguments.messages) if arguments.messages else None,
            duration_s=arguments.duration,
            inject=Path(arguments.inject) if getattr(arguments, "inject", None) else None,
            reload=read if arguments.config or os.environ.get("VISIONEDGE_CONFIG") else None,
        )
    )


def run_document(
    arguments: argparse.Namespace, environ: Mapping[str, str], *, inside_iot_edge: bool
) -> Document:
    """The configuration document of `run`: the file, the environment over it, the arguments over both."""
    path = arguments.config or environ.get("VISIONEDGE_CONFIG")
    document = read_file(Path(path)) if path else {}
    document = config.merge(document, config.from_environment(environ))
    document = config.merge(document, _overrides(arguments))
    if not document.get("cameras") and not path and not inside_iot_edge:
        # Somebody who just wants to see it run gets something to look at.
        document["cameras"] = {"demo": {"uri": "demo:"}}
    return document


def _overrides(arguments: argparse.Namespace) -> Document:
    over: Document = {}
    if arguments.camera:
        over["cameras"] = cameras(arguments.camera)
    if arguments.model:
        over["model"] = {"path": arguments.model, "url": None, "sha256": None}
    if arguments.device:
        over["inference"] = {"device": arguments.device}
    if arguments.http:
        over["http"] = config.http_address(arguments.http, "--http")
    return over
