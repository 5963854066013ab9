"""Models that the real packages export, decoded as the packages themselves do.

torch, torchvision, transformers, ultralytics, rfdetr, paddle and ppdet are no dependencies: CONTRIBUTING.md
says how to run these tests. The networks have random weights, so nothing is downloaded.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_graphs import compiled_rows
from visionedge.errors import ModelError
from visionedge.model.model import Model, load_model
from visionedge.model.postprocess import suppress_non_maxima

# The packages warn of many things that are theirs.
pytestmark = [pytest.mark.exporters, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]

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
    """torch with a fixed seed."""
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
    """The best rows of each stand among the other's; they are many, of many places and many scores."""
    ours, theirs = _inside(ours, picture), _inside(theirs, picture)
    theirs = theirs[np.argsort(-theirs[:, 4], kind="stable")]
    assert min(len(theirs), len(ours)) >= LEAST, f"{len(theirs)} rows of theirs, {len(ours)} of ours"
    top, own = theirs[:BEST], ours[:BEST]
    assert len(np.unique(top[:, :4].round(), axis=0)) >= LEAST // 2
    assert len(np.unique(top[:, 4].round(3))) >= LEAST // 2
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
    """The network with only the outputs of its exporters: logits and boxes."""

    class TwoOutputs(torch.nn.Module):  # type: ignore[misc] # torch is Any here
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, pixel_values: Any) -> Any:
            result = self.network(pixel_values=pixel_values)
            return result.logits, result.pred_boxes

    return TwoOutputs().eval()


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


SCORES = (-3, 0.4)  # more, and all of them are 1.000
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
    """The results of `predict`, as rows."""
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


RFDETR = {"own-classes": ({"num_classes": 3}, 3), "coco": ({}, 91)}
LIGHT_QUERIES = {
    r"^class_embed$|enc_out_class_embed\.0$": (-2, 1.5),
    r"^bbox_embed.layers.[12]$|enc_out_bbox_embed\.0.layers.[12]$": (0, 0.5),
}


@pytest.mark.parametrize("kind", RFDETR)
def test_an_rf_detr_gives_the_boxes_of_its_predict(kind: str, tmp_path: Path) -> None:
    """The slot after the user's classes is the background, which is not a class."""
    torch, rfdetr = _seeded(), _package("rfdetr")
    options, classes = RFDETR[kind]
    detector = rfdetr.RFDETRNano(pretrain_weights=None, device="cpu", **options)
    network = detector.model.model.eval()
    for name, weights in network.named_parameters():
        if re.search(r"bbox_embed.*layers.2.weight$", name):  # they begin as zeros
            weights.data.normal_()
    picture = _picture(320, 256)
    pixels = (_tensor(torch, picture) - torch.tensor(detector.means)[:, None, None])[None]
    pixels = pixels / torch.tensor(detector.stds)[:, None, None]
    _as_if_trained(torch, network, lambda: network(torch.cat([pixels, pixels.flip(3)])), LIGHT_QUERIES)
    path = detector.export(output_dir=str(tmp_path), shape=picture.shape[:2], verbose=False)
    rgb = np.ascontiguousarray(picture[..., ::-1])
    found = detector.predict(rgb, threshold=0.0, shape=picture.shape[:2])
    theirs = np.column_stack([found.xyxy, found.confidence, found.class_id]).astype(np.float64)
    loaded = load_model(path)
    assert (loaded.head, loaded.interpretation.class_count) == ("detr-raw", classes)
    _agree(_ours(loaded, picture), theirs[theirs[:, 5] < classes], picture)


def _reader(normal: Mapping[str, Any]) -> dict[str, Any]:
    """PaddleDetection's preprocessing: the last part of each configuration of a model."""
    resize = {"target_size": [256, 320], "keep_ratio": False, "interp": 2}
    steps = [{"Decode": {}}, {"Resize": resize}, {"NormalizeImage": dict(normal)}, {"Permute": {}}]
    return {"inputs_def": {"image_shape": [3, 256, 320]}, "sample_transforms": steps, "batch_size": 1}


