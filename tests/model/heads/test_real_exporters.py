"""Models that the real packages export, decoded as the packages themselves do.

torch, torchvision, transformers and ultralytics are no dependencies: CONTRIBUTING.md says how to run these
tests. The networks have random weights, so nothing is downloaded.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_graphs import compiled_rows
from visionedge.model.model import Model, load_model
from visionedge.model.postprocess import suppress_non_maxima

# The packages warn of many things that are theirs.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]

WHERE = "is not installed; CONTRIBUTING.md, 'Check against the real exporters', says how to run this test"
BEST, LEAST = 30, 24
IOU = 0.7
Rows = NDArray[np.float64]
Spreads = Mapping[str, tuple[float, float]]
"""By a regular expression for the names of layers: the mean and the deviation of what they shall give."""


def _package(name: str) -> Any:
    """A package that is no dependency; the test is skipped without it."""
    return pytest.importorskip(name, reason=f"{name} {WHERE}")


def _seeded() -> Any:
    """torch, with its random numbers begun anew."""
    torch = _package("torch")
    torch.manual_seed(7)
    torch.set_num_threads(1)  # several wait for each other in loops, for minutes on a busy machine
    return torch


def _picture(width_px: int, height_px: int) -> NDArray[np.uint8]:
    """Coloured blocks of several sizes and some noise (BGR): features differ from place to place."""
    random = np.random.default_rng(11)
    picture = np.zeros((height_px, width_px, 3))
    for side in (8, 32, 96):
        rows, columns = -(-height_px // side), -(-width_px // side)
        blocks = random.integers(0, 85, (rows, columns, 3))
        picture += blocks.repeat(side, 0).repeat(side, 1)[:height_px, :width_px]
    return picture.astype(np.uint8)


def _tensor(torch: Any, picture: NDArray[np.uint8]) -> Any:
    """RGB of 0-1, (3, H, W)."""
    rgb = picture[..., ::-1].astype(np.float32).transpose(2, 0, 1) / 255
    return torch.from_numpy(np.ascontiguousarray(rgb))


def _ours(model: Model, picture: NDArray[np.uint8]) -> Rows:
    """Rows (left, top, right, bottom, score, class) of a picture that has the model's own size."""
    assert (model.input.height_px, model.input.width_px) == picture.shape[:2]
    rows: Rows = compiled_rows(model, picture[None])[0].astype(np.float64)
    found: Rows = rows[rows[:, 4] > 0]
    if model.interpretation.needs_nms:
        found = found[suppress_non_maxima(found[:, :4], found[:, 4], found[:, 5].astype(np.int64), IOU)]
    return found


def _found_among(best: Rows, others: Rows) -> int:
    """How many of the rows stand among the others: same class, score within 0.001, sides within a pixel."""
    count = 0
    for row in best:
        near = others[others[:, 5] == row[5]]
        near = near[np.abs(near[:, 4] - row[4]) <= 1e-3]
        count += bool(len(near)) and bool((np.abs(near[:, :4] - row[:4]).max(axis=1) <= 1).any())
    return count


def _inside(rows: Rows, picture: NDArray[np.uint8]) -> Rows:
    """Boxes cut off at the edges of the picture, as the module reports them."""
    height_px, width_px = picture.shape[:2]
    return np.concatenate([rows[:, :4].clip(0, [width_px, height_px] * 2), rows[:, 4:]], axis=1)


def _agree(ours: Rows, theirs: Rows, picture: NDArray[np.uint8]) -> None:
    """The best rows of each stand among the other's; they are many, and of many places."""
    ours, theirs = _inside(ours, picture), _inside(theirs, picture)
    theirs = theirs[np.argsort(-theirs[:, 4], kind="stable")]
    assert min(len(theirs), len(ours)) >= LEAST, f"{len(theirs)} rows of theirs, {len(ours)} of ours"
    top, own = theirs[:BEST], ours[:BEST]
    assert len(np.unique(top[:, :4].round(), axis=0)) >= LEAST // 2
    assert _found_among(top, ours) == len(top)
    assert _found_among(own, theirs) == len(own)


