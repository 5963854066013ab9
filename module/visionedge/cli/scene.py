"""`visionedge scene`: run videos through the model, the tracker and the rules of a camera."""

import argparse
import difflib
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from visionedge.cli.arguments import (
    Subparsers,
    add_command,
    add_line_numbers,
    add_model_and_device,
    add_precision,
    add_runtime,
    choose_engine,
    configuration_file,
    data_folder,
    fraction,
)
from visionedge.config.documents import Document, read_configuration
from visionedge.config.label_keys import list_label_keys
from visionedge.config.load import merge, parse_config, read_environment
from visionedge.config.schema import CameraConfig, Config
from visionedge.errors import ConfigError

if TYPE_CHECKING:
    from visionedge.ops.scene_clips import SecondModelRequest

log = logging.getLogger(__name__)

_DEFAULT_START = datetime(1970, 1, 1, tzinfo=UTC)
_YEARS = range(1900, 9001)
"""Of `--start`: a clip and a time zone need room on both sides."""

_UNNAMED = "clip"
"""The camera of the tracks without a configuration."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command `scene`."""
    parser = add_command(
        subparsers,
        "scene",
        _scene,
        "run videos through the model, the tracker and the rules of a camera",
        "  visionedge scene dock.mp4 --config vision.yaml\n"
        "  visionedge scene dock.mp4 --config vision.yaml --camera dock --annotate out.mp4\n"
        "  visionedge scene *.mp4 --config vision.yaml --json --summary | jq .type\n"
        "  visionedge scene dock.mp4 --tracks tracks.txt               without a configuration: tracks only",
        codes=(0, 1, 2, 3),
        notes="Every picture is analysed: fps and gate do not count. The clock is that of the video. Several"
        " videos\nfollow each other on it, and all tracks end between them; who is inside is lost then.",
    )
    parser.add_argument("paths", nargs="+", metavar="CLIP", help="a video, or a folder of videos")
    parser.add_argument(
        "--config", metavar="FILE", help="the configuration, YAML or JSON (default: VISIONEDGE_CONFIG)"
    )
    parser.add_argument(
        "--camera", metavar="NAME", help="the camera whose rules count (default: the only one)"
    )
    parser.add_argument(
        "--start",
        metavar="TIME",
        help="when the first video was recorded, such as 2026-11-30T08:00:00+01:00, for 'at' and schedules;"
        " UTC without an offset (default: 1970-01-01T00:00:00Z)",
    )
    parser.add_argument("--json", action="store_true", help="print one event (JSON) per line instead of text")
    parser.add_argument(
        "--summary",
        action="store_true",
        help="at the end also print the totals of all zones and lines (JSON)",
    )
    parser.add_argument(
        "--annotate",
        metavar="OUT.mp4",
        help="also write a video with zones, lines, counts and tracks; of a second video OUT-2.mp4",
    )
    parser.add_argument(
        "--tracks", metavar="FILE", help="also write the tracks of each frame as MOTChallenge's text"
    )
    add_model_and_device(parser)
    add_runtime(parser)
    add_precision(parser)
    parser.add_argument(
        "--confidence",
        type=fraction,
        metavar="X",
        help="the camera's 'confidence', 0 to 1 (default: that of the configuration)",
    )


def _scene(arguments: argparse.Namespace) -> int:
    from visionedge.ops.scene_clips import SceneRequest, run_scene

    config = _read_config(arguments)
    name, camera = _choose_camera(arguments, config)
    if arguments.model:  # it replaces that of the camera, too
        camera = camera.model_copy(update={"model": None})
    model = config.find_model(camera.model)
    if model.url is not None:
        section = f"models.{camera.model}" if camera.model else "model"
        raise ConfigError([f"{section}.url: scene downloads no model; give its file with --model"])
    if arguments.confidence is not None:
        camera = camera.model_copy(update={"confidence": arguments.confidence})
    start = _parse_start(arguments.start)
    if arguments.start is None and any(zone.schedule for zone in camera.zones.values()):
        log.warning("a zone has a schedule: without --start the videos begin at 1970-01-01T00:00:00Z")
    if arguments.annotate and not arguments.annotate.lower().endswith(".mp4"):
        raise ConfigError([f"--annotate {arguments.annotate}: the name must end with .mp4"])
    return run_scene(
        SceneRequest(
            paths=tuple(arguments.paths),
            model=Path(model.path) if model.path else None,
            inference=config.find_inference(camera.model),
            name=name,
            camera=camera,
            start=start,
            as_json=arguments.json,
            summary=arguments.summary,
            annotate=Path(arguments.annotate) if arguments.annotate else None,
            tracks=Path(arguments.tracks) if arguments.tracks else None,
            data=data_folder(os.environ),
            second=_find_second_model(config, name, camera),
        )
    )


def _find_second_model(config: Config, name: str, camera: CameraConfig) -> "SecondModelRequest | None":
    from visionedge.ops.scene_clips import SecondModelRequest

    if camera.then is None:
        return None
    wanted = camera.then.model
    model = config.models[wanted]
    if model.url is not None:
        raise ConfigError([f"models.{wanted}.url: scene downloads no model; give its file as 'path'"])
    # Without those of `inference.classes`: its labels are answers about objects, not objects.
    inference = config.find_inference(wanted).model_copy(update={"classes": model.classes})
    alone = config.model_copy(update={"cameras": {name: camera}})
    return SecondModelRequest(
        Path(model.path) if model.path else None, inference, list_label_keys(alone)[wanted]
    )


def _read_config(arguments: argparse.Namespace) -> Config:
    path = configuration_file(arguments, os.environ)
    document = read_configuration(path, os.environ) if path else {}
    overrides: Document = {"inference": choose_engine(arguments)}
    if arguments.model:
        overrides["model"] = {"path": arguments.model, "url": None, "sha256": None}
    document = merge(merge(document, read_environment(os.environ)), overrides)
    with add_line_numbers(path, os.environ):
        return parse_config(document)


def _choose_camera(arguments: argparse.Namespace, config: Config) -> tuple[str, CameraConfig]:
    """The camera with this name, or the only one; without any, one that has no rules.

    Raises:
        ConfigError: there is none with this name, or a name is needed.
    """
    wanted, names = arguments.camera, list(config.cameras)
    listed = f"the configuration has {', '.join(names)}" if names else "the configuration has no camera"
    if wanted is None:
        if len(names) > 1:
            raise ConfigError([f"--camera: is missing, and {listed}"])
        name = names[0] if names else _UNNAMED
        return name, config.cameras.get(name) or CameraConfig(uri="demo:")
    if wanted not in config.cameras:
        near = difflib.get_close_matches(wanted, names, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError([f"--camera {wanted}: there is no such camera; {hint}{listed}"])
    return wanted, config.cameras[wanted]


def _parse_start(text: str | None) -> datetime:
    if text is None:
        return _DEFAULT_START
    try:
        start = datetime.fromisoformat(text)
        if start.year in _YEARS:
            return start.replace(tzinfo=start.tzinfo or UTC).astimezone(UTC)
    except ValueError:
        pass
    raise ConfigError([f"--start {text}: must be a time such as 2026-11-30T08:00:00+01:00"])
