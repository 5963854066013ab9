"""What the commands share: the parser with one-line errors, exit codes, types of arguments, common options.

`build_document` merges file, environment and arguments, for the commands that take a configuration.
"""

import argparse
import contextlib
import itertools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from visionedge.config.documents import Document, add_locations, read_configuration
from visionedge.config.load import merge, parse_config, parse_http_address, read_environment
from visionedge.config.schema import CAMERA_NAME_PATTERN
from visionedge.errors import ConfigError, VisionedgeError
from visionedge.runtime.files import write_atomically
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
# Not tensorrt, which no image brings; `inference.device` and VISIONEDGE_DEVICE take it.
DEVICES = ("auto", "cuda", "openvino-gpu", "cpu", "remote")
RUNTIMES = ("auto", "onnxruntime", "openvino")
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8")


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the help of the command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {redact(message)}; see {self.prog} --help\n")

    def parse_command(self, words: Sequence[str]) -> argparse.Namespace:
        """The arguments of the command in `words`; exits with 2 if they are wrong."""
        # argparse's own parse_args reports unknown arguments as an error of the outermost parser.
        arguments, unknown = self.parse_known_args(words)
        if unknown:
            called: Parser = getattr(arguments, "parser", self)
            called.error(f"unrecognized arguments: {' '.join(unknown)}")
        return arguments


Subparsers = Any
"""argparse's subparsers action; its class has no public name."""


def describe_exit_codes(*codes: int) -> str:
    """Exit codes and their meaning, for a help text; all of them without arguments."""
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
    """Add a command with its examples, its notes, its exit codes and the common options."""
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
        help="log level (default: VISIONEDGE_LOG_LEVEL, else info)",
    )
    return parser


def add_group(
    subparsers: Subparsers,
    name: str,
    help_line: str,
    examples: str,
    *,
    title: str = "commands",
    metavar: str = "COMMAND",
) -> Subparsers:
    """Add a command that has commands of its own, and return the place for these."""
    parser = add_command(subparsers, name, lambda _: ConfigError.exit_code, help_line, examples)
    return parser.add_subparsers(title=title, metavar=metavar, required=True, parser_class=Parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option `--json`; see `print_report`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def add_number(
    parser: argparse.ArgumentParser,
    name: str,
    parse: Callable[[str], float],
    default: float,
    help_line: str,
    *,
    metavar: str = "N",
) -> None:
    """Add an option with a number and its default."""
    help_line += " (default: %(default)s)"
    parser.add_argument(name, type=parse, default=default, metavar=metavar, help=help_line)


def add_model_and_device(parser: argparse.ArgumentParser, *, from_environment: bool = True) -> None:
    """Add the options of every command that runs a model; most of them also read the environment."""
    model, device = ("VISIONEDGE_MODEL, else ", "VISIONEDGE_DEVICE, else ") if from_environment else ("", "")
    parser.add_argument(
        "--model",
        metavar="PATH",
        help=f"the model, an ONNX file (default: {model}the bundled YOLOX-nano, COCO-80)",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        help="where the model computes; auto: a GPU where one works, else the CPU; remote: the servers of"
        f" inference.remote in the configuration (default: {device}auto)",
    )


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """Add the option `--runtime` of commands that take the runtime of the CPU."""
    parser.add_argument(
        "--runtime",
        choices=RUNTIMES,
        help="what computes on the CPU, inference.runtime; openvino needs the extra of this name (default:"
        " that of the configuration, else auto)",
    )


def choose_engine(arguments: argparse.Namespace) -> Document:
    """The section `inference` with the values of `--device`, `--runtime` and `--precision` that are given."""
    names = ("device", "runtime", "precision")
    given = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in given.items() if value}


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Add the option `--precision` of commands that take the precision which the module would take."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="inference.precision; auto: what `run` has chosen on this machine, else fp32 (default: that"
        " of the configuration, else auto)",
    )