def _of_torchvision(result: dict[str, Any]) -> Rows:
    columns = [result["boxes"], result["scores"][:, None], result["labels"][:, None]]
    return np.concatenate([column.numpy().astype(np.float64) for column in columns], axis=1)


def _as_if_trained(torch: Any, network: Any, run: Callable[[], Any], last: Spreads) -> None:
    """Give a random network values as training would: normalisations that fit, and last layers that differ.

    `last` has, by a regular expression for the name of a layer, the mean and the deviation of what it gives.
    """
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        run()
        for norm in norms:
            norm.eval()
        for name, layer in network.named_modules():
            for pattern, (mean, deviation) in last.items():
                if re.search(pattern, name) and hasattr(layer, "weight"):
                    _spread(torch, layer, run, mean, deviation)


def _spread(torch: Any, layer: Any, run: Callable[[], Any], mean: float, deviation: float) -> None:
    """Scale a layer so that each of its channels differs that much from place to place, around that mean."""
    seen: list[Any] = []
    channels = 1 if isinstance(layer, torch.nn.Conv2d) else -1
    handle = layer.register_forward_hook(
        lambda _module, _given, result: seen.append(result.movedim(channels, -1).flatten(0, -2))
    )
    run()
    handle.remove()
    if not seen:  # kept for training only
        return
    values = torch.cat(seen)
    means = values.mean(0)
    factor = deviation / max(float((values - means).std()), 1e-6)
    layer.weight.mul_(factor)
    layer.bias.copy_(mean - factor * (means - layer.bias))


SMALL = {"min_size": 320, "max_size": 480, "score_thresh": 0.01}
TORCHVISION: dict[str, tuple[str, dict[str, Any], Spreads]] = {
    "faster-rcnn": (
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        {"box_score_thresh": 0.01},
        {r"rpn.head.cls_logits": (0, 2), r"bbox_pred": (0, 0.5), r"cls_score": (0, 2)},
    ),
    "retinanet": ("retinanet_resnet50_fpn", SMALL, {r"\.cls_logits": (-3, 1.5), r"\.bbox_reg": (0, 0.5)}),
    "fcos": (
        "fcos_resnet50_fpn",
        SMALL,
        {r"\.cls_logits": (-3, 1.5), r"\.bbox_reg": (3, 1), r"\.bbox_ctrness": (0, 1)},
    ),
    "ssdlite": (
        "ssdlite320_mobilenet_v3_large",
        {"score_thresh": 0.01},
        {r"classification_head.module_list.\d.1$": (0, 2), r"regression_head.module_list.\d.1$": (0, 1)},
    ),
}


@pytest.mark.parametrize("kind", TORCHVISION)
def test_a_torchvision_export_gives_the_boxes_of_torchvision(kind: str, tmp_path: Path) -> None:
    torch, torchvision = _seeded(), _package("torchvision")
    name, options, last = TORCHVISION[kind]
    make = getattr(torchvision.models.detection, name)
    model = make(weights=None, weights_backbone=None, num_classes=21, **options).eval()
    picture = _picture(640, 480)
    pixels = _tensor(torch, picture)
    _as_if_trained(torch, model, lambda: model([pixels, pixels.flip(2)]), last)
    path = tmp_path / "m.onnx"
    torch.onnx.export(model.eval(), ([torch.rand(3, 480, 640)],), str(path), opset_version=11, dynamo=False)
    with torch.no_grad():
        theirs = _of_torchvision(model([pixels])[0])
    loaded = load_model(path)
    assert loaded.head == "torchvision"
    _agree(_ours(loaded, picture), theirs, picture)


TINY_DETR = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 60,
    "num_labels": 11,
}
TINY_QUERIES = TINY_DETR | {
    "encoder_layers": 1,
    "encoder_hidden_dim": 64,
    "decoder_in_channels": [64, 64, 64],
    "anchor_image_size": None,
}
STRAIGHT = {r"class_labels_classifier(.layers.2)?$": (0, 2), r"bbox_predictor.layers.2$": (0, 1)}
REFINED = {
    r"(class_embed.\d|enc_score_head)$": (-2, 1.5),
    r"(bbox_embed.\d|enc_bbox_head).layers.[12]$": (0, 0.5),
}


