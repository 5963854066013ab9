"""`visionedge run`: analyse cameras, answer over HTTP, and send results to IoT Hub."""

import argparse
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from visionedge.cli.arguments import (
    Subparsers,
    add_command,
    add_line_numbers,
    add_model_and_device,
    add_runtime,
    build_document,
    configuration_file,
    data_folder,
    positive_number,
)
from visionedge.config.addresses import URI_FORMS
from visionedge.config.documents import Document
from visionedge.config.load import parse_config

FAULT_INJECTION_VARIABLE = "VISIONEDGE_INJECT_FAULTS"
"""Set to 1, `run` has the option `--inject`."""

DEMO_CONFIDENCE = 0.4
"""For the bundled model on the bundled clip: the least confidence without false birds and balls."""

_VARIABLES = """\
  VISIONEDGE_CONFIG      the configuration file; --config wins
  VISIONEDGE_DATA        the folder of compiled models, unsent messages and the last good configuration
                         (default: visionedge in XDG_DATA_HOME, else ~/.local/share/visionedge)
  VISIONEDGE_MODEL       the model, an ONNX file; --model wins
  VISIONEDGE_DEVICE      auto, cuda, tensorrt, openvino-gpu, cpu or remote; --device wins
  VISIONEDGE_HTTP        HOST:PORT to listen on; --http wins
  VISIONEDGE_HTTP_TOKEN  the token that HTTP clients must send
  VISIONEDGE_REMOTE_TOKEN  the token for the servers of inference.remote
  VISIONEDGE_CORE_DUMPS  1: a crash may write the memory of the module, with its secrets, to a file
  VISIONEDGE_LOG_LEVEL   debug, info, warning or error; --log-level wins
  NAME                   any variable that the configuration file names as ${NAME}"""

_FAULT_INJECTION_MODULE = "visionedge.engine.process.fault_injection"
_CONFIGURING = ("config", "camera", "model", "device", "runtime", "http", "log_level")
"""Arguments that change the configuration."""

_STATE_FILES = ("spool", "sequences", "desired")


def add_parser(subparsers: Subparsers) -> None:
    """Add the command `run`."""
    parser = add_command(
        subparsers,
        "run",
        _run,
        "run the module: analyse cameras, answer over HTTP, send results to IoT Hub",
        "  visionedge run                                        the bundled clip, on http://127.0.0.1:8080/\n"
        "  visionedge run --camera dock=rtsp://192.0.2.5/stream1 --camera yard=yard.mp4\n"
        "  visionedge run --config vision.yaml --http 0.0.0.0:8080\n"
        "  visionedge run --messages out.jsonl --duration 60     the messages for IoT Hub, in a file",
        codes=(0, 1, 2, 3, 75),
        notes=f"environment variables:\n{_VARIABLES}",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="the configuration, YAML or JSON (default: VISIONEDGE_CONFIG)"
    )
    parser.add_argument(
        "--camera",
        action="append",
        default=[],
        metavar="[NAME=]URI",
        help="a camera, repeatable; one without a name becomes cam1, cam2 and so on; the URI is "
        f"{URI_FORMS.replace('%', '%%')}; N means /dev/videoN",
    )
    add_model_and_device(parser)
    add_runtime(parser)
    parser.add_argument("--http", metavar="[HOST:]PORT", help="where to listen (default: 127.0.0.1:8080)")
    parser.add_argument(
        "--messages", metavar="FILE", help="also append every outgoing message to this JSON Lines file"
    )
    parser.add_argument(
        "--duration",
        type=positive_number,
        metavar="SECONDS",
        help="stop this long after it became ready, or after it began to wait for its model or device",
    )
    if _fault_injection_enabled(os.environ):
        parser.add_argument("--inject", metavar="FILE", help="a script of faults for the engine, for tests")


def _fault_injection_enabled(environ: Mapping[str, str]) -> bool:
    """Whether faults may be injected: only on request, and never if the installed package lacks that part."""
    return (
        environ.get(FAULT_INJECTION_VARIABLE) == "1"
        and importlib.util.find_spec(_FAULT_INJECTION_MODULE) is not None
    )


def _run(arguments: argparse.Namespace) -> int:
    from visionedge.app.service import RunOptions, run
    from visionedge.iothub.desired_properties import DESIRED_FILE_NAME, ConfigurationSources, LastGoodFile
    from visionedge.iothub.identity import Identity

    identity, data = Identity.from_environ(os.environ), data_folder(os.environ)

    path = configuration_file(arguments, os.environ)

    def read() -> Document:
        document = build_run_document(arguments, os.environ, inside_iot_edge=identity is not None)
        with add_line_numbers(path, os.environ):
            parse_config(document)
        return document

    document = read()
    last_good = LastGoodFile(data / DESIRED_FILE_NAME, identity.owner) if identity else None
    with private_files(data):
        return run(
            RunOptions(
                config_sources=ConfigurationSources.read(document, last_good),
                data=data,
                messages=Path(arguments.messages) if arguments.messages else None,
                duration_s=arguments.duration,
                inject=Path(arguments.inject) if getattr(arguments, "inject", None) else None,
                reload=None if path is None else read,
                has_arguments=any(getattr(arguments, name) for name in _CONFIGURING),
            )
        )


@contextmanager
def private_files(data: Path) -> Iterator[None]:
    """Let only the owner read the files that the module writes: they hold frames, and passwords of cameras.

    That covers every file and folder that is made in this context, also by SQLite and by child processes. The
    access to state files of an earlier version in `data` is closed to other users.
    """
    before = os.umask(0o077)
    try:
        for path in (found for name in _STATE_FILES for found in data.glob(f"{name}*")):
            with suppress(OSError):
                if path.is_file() and not path.is_symlink():
                    path.chmod(path.stat().st_mode & 0o700)
        yield
    finally:
        os.umask(before)


def build_run_document(
    arguments: argparse.Namespace, environ: Mapping[str, str], *, inside_iot_edge: bool
) -> Document:
    """The configuration document of `run`; the bundled clip where no camera is configured."""
    path, document = configuration_file(arguments, environ), build_document(arguments, environ)
    if not document.get("cameras") and not path and not inside_iot_edge:
        # Without any configuration the bundled clip is shown.
        document["cameras"] = {"demo": {"uri": "demo:"}}
    if not path and _is_demo(document):
        document["inference"] = {"confidence": DEMO_CONFIDENCE, **document.get("inference", {})}
    return document


def _is_demo(document: Document) -> bool:
    """Whether the bundled model analyses the bundled clip and nothing else."""
    cameras = document.get("cameras", {})
    return not document.get("model") and bool(cameras) and all(c["uri"] == "demo:" for c in cameras.values())
