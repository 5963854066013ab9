"""Lists whose columns are not those of the YOLOs, though their shape is: refused, never read by guess."""

from pathlib import Path

import pytest

from tiny_graphs import Graph
from tiny_yolos import HEIGHT_PX, WIDTH_PX, pieces
from visionedge.errors import ModelError
from visionedge.model.model import load_model

CLASSES, CELLS, CHOSEN = 5, 60, 20


def _six(path: Path, order: str, first: int = 0) -> Path:
    """[1, n, 6] of the best cells: b(ox), s(core) and c(lass) in this order, classes from `first`."""
    graph = Graph(13)
    picture = graph.input("images", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    table = graph.add("Reshape", graph.features(picture, CELLS * 5), graph.whole(1, CELLS, 5))
    boxes, logits = pieces(graph, table, 0, 4, 5, axis=2)
    scores = graph.add("Reshape", graph.add("Sigmoid", logits), graph.whole(1, CELLS))
    best = graph.add("TopK", scores, graph.whole(CHOSEN), outputs=2)
    places = graph.add("Unsqueeze", f"{best}.1", graph.whole(2))
    wide = graph.add("Expand", places, graph.whole(1, CHOSEN, 4))
    ids = graph.add("Mod", places, graph.whole(CLASSES))
    if first:
        ids = graph.add("Add", ids, graph.whole(first))
    parts = {
        "b": graph.add("GatherElements", boxes, wide, axis=1),
        "s": graph.add("Unsqueeze", best, graph.whole(2)),
        "c": graph.add("Cast", ids, to=1),
    }
    made = graph.add("Concat", *(parts[letter] for letter in order), axis=2)
    graph.output(made, "output0", "float32", 1, CHOSEN, 6)
    return graph.save(path)


def test_columns_of_box_score_and_class_from_0_are_read_as_a_yolo_list(tmp_path: Path) -> None:
    model = load_model(_six(tmp_path / "m.onnx", "bsc"))
    assert (model.head, model.interpretation.class_count) == ("yolov10", CLASSES)


@pytest.mark.parametrize(("order", "first"), [("bsc", 1), ("bcs", 0), ("csb", 0), ("scb", 0)])
def test_other_columns_or_classes_from_1_are_not_read_as_a_yolo_list(tmp_path: Path, order: str, first: int) -> None:
    """EfficientDet in PyTorch counts from 1, and takes pictures prepared otherwise."""
    with pytest.raises(ModelError, match="no detector"):
        load_model(_six(tmp_path / "m.onnx", order, first))


def _seven(path: Path, *, score_last: bool) -> Path:
    """[n, 7] behind a suppression: picture, box, and class and score in either order."""
    graph = Graph(13)
    picture = graph.input("images", "float32", 1, 3, HEIGHT_PX, WIDTH_PX)
    boxes = graph.add("Reshape", graph.features(picture, CELLS * 4), graph.whole(1, CELLS, 4))
    logits = graph.add("Reshape", graph.features(picture, CELLS * CLASSES), graph.whole(1, CLASSES, CELLS))
    scores = graph.add("Sigmoid", logits)
    limits = graph.whole(CHOSEN), graph.constant([0.5]), graph.constant([0.1])
    chosen = graph.add("NonMaxSuppression", boxes, scores, *limits)
    batch, label, place = (graph.add("Gather", chosen, graph.whole(i), axis=1) for i in range(3))
    box = graph.add(
        "Gather", graph.add("Squeeze", boxes, graph.whole(0)), graph.add("Squeeze", place, graph.whole(1))
    )
    score = graph.add("Unsqueeze", graph.add("GatherND", scores, chosen), graph.whole(1))
    first, ids = graph.add("Cast", batch, to=1), graph.add("Cast", label, to=1)
    ends = (ids, score) if score_last else (score, ids)
    graph.output(graph.add("Concat", first, box, *ends, axis=1), "output", "float32", "n", 7)
    return graph.save(path)


def test_rows_of_seven_end_in_class_and_score(tmp_path: Path) -> None:
    assert load_model(_seven(tmp_path / "m.onnx", score_last=True)).head == "yolov7-nms"


def test_rows_of_seven_that_end_in_score_and_class_are_refused(tmp_path: Path) -> None:
    """YOLO-NAS writes them so, and prepares its pictures otherwise."""
    with pytest.raises(ModelError, match="no detector"):
        load_model(_seven(tmp_path / "m.onnx", score_last=False))