def _detr(transformers: Any) -> Any:
    backbone = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    return transformers.DetrForObjectDetection(
        transformers.DetrConfig(backbone_config=backbone, init_std=0.3, **TINY_DETR)
    )


def _yolos(transformers: Any) -> Any:
    config = transformers.YolosConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=[256, 320],
        num_detection_tokens=60,
        num_labels=11,
        initializer_range=0.2,
    )
    network = transformers.YolosForObjectDetection(config)
    for name, weights in network.named_parameters():
        if name.endswith(("detection_tokens", "position_embeddings")):  # they begin as zeros
            weights.data.normal_()
    return network


def _rtdetr(transformers: Any) -> Any:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 256],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[64, 128, 256], **TINY_QUERIES
    )
    return transformers.RTDetrForObjectDetection(config)


def _dfine(transformers: Any) -> Any:
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, 16, 16],
        stage_in_channels=[16, 32, 64, 128],
        stage_mid_channels=[16, 16, 32, 32],
        stage_out_channels=[32, 64, 128, 256],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
        hidden_sizes=[32, 64, 128, 256],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.DFineConfig(
        backbone_config=backbone, encoder_in_channels=[64, 128, 256], **TINY_QUERIES
    )
    return transformers.DFineForObjectDetection(config)


TRANSFORMERS: dict[str, tuple[Callable[[Any], Any], str, Spreads, str]] = {
    "detr": (_detr, "DetrImageProcessor", STRAIGHT, "detr-softmax"),
    "yolos": (_yolos, "YolosImageProcessor", STRAIGHT, "detr-softmax"),
    "rt-detr": (_rtdetr, "RTDetrImageProcessor", REFINED, "detr-raw"),
    "d-fine": (_dfine, "RTDetrImageProcessor", REFINED, "detr-raw"),
}


def _two_outputs(torch: Any, network: Any) -> Any:
    """The network with what its exporters keep: logits and boxes."""

    class Two(torch.nn.Module):  # type: ignore[misc] # torch is Any here
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, pixel_values: Any) -> Any:
            result = self.network(pixel_values=pixel_values)
            return result.logits, result.pred_boxes

    return Two().eval()


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_detr_of_transformers_gives_the_boxes_of_its_image_processor(kind: str, tmp_path: Path) -> None:
    torch, transformers = _seeded(), _package("transformers")
    make, processor_name, last, head = TRANSFORMERS[kind]
    network = make(transformers).eval()
    processor = getattr(transformers, processor_name)()
    picture = _picture(320, 256)
    rgb = np.ascontiguousarray(picture[..., ::-1])
    pixels = processor(images=rgb, do_resize=False, return_tensors="pt")["pixel_values"]
    _as_if_trained(torch, network, lambda: network(torch.cat([pixels, pixels.flip(3)])), last)
    path = tmp_path / "m.onnx"
    torch.onnx.export(
        _two_outputs(torch, network),
        (torch.rand(1, 3, 256, 320),),
        str(path),
        input_names=["pixel_values"],
        output_names=["logits", "pred_boxes"],
        opset_version=17,
        dynamo=False,
    )
    with torch.no_grad():
        outputs = network(pixels)
    done = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(256, 320)])[0]
    loaded = load_model(path)
    assert loaded.head == head
    _agree(_ours(loaded, picture), _of_torchvision(done), picture)