def data_folder(environ: Mapping[str, str]) -> Path:
    """The folder of state files: VISIONEDGE_DATA, else visionedge in the user's data folder."""
    if folder := environ.get("VISIONEDGE_DATA"):
        return Path(folder)
    base = environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "visionedge"


def configuration_file(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Path | None:
    """The file that ``--config`` or VISIONEDGE_CONFIG names; None without one."""
    path = arguments.config or environ.get("VISIONEDGE_CONFIG")
    return Path(path) if path else None


def build_document(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Document:
    """The configuration document of a command: the file, the environment over it, the arguments over both.

    Raises:
        ConfigError: the file cannot be read, or an argument is wrong.
    """
    path = configuration_file(arguments, environ)
    document = merge(read_configuration(path, environ) if path else {}, read_environment(environ))
    overrides: Document = {}
    if cameras := getattr(arguments, "camera", None):
        configured = document.get("cameras")
        overrides["cameras"] = parse_cameras(cameras, configured if isinstance(configured, dict) else ())
    if arguments.model:
        overrides["model"] = {"path": arguments.model, "url": None, "sha256": None}
    if inference := choose_engine(arguments):
        overrides["inference"] = inference
    if arguments.http:
        overrides["http"] = parse_http_address(arguments.http, "--http")
    if arguments.log_level:
        overrides["log"] = {"level": arguments.log_level}
    return merge(document, overrides)


@contextlib.contextmanager
def add_line_numbers(path: Path | None, environ: Mapping[str, str]) -> Iterator[None]:
    """Add the name of the file and the line to problems of a configuration that is read in this context.

    The document may also come from the environment and from arguments; only problems that the file has by
    itself get a line.

    Raises:
        ConfigError: the one that was raised in the context, with lines.
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
    """Whether a stream is a terminal with colours, and NO_COLOR is not set."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def print_report(arguments: argparse.Namespace, document: Document, text: str) -> None:
    """Print a result on stdout: the document with `--json`, else the text."""
    sys.stdout.write(json.dumps(document, indent=1, ensure_ascii=False) + "\n" if arguments.json else text)


# Types of arguments. argparse shows the name of a type function for a ValueError, so they raise none.


def positive_number(text: str) -> float:
    """A number greater than 0."""
    value = _parse_number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"'{text}': must be greater than 0")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = _parse_number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}': must be between 0 and 1")
    return value


def positive_integer(text: str) -> int:
    """A whole number of 1 or more."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': must be a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}': must be 1 or more")
    return value


def _parse_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}': must be a number")
    return value


def parse_cameras(values: Sequence[str], others: Iterable[str] = ()) -> Document:
    """The values of `--camera`, each NAME=URI or only a URI, as the section `cameras` of a configuration.

    Without a name a camera gets the first free one of cam1, cam2 and so on; `others` are the names in the
    configuration file, which are not free.

    Raises:
        ConfigError: a value is no camera, or two have the same name.
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
        [f"--camera {redact(value)}: write URI or NAME=URI, with a NAME of a-z, 0-9, '_' and '-'"]
    )


def _expand_video_device(uri: str) -> str:
    """The URI of a video device if its number or path is given, else the URI as it is."""
    device = re.fullmatch(r"(?:/dev/video)?([0-9]{1,3})", uri)
    return f"v4l2:///dev/video{int(device[1])}" if device else uri


def _announce_name(name: str, uri: str) -> str:
    log.info("camera %s is %s; --camera NAME=URI sets another name", name, mask_address(uri))
    return name


def write_output_file(path: Path, text: str, *, replace: bool, secret: bool) -> None:
    """Write a file that a command made; one that is `secret` can be read by its owner only.

    Raises:
        ConfigError: the file exists, and `replace` is false.
        VisionedgeError: it cannot be written; nothing is left behind.
    """
    if os.path.lexists(path) and not replace:
        raise ConfigError([f"{path}: exists already; --force replaces it"])
    try:
        write_atomically(path, text.encode(), durable=True, mode=0o600 if secret else 0o666)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a valid file name or text"
        raise VisionedgeError(f"{path}: cannot be written: {reason}") from None
