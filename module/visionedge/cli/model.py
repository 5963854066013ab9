"""`visionedge model`: inspect a model, compile it, measure its accuracy."""

import argparse
import os
import sys
from pathlib import Path

from visionedge.cli.arguments import (
    DEVICES,
    Subparsers,
    add_command,
    add_group,
    add_json,
    add_runtime,
    choose_engine,
    data_folder,
    fraction,
    positive_integer,
    print_report,
)
from visionedge.config.load import merge, parse_config, read_environment
from visionedge.errors import ConfigError
from visionedge.runtime.installation import build_install_command


def add_parser(subparsers: Subparsers) -> None:
    """Add the command `model`."""
    commands = add_group(
        subparsers,
        "model",
        "inspect a model, compile it, measure its accuracy",
        "  visionedge model inspect yolov8n.onnx                 what it is, and how it will be compiled\n"
        "  visionedge model compile yolov8n.onnx -o fast.onnx    one graph from pixels to boxes\n"
        "  visionedge model eval yolov8n.onnx --coco instances.json --images photos/",
    )
    _add_inspect(commands)
    _add_compile(commands)
    _add_eval(commands)


# --- inspect ------------------------------------------------------------------------------------------------


def _add_inspect(commands: Subparsers) -> None:
    parser = add_command(
        commands,
        "inspect",
        _inspect,
        "report what a model is, on what evidence, how it is compiled, and where its nodes run",
        "  visionedge model inspect yolov8n.onnx\n"
        "  visionedge model inspect yolov8n.onnx --json | jq .cuda.withoutKernel",
        codes=(0, 2, 3),
        notes="A model that cannot be used is described as far as it could be read; the exit code is then 2.",
    )
    parser.add_argument("path", metavar="PATH", help="the model, an ONNX file")
    add_json(parser)
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="also open the model on this device, and report where each node runs",
    )


def _inspect(arguments: argparse.Namespace) -> int:
    from visionedge.ops.models.inspect import format_report, inspect_model

    inspection = inspect_model(Path(arguments.path), data_folder(os.environ), arguments.device)
    print_report(arguments, inspection.document, format_report(inspection))
    if inspection.refused is None:
        return 0
    print(f"visionedge: {inspection.refused}", file=sys.stderr)
    return 2


# --- compile ------------------------------------------------------------------------------------------------


def _add_compile(commands: Subparsers) -> None:
    parser = add_command(
        commands,
        "compile",
        _compile,
        "compile a model to one graph from pixels to boxes, for any onnxruntime; make other precisions of it",
        "  visionedge model compile yolov8n.onnx -o fast.onnx\n"
        "  visionedge detect photo.jpg --model fast.onnx         the result is an ordinary model\n"
        "  visionedge model compile yolov8n.onnx --precision int8 --calibrate photos/",
        codes=(0, 1, 2, 3),
        notes="input:    uint8 [N, H, W, 3], BGR, resized as the metadata visionedge.input says\n"
        "output:   float32 [N, K, 6]: left, top, right, bottom in pixels of the input, score 0-1, class;\n"
        "          sorted by falling score; boxes may overlap where visionedge.nms is true\n"
        "metadata: names (the labels, a JSON list) and visionedge.compiled (everything else)\n\n"
        "With --precision a variant of the model is made, compared with fp32, and written beside the model\n"
        "as MODEL.int8.onnx and MODEL.int8.json (the report), where the engine finds it. A variant that\n"
        "differs too much is rejected, with exit code 1. See docs/precision.md.",
    )
    parser.add_argument("path", metavar="PATH", help="the model, an ONNX file")
    parser.add_argument("-o", "--output", metavar="OUT", help="the file to write the compiled graph to")
    parser.add_argument(
        "--rows",
        type=positive_integer,
        default=None,
        metavar="K",
        help="the most detections per picture (default: 500)",
    )
    _add_precision(parser)


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        default="fp32",
        help="fp16 is for GPUs, int8 for CPUs with VNNI (default: %(default)s, the model as it is)",
    )
    parser.add_argument(
        "--calibrate",
        metavar="DIR",
        help="pictures (or a video) like those of the cameras: half set the ranges, half are the test",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="COCO annotations of those pictures: average precision (AP) is measured, too",
    )
    parser.add_argument(
        "--tolerance",
        type=fraction,
        metavar="X",
        help="the share of boxes that may differ, 0 to 1 (default: 0.1); with --labels AP may fall by 0.010",
    )
    parser.add_argument(
        "--recipe",
        metavar="WORDS",
        help="the recipe for int8, as in a report ('everything, behind the first 1'), instead of the fastest"
        " one on this machine: for a variant that other machines use",
    )
    parser.add_argument(
        "--thorough",
        action="store_true",
        help="tune the int8 ranges of every tensor (takes minutes longer), not only of those that need it",
    )
    parser.add_argument(
        "--into",
        metavar="DIR",
        help="the folder for the variant (default: that of the model, else the data folder)",
    )