SCORES = (-6, 1.5)
ULTRALYTICS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "yolov5": ("yolov5n.yaml", "yolov8", {}),
    "yolov8": ("yolov8n.yaml", "yolov8", {}),
    "yolov9": ("yolov9t.yaml", "yolov8", {}),
    "yolov10": ("yolov10n.yaml", "yolov8", {}),
    "yolov10-nms": ("yolov10n.yaml", "yolov10", {"nms": True}),
    "yolo11": ("yolo11n.yaml", "yolov8", {}),
    "yolo12": ("yolo12n.yaml", "yolov8", {}),
    "yolo26": ("yolo26n.yaml", "yolov8", {}),
    "yolo26-nms": ("yolo26n.yaml", "yolov10", {"nms": True}),
    "yolo26-no-nms": ("yolo26n.yaml", "yolov10", {"nms": False}),
    "yolov8-nms": ("yolov8n.yaml", "yolov10", {"nms": True}),
    "yolo11-nms": ("yolo11n.yaml", "yolov10", {"nms": True}),
    "yolo11-dynamic": ("yolo11n.yaml", "yolov8", {"dynamic": True}),
    "rt-detr": ("rtdetr-resnet50.yaml", "rtdetr-list", {}),
}
GRIDS = {r"cv3\.\d\.2$": SCORES, r"cv2\.\d\.2$": (1, 1)}
QUERIES_OF_ULTRALYTICS = {
    r"(dec_score_head.\d|enc_score_head)$": (-2, 1.5),
    r"(dec_bbox_head.\d|enc_bbox_head).layers.[12]$": (0, 0.5),
}


@pytest.fixture
def ultralytics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, which installs nothing, looks at no network, and writes into the test's own folder."""
    _package("torch")
    monkeypatch.chdir(tmp_path)
    for name, value in (("CONFIG_DIR", str(tmp_path)), ("AUTOINSTALL", "false"), ("OFFLINE", "true")):
        monkeypatch.setenv(f"YOLO_{name}", value)
    return _package("ultralytics")


def _predicted(network: Any, picture: NDArray[np.uint8]) -> Rows:
    """What `predict` gives, as rows."""
    height_px, width_px = picture.shape[:2]
    size = (height_px, width_px)
    result = network.predict(picture, imgsz=size, conf=0.25, iou=IOU, max_det=300, verbose=False)[0]
    data: Rows = result.boxes.data.numpy().astype(np.float64)
    return data


def _yolo(torch: Any, ultralytics: Any, file: str, picture: NDArray[np.uint8]) -> Any:
    """A network of Ultralytics that finds many things in that picture."""
    joined = file.startswith("rtdetr")
    network = (ultralytics.RTDETR if joined else ultralytics.YOLO)(file)
    pixels = _tensor(torch, picture)[None]
    network.model.eval()
    last = QUERIES_OF_ULTRALYTICS if joined else GRIDS
    if file.startswith("yolo26"):  # a distance itself, not the weights of sixteen
        last = GRIDS | {r"cv2\.\d\.2$": (3, 0.7)}
    _as_if_trained(torch, network.model, lambda: network.model(torch.cat([pixels, pixels.flip(3)])), last)
    return network


@pytest.mark.parametrize("kind", ULTRALYTICS)
def test_an_export_of_ultralytics_gives_the_boxes_of_its_predict(kind: str, ultralytics: Any) -> None:
    torch = _seeded()
    file, head, options = ULTRALYTICS[kind]
    picture = _picture(320, 256)
    network = _yolo(torch, ultralytics, file, picture)
    path = Path(network.export(format="onnx", imgsz=(256, 320), **options))
    loaded = load_model(path)
    assert loaded.head == head
    again = type(network)(str(path))
    _agree(_ours(loaded, picture), _predicted(again, picture), picture)


def test_a_quantised_yolo_gives_the_boxes_of_ultralytics(ultralytics: Any, tmp_path: Path) -> None:
    torch = _seeded()
    quantization = pytest.importorskip("onnxruntime.quantization")
    # A random network magnifies each rounding; 0 and 255 become 0 and 1 without any, however they are scaled.
    picture = np.where(_picture(320, 256) > 120, 255, 0).astype(np.uint8)
    network = _yolo(torch, ultralytics, "yolov8n.yaml", picture)
    path = tmp_path / "quantised.onnx"
    exported = network.export(format="onnx", imgsz=(256, 320))
    quantization.quantize_dynamic(exported, path, weight_type=quantization.QuantType.QUInt8)
    loaded = load_model(path)
    assert loaded.head == "yolov8"
    theirs = _predicted(ultralytics.YOLO(str(path), task="detect"), picture)
    _agree(_ours(loaded, picture), theirs, picture)