MEAN_OFF = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "is_scale": True}
NO_MEAN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "norm_type": "none"}
PADDLE_NMS = {
    "name": "MultiClassNMS",
    "nms_top_k": 1000,
    "keep_top_k": 300,
    "score_threshold": 0.01,
    "nms_threshold": IOU,
}
ASSIGNERS = {
    "static_assigner": {"name": "ATSSAssigner", "topk": 9},
    "assigner": {"name": "TaskAlignedAssigner", "topk": 13, "alpha": 1.0, "beta": 6.0},
}
PPYOLOE = {
    "architecture": "YOLOv3",
    "norm_type": "sync_bn",
    "depth_mult": 0.33,
    "width_mult": 0.25,
    "YOLOv3": {
        "backbone": "CSPResNet",
        "neck": "CustomCSPPAN",
        "yolo_head": "PPYOLOEHead",
        "post_process": None,
    },
    "CSPResNet": {
        "layers": [3, 6, 6, 3],
        "channels": [64, 128, 256, 512, 1024],
        "return_idx": [1, 2, 3],
        "use_large_stem": True,
    },
    "CustomCSPPAN": {
        "out_channels": [768, 384, 192],
        "stage_num": 1,
        "block_num": 3,
        "act": "swish",
        "spp": True,
    },
    "PPYOLOEHead": ASSIGNERS | {"fpn_strides": [32, 16, 8], "nms": PADDLE_NMS},
    "TestReader": _reader(MEAN_OFF),
}
PICODET = {
    "architecture": "PicoDet",
    "PicoDet": {"backbone": "LCNet", "neck": "LCPAN", "head": "PicoHeadV2"},
    "LCNet": {"scale": 0.35, "feature_maps": [3, 4, 5]},
    # It appends to its own default of `spatial_scales`, so that a second network would get five.
    "LCPAN": {
        "out_channels": 96,
        "use_depthwise": True,
        "num_features": 4,
        "spatial_scales": [0.125, 0.0625, 0.03125],
    },
    "PicoHeadV2": ASSIGNERS
    | {
        "conv_feat": {
            "name": "PicoFeat",
            "feat_in": 96,
            "feat_out": 96,
            "num_convs": 2,
            "num_fpn_stride": 4,
            "norm_type": "bn",
            "share_cls_reg": True,
            "use_se": True,
        },
        "fpn_stride": [8, 16, 32, 64],
        "feat_in_chan": 96,
        "reg_max": 7,
        "cell_offset": 0.5,
        "use_align_head": True,
        "loss_class": {"name": "VarifocalLoss", "use_sigmoid": False},
        "loss_dfl": {"name": "DistributionFocalLoss"},
        "loss_bbox": {"name": "GIoULoss"},
        "nms": PADDLE_NMS,
    },
    "TestReader": _reader(MEAN_OFF),
}
YOLOV3_OF_PADDLE = {
    "architecture": "YOLOv3",
    "norm_type": "sync_bn",
    "YOLOv3": {
        "backbone": "MobileNet",
        "neck": "YOLOv3FPN",
        "yolo_head": "YOLOv3Head",
        "post_process": "BBoxPostProcess",
    },
    "MobileNet": {"scale": 0.25, "feature_maps": [4, 6, 13], "with_extra_blocks": False},
    "YOLOv3Head": {
        "anchors": [
            [10, 13],
            [16, 30],
            [33, 23],
            [30, 61],
            [62, 45],
            [59, 119],
            [116, 90],
            [156, 198],
            [373, 326],
        ],
        "anchor_masks": [[6, 7, 8], [3, 4, 5], [0, 1, 2]],
        "loss": "YOLOv3Loss",
    },
    "YOLOv3Loss": {"downsample": [32, 16, 8], "label_smooth": False},
    "BBoxPostProcess": {"decode": {"name": "YOLOBox", "conf_thresh": 0.005}, "nms": PADDLE_NMS},
    "TestReader": _reader(MEAN_OFF),
}
PPYOLOE_LAST = {r"pred_cls\.\d$": (-4, 1.5), r"pred_reg\.\d$": (1, 1)}
PICODET_LAST = {r"head_cls\d$": (-3, 1.5), r"head_reg\d$": (0, 1)}
PADDLE: dict[str, tuple[dict[str, Any], Spreads, dict[str, Any], str]] = {
    "ppyoloe": (PPYOLOE, PPYOLOE_LAST, {}, "paddle"),
    "ppyoloe-plus": (PPYOLOE | {"TestReader": _reader(NO_MEAN)}, PPYOLOE_LAST, {}, "paddle"),
    "ppyoloe-no-nms": (PPYOLOE, PPYOLOE_LAST, {"exclude_nms": True}, "boxes-scores"),
    "ppyoloe-bare": (PPYOLOE, PPYOLOE_LAST, {"exclude_post_process": True}, "yolov8"),
    "picodet": (PICODET, PICODET_LAST, {}, "paddle"),
    "picodet-no-nms": (PICODET, PICODET_LAST, {"nms": False}, "boxes-scores"),
    "picodet-bare": (PICODET, PICODET_LAST, {"post_process": False}, "picodet"),
    "yolov3": (YOLOV3_OF_PADDLE, {r"yolo_output\.\d$": (-1, 0.7)}, {}, "paddle"),
}
"""By name: the configuration, its last layers, what `-o` says at the export, and our head."""


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Mapping[str, Any]], Any]]:
    """Exports a configuration like `tools/export_model.py`; files go into the test's own folder."""
    # PaddleDetection writes graphs of the kind that Paddle had before 3.0.
    monkeypatch.setenv("FLAGS_enable_pir_api", "0")
    monkeypatch.setenv("ENABLE_FALL_BACK", "false")
    monkeypatch.chdir(tmp_path)
    paddle, _ = _package("paddle"), _package("ppdet.modeling")
    paddle.set_device("cpu")
    paddle.seed(7)
    workspace = _package("ppdet.core.workspace")
    before = {name: copy(value) for name, value in workspace.global_config.items()}

    def make(document: Mapping[str, Any]) -> Any:
        Path("labels.txt").write_text("".join(f"thing {i}\n" for i in range(11)))
        always = {
            "metric": "COCO",
            "num_classes": 11,
            "use_gpu": False,
            "weights": "none",
            "export": {"post_process": True, "nms": True},
            "TestDataset": {"name": "ImageFolder", "anno_path": "labels.txt"},
        }
        Path("net.yml").write_text(json.dumps(always | dict(document)))  # JSON is YAML
        return _package("ppdet.engine").Trainer(workspace.load_config("net.yml"), mode="test")

    yield make
    workspace.global_config.clear()
    workspace.global_config.update(before)


