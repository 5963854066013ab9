"""The pictures that a variant of a model is made with: some set the ranges of its values, others judge it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from visionedge.camera.sources.images import PICTURE_SUFFIXES, natural_sort_key, read_picture
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import CameraUri
from visionedge.engine.precision_choice import make_sample_pictures
from visionedge.errors import ConfigError, SourceError
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import Detections, Picture
from visionedge.model.model import Model, find_bundled_model
from visionedge.model.quantization.search import CalibrationData, CalibrationSample, MeasureAp, Precision
from visionedge.ops.models.evaluate import (
    Annotations,
    CocoDetection,
    compute_average_precision,
    match_categories,
    read_annotations,
    require_pycocotools,
)
from visionedge.runtime.installation import find_bundled_file

# Pictures from all over a video, however long it is.


def sample_video(path: Path, most: int) -> list[Picture]:
    """At most so many pictures of a video, equally far apart; half as many at least where it has them.

    Raises:
        SourceError: it cannot be opened or decoded.
    """
    source, every, count = open_source(CameraUri("file", str(path))), 1, 0
    kept: list[Picture] = []
    try:
        while (decoded := source.read()) is not None:
            if count % every == 0:
                kept.append(decoded.picture())
            count += 1
            if len(kept) > most:
                # It is longer than was thought: of those that are kept, every second one goes.
                kept, every = kept[::2], every * 2
    finally:
        source.close()
    return kept


MIN_PICTURES = 8
MAX_CALIBRATION_PICTURES = 64
MAX_VALIDATION_PICTURES = 64
"""Without labels; with them all labelled pictures that no ranges are set by are judged."""

_MAX_FILES = 1024  # of a folder without labels
_MAX_VIDEO_FRAMES = 192  # of a video


@dataclass(frozen=True, slots=True)
class _CalibrationImage:
    """A picture at the model's input size, its own size, and its number in the annotations, if any."""

    sample: CalibrationSample
    width_px: int
    height_px: int
    number: int | None = None


def read_calibration_data(
    model: Model,
    precision: Precision,
    folder: Path | None,
    labels: Path | None,
    progress: Callable[[str], None],
) -> CalibrationData:
    """Read the pictures of a folder (or a video; None: the bundled clip), every second one to judge by.

    Raises:
        ConfigError: there is no folder where one is needed, or the labels are of other pictures or classes.
        SourceError: it cannot be read, or holds too few pictures.
        UnavailableError: labels are given and pycocotools is not installed.
    """
    annotations = None
    if labels is not None:
        require_pycocotools()
        annotations = read_annotations(labels)
        match_categories(model.labels, annotations)
    source = _source(model, precision, folder, progress)
    photos = _photos(source, model, annotations, progress)
    if len(photos) < MIN_PICTURES:
        raise SourceError(
            f"{source}: holds {len(photos)} different pictures; {MIN_PICTURES} are the least"
            " that ranges can be set by, some dozens are better"
        )
    # float16 has no ranges to set, so all can judge it.
    validation = photos[1::2] if precision == "int8" else photos
    labelled = [photo for photo in validation if photo.number is not None]
    if annotations is not None and not labelled:
        raise ConfigError([f"--labels {labels}: (almost) none of its pictures is in {source}"])
    unlabelled = [photo for photo in validation if photo.number is None]
    calibration = _sample_evenly(photos[::2], MAX_CALIBRATION_PICTURES)
    return CalibrationData(
        tuple(photo.sample for photo in calibration),
        tuple(photo.sample for photo in (*labelled, *_sample_evenly(unlabelled, MAX_VALIDATION_PICTURES))),
        None if annotations is None else _make_ap_measure(annotations, labelled, model),
        len(labelled),
        tuple(make_sample_pictures(model.input)),
    )


def _source(model: Model, precision: Precision, folder: Path | None, progress: Callable[[str], None]) -> Path:
    if folder is not None:
        return folder
    if precision == "int8" and model.path.resolve() != find_bundled_model().resolve():
        raise ConfigError(
            [
                "--calibrate DIR: int8 needs pictures, some dozens such as the cameras will see:"
                " the ranges of its values are set by them"
            ]
        )
    progress("no --calibrate: pictures of the bundled clip are used")
    return find_bundled_file("media/demo.mp4")


def _sample_evenly(photos: Sequence[_CalibrationImage], most: int) -> list[_CalibrationImage]:
    """At most so many, from all over the list."""
    if len(photos) <= most:
        return list(photos)
    return [photos[index * len(photos) // most] for index in range(most)]


def _photos(
    source: Path, model: Model, annotations: Annotations | None, progress: Callable[[str], None]
) -> list[_CalibrationImage]:
    """Each picture once, in the order of their names."""
    if source.is_dir():
        numbers = {Path(p.file).name: p.number for p in annotations.photos} if annotations else {}
        pictures = _read_folder(source, numbers, progress)
    else:
        pictures = ((picture, None) for picture in _read_video(source))
    seen: set[bytes] = set()
    photos = []
    for picture, number in pictures:
        sample = CalibrationSample(*fit_to_input(picture, model.input))
        digest = hashlib.sha256(sample.image.tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            photos.append(_CalibrationImage(sample, picture.shape[1], picture.shape[0], number))
    return photos


def _read_folder(
    folder: Path, numbers: dict[str, int], progress: Callable[[str], None]
) -> Iterator[tuple[Picture, int | None]]:
    """Pictures with their number in the annotations; what cannot be read is told and left out."""
    try:
        entries = [entry for entry in folder.iterdir() if entry.suffix.lower() in PICTURE_SUFFIXES]
    except OSError as error:
        raise SourceError(f"{folder} cannot be listed: {error.strerror}") from None
    files = sorted(entries, key=lambda entry: natural_sort_key(entry.name))
    if not numbers and len(files) > _MAX_FILES:
        files = [files[index * len(files) // _MAX_FILES] for index in range(_MAX_FILES)]
    for file in files:
        try:
            yield read_picture(file), numbers.get(file.name)
        except SourceError as error:
            progress(str(error))


def _read_video(path: Path) -> Iterable[Picture]:
    """Pictures from all over a video.

    Raises:
        SourceError: it cannot be read.
    """
    if not path.exists():
        raise SourceError(f"{path}: there is no such folder or video")
    return sample_video(path, _MAX_VIDEO_FRAMES)


# --- average precision --------------------------------------------------------------------------------------


def _make_ap_measure(
    annotations: Annotations, labelled: Sequence[_CalibrationImage], model: Model
) -> MeasureAp:
    """AP and AP50 by what is seen on the judged pictures, of which those with labels are the first."""
    categories = match_categories(model.labels, annotations)
    numbers = [photo.number for photo in labelled if photo.number is not None]

    def measured(seen: Sequence[Detections]) -> tuple[float, float]:
        found = [
            one
            for photo, detections in zip(labelled, seen, strict=False)
            for one in _found(photo, detections, categories)
        ]
        figures = compute_average_precision(annotations, numbers, found)
        return figures["ap"] or 0.0, figures["ap50"] or 0.0

    return measured


def _found(
    photo: _CalibrationImage, detections: Detections, categories: dict[int, int]
) -> Iterator[CocoDetection]:
    for box, score, class_id in zip(
        detections.boxes.tolist(), detections.scores.tolist(), detections.class_ids.tolist(), strict=True
    ):
        if class_id in categories and photo.number is not None:
            left, top = box[0] * photo.width_px, box[1] * photo.height_px
            width, height = box[2] * photo.width_px - left, box[3] * photo.height_px - top
            yield CocoDetection(photo.number, categories[class_id], (left, top, width, height), score)
