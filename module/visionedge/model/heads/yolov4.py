"""YOLOv4 as its port to PyTorch exports it: boxes [N, n, 1, 4] as corners of 0-1, scores [N, n, classes]."""

from dataclasses import dataclass, replace

from visionedge.model.analysis.signature import ModelSignature
from visionedge.model.decoding import BoxDecoding, find_strides, select_best_rows
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import Decoder, ModelInterpretation, find_picture_input
from visionedge.model.preprocessing import YOLO_INPUT, choose_preprocess, is_detector


@dataclass(frozen=True, slots=True)
class YoloV4Decoder(Decoder):
    """Decodes both outputs over a picture of this size."""

    boxes: str
    scores: str
    anchors: int
    classes: int
    width_px: int
    height_px: int

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The best rows, each anchor as its best class."""
        return select_best_rows(
            nodes,
            nodes.cast(self.scores, "float32"),
            self._boxes_of(nodes),
            anchors=self.anchors,
            classes=self.classes,
            limit=limit,
            one_class_per_anchor=True,
        )

    def _boxes_of(self, nodes: NodeBuilder) -> BoxDecoding:
        boxes = nodes.reshape(nodes.cast(self.boxes, "float32"), 0, self.anchors, 4)
        scale = nodes.floats(*[self.width_px, self.height_px] * 2)
        return lambda chosen, count: nodes.add("Mul", nodes.gather_rows(boxes, chosen, count, 4), scale)


@dataclass(frozen=True, slots=True)
class YoloV4Boxes:
    """YOLOv4 with decoded boxes: RGB from 0 to 1, stretched."""

    name: str = "yolov4-boxes"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if boxes of four dimensions go with scores for three anchors in each cell."""
        picture = find_picture_input(signature)
        boxes = [t for t in signature.outputs if t.shape is not None and t.shape[2:] == (1, 4)]
        scores = [t for t in signature.outputs if t.shape is not None and len(t.shape) == 3]
        if picture is None or len(signature.inputs) != 1 or len(signature.outputs) != 2:
            return None
        if len(boxes) != 1 or len(scores) != 1:
            return None
        anchors, classes = (scores[0].shape or (0, 0, 0))[1:]
        strides = find_strides(anchors, picture.width_px, picture.height_px, anchors_per_cell=3)
        if not anchors or not classes or strides is None or (boxes[0].shape or ())[1] != anchors:
            return None
        if not is_detector(signature, classes):
            return None
        preprocess, preprocess_evidence = choose_preprocess(
            signature, picture, replace(YOLO_INPUT, fit="stretch")
        )
        size = (picture.width_px, picture.height_px)
        return ModelInterpretation(
            head=self.name,
            input=picture,
            preprocess=preprocess,
            decoder=YoloV4Decoder(boxes[0].name, scores[0].name, anchors, classes, *size),
            class_count=classes,
            needs_nms=True,
            evidence=(
                f"{anchors} boxes and scores are 3 for each cell at strides {', '.join(map(str, strides))}",
                *preprocess_evidence,
            ),
        )


HEADS = (YoloV4Boxes(),)
