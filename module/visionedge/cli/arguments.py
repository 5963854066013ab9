"""What the verbs share: the parser with one-line errors, exit codes, and the kinds of arguments."""

import argparse
import contextlib
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from visionedge.config.documents import Document, add_locations, read_configuration
from visionedge.config.load import parse_config
from visionedge.config.schema import CAMERA_NAME_PATTERN
from visionedge.errors import ConfigError
from visionedge.runtime.redaction import mask_address, redact

log = logging.getLogger(__name__)

_EXIT_CODES = {
    0: "success",
    1: "the work failed",
    2: "wrong arguments or configuration",
    3: "this machine cannot do what was demanded",
    75: "a part of the module hung: start it again (run only)",
}

LOG_LEVELS = ("debug", "info", "warning", "error")
DEVICES = ("auto", "cuda", "tensorrt", "cpu")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the help of the command that was called."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {redact(message)}; see {self.prog} --help\n")

    def parse_command(self, words: Sequence[str]) -> argparse.Namespace:
        """The arguments of the command that these words call."""
        # argparse's parse_args reports what no parser understood as an error of the outermost parser.
        arguments, unknown = self.parse_known_args(words)
        if unknown:
            called: Parser = getattr(arguments, "parser", self)
            called.error(f"unrecognized arguments: {' '.join(unknown)}")
        return arguments


Subparsers = Any
"""argparse's subparsers action; its class has no public name."""


def describe_exit_codes(*codes: int) -> str:
    """These exit codes and what they mean, for a help text; all of them without arguments."""
    lines = [f"  {code:<3} {_EXIT_CODES[code]}" for code in codes or _EXIT_CODES]
    return "\n".join(["exit codes:", *lines])


def add_command(
    subparsers: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    help_line: str,
    examples: str,
    *,
    codes: Sequence[int] = (0, 2),
    notes: str = "",
) -> argparse.ArgumentParser:
    """A command with its examples, its notes, the exit codes that it can end with, and the common options."""
    paragraphs = (f"examples:\n{examples}", notes, describe_exit_codes(*codes))
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=help_line,
        description=help_line,
        epilog="\n\n".join(filter(None, paragraphs)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument(
        "--log-level",
        choices=LOG_LEVELS,
        default=os.environ.get("VISIONEDGE_LOG_LEVEL", "info"),
        help="log level (default: VISIONEDGE_LOG_LEVEL, else info)",
    )
    return parser


def add_model_and_device(parser: argparse.ArgumentParser, *, from_environment: bool = True) -> None:
    """What every command that computes takes; most of them look into the environment, too."""
    model, device = ("VISIONEDGE_MODEL, else ", "VISIONEDGE_DEVICE, else ") if from_environment else ("", "")
    parser.add_argument(
        "--model",
        metavar="PATH",
        help=f"the model, an ONNX file (default: {model}the bundled YOLOX-nano, COCO-80)",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        help=f"where the model computes; auto: CUDA where it works, else the CPU (default: {device}auto)",
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
def add_line_numbers(path: Path | None, environ: Mapping[str, str]) -> Iterator[None]:
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
            parse_config(read_configuration(path, environ))
            of_file: set[str] = set()
        except ConfigError as alone:
            of_file = set(alone.problems)
        ours = [problem for problem in error.problems if problem in of_file]
        named = dict(zip(ours, add_locations(ours, path), strict=True))
        raise ConfigError([named.get(problem, problem) for problem in error.problems]) from None


def supports_colours(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether a stream is a terminal that shows colours, and NO_COLOR does not forbid them."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def positive_number(text: str) -> float:
    """An argument above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}': must be greater than 0")
    return value


def fraction(text: str) -> float:
    """An argument from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}': must be between 0 and 1")
    return value


def positive_integer(text: str) -> int:
    """An argument of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}': must be 1 or more")
    return value


def parse_cameras(values: Sequence[str], others: Iterable[str] = ()) -> Document:
    """The values of `--camera`, each NAME=URI or a URI alone, as the cameras of a configuration.

    A URI alone gets the first free name of cam1, cam2 and so on; `others` are the names in the configuration
    file, which are not free either.

    Raises:
        ConfigError: a value names no camera, or two have the same name.
    """
    given: list[tuple[str | None, str]] = []
    problems: list[str] = []
    for value in values:
        try:
            given.append(_split_camera(value))
        except ConfigError as error:
            problems += error.problems
    names = [name for name, _ in given if name]
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    problems += [f"--camera {name}: the name is given twice" for name in twice]
    if problems:
        raise ConfigError(problems)
    taken = {*names, *others}
    free = (name for name in map("cam{}".format, itertools.count(1)) if name not in taken)
    found: Document = {}
    for name, uri in given:
        found[name or _announce_name(next(free), uri)] = {"uri": uri}
    return found


def _split_camera(value: str) -> tuple[str | None, str]:
    name, equals, uri = value.partition("=")
    if equals and CAMERA_NAME_PATTERN.fullmatch(name):
        return name, _expand_video_device(uri)
    # A '=' behind one of these belongs to the URI, as in http://192.0.2.5/video?channel=1.
    is_alone = not equals or any(character in name for character in "/:?")
    uri = _expand_video_device(value)
    exists = os.path.exists(value)  # noqa: PTH110 - unlike Path's, it answers False to impossible names
    if exists or (is_alone and any(character in uri for character in "/:.")):
        return None, uri
    raise ConfigError(
        [f"--camera {redact(value)}: write a URI or NAME=URI, with a NAME of a-z, 0-9, '_' and '-'"]
    )


def _expand_video_device(uri: str) -> str:
    """The URI; of a video device where that is given by its number or its path."""
    device = re.fullmatch(r"(?:/dev/video)?([0-9]{1,3})", uri)
    return f"v4l2:///dev/video{int(device[1])}" if device else uri


def _announce_name(name: str, uri: str) -> str:
    log.info("camera %s is %s; --camera NAME=URI sets another name", name, mask_address(uri))
    return name
