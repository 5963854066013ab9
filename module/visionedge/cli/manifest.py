"""`visionedge manifest`: what belongs to a deployment: its costs, the schema of its configuration."""

import argparse
import json
import os
import sys
from pathlib import Path

from visionedge import config
from visionedge.cli.arguments import Parser, Verbs, verb
from visionedge.documents import read_file


def add_parser(verbs: Verbs) -> None:
    """Add the verb `manifest`."""
    parser = verb(
        verbs,
        "manifest",
        lambda _: 2,
        "what belongs to a deployment",
        "  visionedge manifest estimate --config vision.yaml  messages, 4 KB blocks, IoT Hub units a day\n"
        "  visionedge manifest schema > vision.schema.json    the JSON Schema of a configuration",
    )
    deeds = parser.add_subparsers(title="deeds", metavar="DEED", required=True, parser_class=Parser)
    _add_estimate(deeds)
    verb(
        deeds,
        "schema",
        _schema,
        "the JSON Schema of a configuration, the same for files and for desired properties",
        "  visionedge manifest schema > vision.schema.json",
    )


def _add_estimate(deeds: Verbs) -> None:
    parser = verb(
        deeds,
        "estimate",
        _estimate,
        "messages, 4 KB blocks and IoT Hub units a day, from a configuration",
        "  visionedge manifest estimate --config vision.yaml\n"
        "  visionedge manifest estimate --config vision.yaml --fps 25 --detections 8 --changes 30 --json",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON; also VISIONEDGE_CONFIG")
    parser.add_argument(
        "--fps", type=_rate, default=10.0, metavar="N", help="of cameras without fps (default: %(default)s)"
    )
    parser.add_argument(
        "--detections",
        type=_whole,
        default=3,
        metavar="N",
        help="objects on a picture (default: %(default)s)",
    )
    parser.add_argument(
        "--changes",
        type=_rate_or_none,
        default=6.0,
        metavar="N",
        help="times a minute that something changes before a camera (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of words")


def _estimate(arguments: argparse.Namespace) -> int:
    from visionedge.ops.estimate import Assumed, estimate, words

    path = arguments.config or os.environ.get("VISIONEDGE_CONFIG")
    document = read_file(Path(path)) if path else {}
    assumed = Assumed(arguments.fps, arguments.detections, arguments.changes)
    made = estimate(config.validate(document), assumed)
    if arguments.json:
        print(json.dumps(made.document()))
    else:
        sys.stdout.write(words(made))
    return 0


def _schema(_arguments: argparse.Namespace) -> int:
    from visionedge.schema import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
    return 0


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"'{text}' is no rate above 0 and up to 1000")
    return value


def _rate_or_none(text: str) -> float:
    return 0.0 if float(text) == 0 else _rate(text)


def _whole(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"'{text}' is not from 0 to 100")
    return value
