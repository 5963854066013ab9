"""`visionedge detect`: find objects in pictures, folders of pictures, and videos."""

import argparse
import os
from pathlib import Path

from visionedge.cli.arguments import (
    Subparsers,
    add_command,
    add_model_and_device,
    add_precision,
    add_runtime,
    choose_engine,
    data_folder,
    fraction,
    positive_integer,
)
from visionedge.config.load import merge, parse_config, read_environment


def add_parser(subparsers: Subparsers) -> None:
    """Add the command `detect`."""
    parser = add_command(
        subparsers,
        "detect",
        _detect,
        "find objects in pictures, folders of pictures, and videos",
        "  visionedge detect photo.jpg\n"
        "  visionedge detect photos/ clip.mp4 --annotate out/     draw the boxes\n"
        "  visionedge detect clip.mp4 --vid-stride 5              every fifth frame of a video\n"
        "  visionedge detect photos/ --json --confidence 0.25 | jq '.detections[].label'",
        codes=(0, 1, 2, 3),
        notes="exit code 1 also means that a picture or a video could not be read; the others are still done",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="a picture, a folder of pictures, or a video"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one frame object (JSON) per line instead of text"
    )
    parser.add_argument(
        "--annotate",
        metavar="DIR",
        help="also write each picture with its boxes, and each video as MP4, into this folder",
    )
    parser.add_argument(
        "--vid-stride",
        type=positive_integer,
        default=1,
        metavar="N",
        help="analyse every Nth frame of a video; frames keep their numbers and times (default: 1)",
    )
    add_model_and_device(parser)
    add_runtime(parser)
    add_precision(parser)
    parser.add_argument(
        "--confidence",
        type=fraction,
        metavar="X",
        help="the lowest score that is printed, 0 to 1 (default: 0.3)",
    )
    parser.add_argument(
        "--iou",
        type=fraction,
        metavar="X",
        help="boxes of one class with a higher overlap (IoU) count as one object, 0 to 1 (default: 0.5)",
    )
    parser.add_argument(
        "--classes",
        action="append",
        metavar="LABEL[,LABEL…]",
        help="only these labels; may be given more than once (default: all)",
    )


def _detect(arguments: argparse.Namespace) -> int:
    from visionedge.ops.detect import DetectRequest, run_detect

    inference = choose_engine(arguments)
    if arguments.confidence is not None:
        inference["confidence"] = arguments.confidence
    if arguments.iou is not None:
        inference["iou"] = arguments.iou
    if arguments.classes:
        inference["classes"] = [label for group in arguments.classes for label in group.split(",") if label]
    document = merge(read_environment(os.environ), {"inference": inference})
    checked = parse_config(document)
    model = arguments.model or checked.model.path
    return run_detect(
        DetectRequest(
            paths=tuple(arguments.paths),
            model=Path(model) if model else None,
            inference=checked.inference,
            as_json=arguments.json,
            annotate=Path(arguments.annotate) if arguments.annotate else None,
            video_stride=arguments.vid_stride,
            data=data_folder(os.environ),
        )
    )
