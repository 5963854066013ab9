"""What the verbs share: the parser with one-line errors, exit codes, and the kinds of arguments."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from visionedge.config import CAMERA_NAME, validate
from visionedge.documents import Document, located, read_configuration
from visionedge.errors import ConfigError
from visionedge.uris import redact

EXIT_CODES = (
    "exit codes: 0 fine, 1 the work failed, 2 bad arguments, 3 this machine cannot do what was demanded,\n"
    "75 (run only) the IoT Hub SDK hangs for good in this process: start it again"
)

DEVICES = ("auto", "cuda", "tensorrt", "cpu")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {redact(message)}; see {self.prog} --help\n")


Verbs = Any
"""argparse's subparsers action; its class has no public name."""


def verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int], help_line: str, examples: str
) -> argparse.ArgumentParser:
    """A verb, or a word below one, with its examples and what all of them take."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=help_line,
        description=help_line,
        epilog=f"examples:\n{examples}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default=os.environ.get("VISIONEDGE_LOG_LEVEL", "info"),
        help="how much is told on stderr (default: %(default)s, or VISIONEDGE_LOG_LEVEL)",
    )
    return parser


def add_model_and_device(parser: argparse.ArgumentParser) -> None:
    """What every verb that computes takes."""
    parser.add_argument(
        "--model", metavar="PATH", help="an ONNX file (default: the bundled YOLOX-nano, COCO-80)"
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        help="auto = CUDA where it works, else the CPU (default: auto)",
    )


def data_folder(environ: Mapping[str, str]) -> Path:
    """Where state lives: VISIONEDGE_DATA, else the user's data folder."""
    if folder := environ.get("VISIONEDGE_DATA"):
        return Path(folder)
    base = environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "visionedge"


def configuration_file(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Path | None:
    """The file that ``--config`` or VISIONEDGE_CONFIG names; None without one."""
    path = arguments.config or environ.get("VISIONEDGE_CONFIG")
    return Path(path) if path else None


@contextlib.contextmanager
def naming_lines(path: Path | None, environ: Mapping[str, str]) -> Iterator[None]:
    """Problems of the configuration that is read within, those of the file with its name and their line.

    The document may also come from the environment and from arguments; what the file alone is wrong in
    is a problem of the file.

    Raises:
        ConfigError: the one that was raised within, its problems told so.
    """
    try:
        yield
    except ConfigError as error:
        if path is None:
            raise
        try:
            validate(read_configuration(path, environ))
            of_file: set[str] = set()
        except ConfigError as alone:
            of_file = set(alone.problems)
        ours = [problem for problem in error.problems if problem in of_file]
        named = dict(zip(ours, located(ours, path), strict=True))
        raise ConfigError([named.get(problem, problem) for problem in error.problems]) from None


def seconds(text: str) -> float:
    """An argument above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no time above 0")
    return value


def share(text: str) -> float:
    """An argument from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not from 0 to 1")
    return value


def count(text: str) -> int:
    """An argument of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not 1 or more")
    return value


def cameras(pairs: Sequence[str]) -> Document:
    """`--camera NAME=URI`, given any number of times, as the cameras of a configuration."""
    found: Document = {}
    problems = []
    for pair in pairs:
        name, equals, uri = pair.partition("=")
        if not equals or not CAMERA_NAME.fullmatch(name):
            problems.append(f"--camera {redact(pair)}: write NAME=URI, with a NAME of a-z, 0-9, '_' and '-'")
        elif name in found:
            problems.append(f"--camera {name}: the name is given twice")
        found[name] = {"uri": uri}
    if problems:
        raise ConfigError(problems)
    return found