def _as_if_trained_by_paddle(paddle: Any, network: Any, run: Callable[[], Any], last: Spreads) -> None:
    """As `_as_if_trained`, for a network of Paddle."""
    norms = [layer for layer in network.sublayers() if isinstance(layer, paddle.nn.BatchNorm2D)]
    for norm in norms:
        norm._momentum = 0.0
        norm.train()
    run()
    for norm in norms:
        norm.eval()
    for name, layer in network.named_sublayers():
        for pattern, (mean, deviation) in last.items():
            if re.search(pattern, name):
                _spread_by_paddle(paddle, layer, run, mean, deviation)


def _spread_by_paddle(paddle: Any, layer: Any, run: Callable[[], Any], mean: float, deviation: float) -> None:
    """As `_spread`, for a convolution of Paddle; some begin as zeros."""
    if not layer.weight.any():
        layer.weight.set_value(paddle.randn(layer.weight.shape))
    seen: list[Any] = []
    handle = layer.register_forward_post_hook(
        lambda _layer, _given, result: seen.append(result.transpose([0, 2, 3, 1]).flatten(0, 2))
    )
    run()
    handle.remove()
    values = paddle.concat(seen)
    means = values.mean(0)
    factor = deviation / max(float((values - means).std()), 1e-6)
    layer.weight.set_value(layer.weight * factor)
    layer.bias.set_value(mean - factor * (means - layer.bias))


def _of_paddle(trainer: Any, last: Spreads, picture: NDArray[np.uint8], *, suppressed: bool) -> Rows:
    """The detections of a Paddle network in a picture that it reads itself; it is made to find many objects.

    Its suppression keeps each class of a cell. Where visionedge's decoder keeps only the best one, Paddle's
    suppression is off and visionedge's is applied here too.
    """
    paddle, network = _package("paddle"), trainer.model
    cv2.imwrite("picture.png", picture)
    trainer.dataset.set_images(["picture.png"])
    given = next(iter(_package("ppdet.core.workspace").create("TestReader")(trainer.dataset, 0)))
    flipped = {**given, "image": paddle.flip(given["image"], 3)}
    network.eval()
    with paddle.no_grad():
        _as_if_trained_by_paddle(paddle, network, lambda: (network(given), network(flipped)), last)
        if not suppressed:
            network.export_nms = False
            vars(getattr(network, "yolo_head", network)).update(exclude_nms=True)
        rows, scores = (value.numpy().astype(np.float64) for value in network(given).values())
    if suppressed:
        return np.asarray(rows[:, [2, 3, 4, 5, 1, 0]], np.float64)
    boxes, best, classes = rows[0], scores[0].max(axis=0), scores[0].argmax(axis=0)
    return np.column_stack([boxes, best, classes])[suppress_non_maxima(boxes, best, classes, IOU)]


@pytest.mark.parametrize("kind", PADDLE)
def test_an_export_of_paddledetection_gives_the_boxes_of_its_network(
    kind: str, trainer: Callable[[Mapping[str, Any]], Any]
) -> None:
    document, last, options, head = PADDLE[kind]
    picture = _picture(320, 256)
    made = trainer(document)
    theirs = _of_paddle(made, last, picture, suppressed=head in ("paddle", "picodet"))
    made.cfg["export"].update(options)
    vars(getattr(made.model, "yolo_head", made)).update(options)
    made.export("output_inference")
    folder = Path("output_inference/net")
    command = (
        f"paddle2onnx --model_dir {folder} --model_filename model.pdmodel --params_filename model.pdiparams"
    )
    command += f" --opset_version 13 --save_file {folder / 'm.onnx'}"
    program, *arguments = command.split()
    subprocess.run([Path(sys.executable).with_name(program), *arguments], check=True)
    loaded = load_model(folder / "m.onnx")
    assert loaded.head == head
    _agree(_ours(loaded, picture), theirs, picture)


