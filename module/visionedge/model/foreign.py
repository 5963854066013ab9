"""Files that are given as models and are not ONNX: what they are, and how to get an ONNX file instead."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 1 << 16
"""How much of a file's beginning is enough."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """`magics` are (offset, bytes) of its beginning; `{name}` in `remedy` is the file's name."""

    what: str
    remedy: str
    suffixes: tuple[str, ...] = ()
    magics: tuple[tuple[int, bytes], ...] = ()


_ULTRALYTICS = "yolo export model={name} format=onnx"
_KINDS: Sequence[_Kind] = (
    _Kind(
        "a Git LFS pointer",
        "fetch the file with: git lfs pull",
        magics=((0, b"version https://git-lfs"),),
    ),
    _Kind(
        "a web page",
        "the download gave it instead of the model: download it again",
        magics=((0, b"<!DOCTYPE html"), (0, b"<!doctype html"), (0, b"<html")),
    ),
    _Kind(
        "a PyTorch model",
        f"export it to ONNX: {_ULTRALYTICS} (Ultralytics), else torch.onnx.export",
        (".pt", ".pth", ".torchscript", ".ckpt"),
        ((0, b"\x80\x02"), (0, b"\x80\x04")),
    ),
    _Kind(
        "a TensorRT engine, which only runs on the kind of GPU that it was built on",
        "give the ONNX file that it was built from; TensorRT builds its own from that",
        (".engine", ".trt", ".plan"),
        ((0, b"ftrt"),),
    ),
    _Kind(
        "a TensorFlow Lite model",
        "export the model it was made from to ONNX: yolo export model=best.pt format=onnx (Ultralytics), "
        "or python -m tf2onnx.convert --tflite {name} --output model.onnx",
        (".tflite",),
        ((4, b"TFL3"),),
    ),
    _Kind(
        "an OpenVINO model",
        "export the model it was made from to ONNX: yolo export model=best.pt format=onnx (Ultralytics)",
        (".xml", ".bin"),
        ((0, b"<?xml"), (0, b"<net ")),
    ),
    _Kind(
        "a Keras model",
        "convert it to ONNX: python -m tf2onnx.convert --keras {name} --output model.onnx",
        (".h5", ".hdf5", ".keras"),
        ((0, b"\x89HDF\r\n"),),
    ),
    _Kind(
        "a file of weights alone (safetensors), without the network",
        "load it with the program that trained it, and export ONNX there, as optimum-cli export onnx does",
        (".safetensors",),
        ((8, b'{"'),),
    ),
    _Kind(
        "a TensorFlow model",
        "convert it to ONNX: python -m tf2onnx.convert --saved-model FOLDER --output model.onnx",
        (".pb",),
    ),
    _Kind(
        "a Core ML model",
        "export the model it was made from to ONNX: yolo export model=best.pt format=onnx (Ultralytics)",
        (".mlmodel", ".mlpackage"),
    ),
    _Kind(
        "an ncnn model",
        "export the model it was made from to ONNX",
        (".param",),
        ((0, b"7767517"),),
    ),
    _Kind(
        "a Paddle model",
        "convert it to ONNX: paddle2onnx --model_dir FOLDER --save_file model.onnx",
        (".pdmodel", ".pdiparams", ".pdparams"),
    ),
    _Kind("a Darknet model", "convert it to ONNX with a port of it to PyTorch", (".weights", ".cfg")),
    _Kind("an RKNN model", "give the ONNX file that it was built from", (".rknn",), ((0, b"RKNN"),)),
    _Kind("a compressed file", "unpack it", (".gz", ".tgz", ".zip", ".tar"), ((0, b"\x1f\x8b"),)),
)


def foreign_kind(path: Path, head: bytes) -> str | None:
    """What a file is that is no ONNX, by its first bytes, else by its name; and what to do. None: unknown."""
    # What PyTorch saves is an archive, and Ultralytics writes a description in front of an engine.
    zipped = head.startswith(b"PK\x03\x04")
    if zipped and b"data.pkl" in head:
        return _words(next(kind for kind in _KINDS if ".pt" in kind.suffixes), path)
    found = next((kind for kind in _KINDS if _begins(kind, head)), None)
    suffix = path.suffix.lower()
    found = found or next((kind for kind in _KINDS if suffix in kind.suffixes), None)
    if found is None and zipped:
        found = _KINDS[-1]
    return None if found is None else _words(found, path)


def _begins(kind: _Kind, head: bytes) -> bool:
    return any(head[start : start + len(magic)] == magic for start, magic in kind.magics)


def _words(kind: _Kind, path: Path) -> str:
    return f"is no ONNX file but {kind.what}; {kind.remedy.replace('{name}', path.name)}"