def _compile(arguments: argparse.Namespace) -> int:
    from visionedge.ops.models.compile import compile_file

    if arguments.precision != "fp32":
        return _compile_variant(arguments)
    others = ("calibrate", "labels", "tolerance", "recipe", "thorough", "into")
    extra = [f"--{name}" for name in others if getattr(arguments, name)]
    if extra or not arguments.output:
        raise ConfigError(
            [
                f"{extra[0]}: needs --precision int8 or fp16"
                if extra
                else "-o OUT: is missing; name the file to write"
            ]
        )
    path, output = Path(arguments.path), Path(arguments.output)
    print(compile_file(path, output, data_folder(os.environ), arguments.rows), file=sys.stderr)
    return 0


def _compile_variant(arguments: argparse.Namespace) -> int:
    from visionedge.ops.models.compile import CompileRequest, compile_variant

    if arguments.precision != "int8":
        for name in ("recipe", "thorough"):
            if getattr(arguments, name):
                raise ConfigError([f"--{name}: needs --precision int8"])

    def path_of(name: str) -> Path | None:
        value = getattr(arguments, name)
        return Path(value) if value else None

    return compile_variant(
        CompileRequest(
            model=Path(arguments.path),
            precision=arguments.precision,
            data=data_folder(os.environ),
            calibrate=path_of("calibrate"),
            labels=path_of("labels"),
            unmatched=arguments.tolerance,
            into=path_of("into"),
            output=path_of("output"),
            rows=arguments.rows,
            recipe=arguments.recipe,
            thorough=arguments.thorough,
        )
    )


# --- eval ---------------------------------------------------------------------------------------------------


def _add_eval(commands: Subparsers) -> None:
    parser = add_command(
        commands,
        "eval",
        _eval,
        "measure average precision (AP) on annotated pictures, as COCO computes it",
        "  visionedge model eval yolov8n.onnx --coco instances_val2017.json --images val2017/\n"
        "  visionedge model eval yolov8n.onnx --coco mine.json --images mine/ --json | jq .ap",
        codes=(0, 1, 2, 3),
        notes="It uses the same pipeline as detect, every detection with a score of 0.01 or more, and 100\n"
        "per picture at most. Classes are matched with categories by name. It needs pycocotools:\n"
        f"{build_install_command('eval')}",
    )
    parser.add_argument("path", metavar="PATH", help="the model, an ONNX file")
    parser.add_argument(
        "--coco", required=True, metavar="FILE", help="the annotations, a JSON file in the format of COCO"
    )
    parser.add_argument("--images", required=True, metavar="DIR", help="the folder with their pictures")
    add_json(parser)
    parser.add_argument("--limit", type=positive_integer, metavar="N", help="use only the first N pictures")
    parser.add_argument(
        "--device",
        choices=DEVICES,
        help="where the model computes; auto: a GPU where one works, else the CPU"
        " (default: VISIONEDGE_DEVICE, else auto)",
    )
    add_runtime(parser)
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16", "int8"),
        default="fp32",
        help="the precision to evaluate; int8 and fp16: the variant of the model (default: %(default)s)",
    )


def _eval(arguments: argparse.Namespace) -> int:
    from visionedge.ops.models.evaluate import EvaluationRequest, evaluate, format_report

    document = merge(read_environment(os.environ), {"inference": choose_engine(arguments)})
    report = evaluate(
        EvaluationRequest(
            model=Path(arguments.path),
            coco=Path(arguments.coco),
            images=Path(arguments.images),
            inference=parse_config(document).inference,
            data=data_folder(os.environ),
            limit=arguments.limit,
        )
    )
    print_report(arguments, report, format_report(report))
    return 1 if report["missing"] else 0