# --- classifiers --------------------------------------------------------------------------------------------


def _as_far_apart(theirs: Rows, ours: Rows) -> None:
    """The probabilities of our classes are theirs, and no class of theirs is more probable."""
    assert len(np.unique(theirs.round(4))) > 5, "too alike to tell classes apart"
    np.testing.assert_allclose(ours[:, 4], theirs[ours[:, 5].astype(int)], atol=1e-3)
    np.testing.assert_allclose(ours[:, 4], np.sort(theirs)[::-1][: len(ours)], atol=1e-3)


def _logits_as_if_trained(torch: Any, network: Any, last: Any, pixels: Any) -> None:
    """Let the logits of a random network, the results of its layer `last`, differ by a few units."""
    _as_if_trained(torch, network, lambda: network(torch.cat([pixels, pixels.flip(3)])), {})
    seen: list[Any] = []
    handle = last.register_forward_hook(lambda _module, _given, result: seen.append(result[0].std()))
    with torch.no_grad():
        network(pixels)
        last.weight.mul_(2 / float(seen[0]))
    handle.remove()


CLASSIFIERS = (
    "mobilenet_v3_small",
    "resnet18",
    "squeezenet1_1",
    "convnext_tiny",
    "swin_t",
    "efficientnet_b0",
)


@pytest.mark.parametrize("dynamo", [False, True], ids=["old exporter", "new exporter"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_torchvision_classifier_gives_the_probabilities_of_torchvision(
    name: str, dynamo: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits get a softmax, and its pictures ImageNet's mean and deviation."""
    torch, torchvision = _seeded(), _package("torchvision")
    if dynamo:  # it shows its progress, with a thread
        monkeypatch.setattr(_package("tqdm").tqdm, "monitor_interval", 0)
    network = getattr(torchvision.models, name)(weights=None).eval()
    picture = _picture(224, 224)
    mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = ((_tensor(torch, picture) - mean) / std)[None]
    layers = [m for m in network.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    _logits_as_if_trained(torch, network, layers[-1], pixels)
    options = {"dynamo": True} if dynamo else {"dynamo": False, "opset_version": 17}
    torch.onnx.export(network, (pixels,), str(tmp_path / "m.onnx"), **options)
    loaded = load_model(tmp_path / "m.onnx")
    assert (loaded.head, len(loaded.labels)) == ("classifier", 1000)
    with torch.no_grad():
        theirs = network(pixels)[0].softmax(0).numpy().astype(np.float64)
    _as_far_apart(theirs, _ours(loaded, picture))


def test_a_distilled_transformer_of_timm_averages_its_logits(tmp_path: Path) -> None:
    torch, timm = _seeded(), _package("timm")
    network = timm.create_model("deit_tiny_distilled_patch16_224", pretrained=False).eval()
    torch.onnx.export(network, (torch.rand(1, 3, 224, 224),), str(tmp_path / "m.onnx"), dynamo=False)
    assert load_model(tmp_path / "m.onnx").is_classifier


def test_the_features_of_a_timm_network_are_no_classifier(tmp_path: Path) -> None:
    torch, timm = _seeded(), _package("timm")
    network = timm.create_model("resnet10t", pretrained=False, num_classes=0).eval()
    torch.onnx.export(network, (torch.rand(1, 3, 96, 96),), str(tmp_path / "m.onnx"), dynamo=False)
    with pytest.raises(ModelError, match="may be an embedding"):
        load_model(tmp_path / "m.onnx")


def test_a_classifier_of_ultralytics_gives_its_probabilities(ultralytics: Any) -> None:
    """Pixels of 0-1, and a softmax in the graph; labels and size are in the metadata."""
    torch = _seeded()
    yolo = ultralytics.YOLO("yolo11n-cls.yaml", task="classify")
    yolo.model.names = {i: f"n{i}" for i in range(1000)}
    picture = _picture(96, 96)
    pixels = _tensor(torch, picture)[None]
    network = yolo.model.eval()
    _logits_as_if_trained(torch, network, network.model[-1].linear, pixels)
    with torch.no_grad():
        theirs = network(pixels)
    theirs = (theirs[0] if isinstance(theirs, tuple) else theirs)[0].numpy().astype(np.float64)
    loaded = load_model(Path(yolo.export(format="onnx", imgsz=96, simplify=False)))
    assert (loaded.head, loaded.labels[7]) == ("classifier", "n7")
    assert loaded.interpretation.preprocess.mean == (0, 0, 0)
    _as_far_apart(theirs, _ours(loaded, picture))
