"""The pictures that a variant of a model is made with: some set the ranges of its values, others judge it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from visionedge.camera.sources.images import SUFFIXES, natural_key, read_picture
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import CameraUri
from visionedge.engine.precision_choice import samples_for
from visionedge.errors import ConfigError, SourceError
from visionedge.frames.letterbox import fit
from visionedge.frames.types import Detections, Picture
from visionedge.model.model import Model, bundled_model_path
from visionedge.model.quantization.search import Material, MeasureAp, Precision, Sample
from visionedge.ops.models.evaluate import (
    Annotations,
    Found,
    average_precision,
    categories_of,
    read_annotations,
    require_pycocotools,
)
from visionedge.runtime.installation import bundled

# Pictures from all over a video, however long it is.


def excerpt(path: Path, most: int) -> list[Picture]:
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


LEAST_PICTURES = 8
MOST_CALIBRATION = 64
MOST_JUDGED = 64
"""Without labels; with them all labelled pictures that no ranges are set by are judged."""

_MOST_FILES = 1024  # of a folder without labels
_FRAMES = 192  # of a video


@dataclass(frozen=True, slots=True)
class _Photo:
    """A picture at the model's input size, its own size, and its number in the annotations, if any."""

    sample: Sample
    width_px: int
    height_px: int
    number: int | None = None


def gather(
    model: Model,
    precision: Precision,
    folder: Path | None,
    labels: Path | None,
    progress: Callable[[str], None],
) -> Material:
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
        categories_of(model.labels, annotations)
    source = _source(model, precision, folder, progress)
    photos = _photos(source, model, annotations, progress)
    if len(photos) < LEAST_PICTURES:
        raise SourceError(
            f"{source}: holds {len(photos)} different pictures; {LEAST_PICTURES} are the least"
            " that ranges can be set by, some dozens are better"
        )
    # float16 has no ranges to set, so all can judge it.
    judged = photos[1::2] if precision == "int8" else photos
    told = [photo for photo in judged if photo.number is not None]
    if annotations is not None and not told:
        raise ConfigError([f"--labels {labels}: (almost) none of its pictures is in {source}"])
    others = [photo for photo in judged if photo.number is None]
    calibration = _spread(photos[::2], MOST_CALIBRATION)
    return Material(
        tuple(photo.sample for photo in calibration),
        tuple(photo.sample for photo in (*told, *_spread(others, MOST_JUDGED))),
        None if annotations is None else _ap(annotations, told, model),
        len(told),
        tuple(samples_for(model.input)),
    )


def _source(model: Model, precision: Precision, folder: Path | None, progress: Callable[[str], None]) -> Path:
    if folder is not None:
        return folder
    if precision == "int8" and model.path.resolve() != bundled_model_path().resolve():
        raise ConfigError(
            [
                "--calibrate DIR: int8 needs pictures, some dozens such as the cameras will see:"
                " the ranges of its values are set by them"
            ]
        )
    progress("no --calibrate: pictures of the bundled clip are used")
    return bundled("media/demo.mp4")


def _spread(photos: Sequence[_Photo], most: int) -> list[_Photo]:
    """At most so many, from all over the list."""
    if len(photos) <= most:
        return list(photos)
    return [photos[index * len(photos) // most] for index in range(most)]


def _photos(
    source: Path, model: Model, annotations: Annotations | None, progress: Callable[[str], None]
) -> list[_Photo]:
    """Each picture once, in the order of their names."""
    if source.is_dir():
        numbers = {Path(p.file).name: p.number for p in annotations.photos} if annotations else {}
        pictures = _of_folder(source, numbers, progress)
    else:
        pictures = ((picture, None) for picture in _of_video(source))
    seen: set[bytes] = set()
    photos = []
    for picture, number in pictures:
        sample = Sample(*fit(picture, model.input))
        digest = hashlib.sha256(sample.image.tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            photos.append(_Photo(sample, picture.shape[1], picture.shape[0], number))
    return photos


def _of_folder(
    folder: Path, numbers: dict[str, int], progress: Callable[[str], None]
) -> Iterator[tuple[Picture, int | None]]:
    """Pictures with their number in the annotations; what cannot be read is told and left out."""
    try:
        entries = [entry for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES]
    except OSError as error:
        raise SourceError(f"{folder} cannot be listed: {error.strerror}") from None
    files = sorted(entries, key=lambda entry: natural_key(entry.name))
    if not numbers and len(files) > _MOST_FILES:
        files = [files[index * len(files) // _MOST_FILES] for index in range(_MOST_FILES)]
    for file in files:
        try:
            yield read_picture(file), numbers.get(file.name)
        except SourceError as error:
            progress(str(error))


def _of_video(path: Path) -> Iterable[Picture]:
    """Pictures from all over a video.

    Raises:
        SourceError: it cannot be read.
    """
    if not path.exists():
        raise SourceError(f"{path}: there is no such folder or video")
    return excerpt(path, _FRAMES)


# --- average precision --------------------------------------------------------------------------------------


def _ap(annotations: Annotations, told: Sequence[_Photo], model: Model) -> MeasureAp:
    """AP and AP50 by what is seen on the judged pictures, of which those with labels are the first."""
    categories = categories_of(model.labels, annotations)
    numbers = [photo.number for photo in told if photo.number is not None]

    def measured(seen: Sequence[Detections]) -> tuple[float, float]:
        found = [
            one
            for photo, detections in zip(told, seen, strict=False)
            for one in _found(photo, detections, categories)
        ]
        figures = average_precision(annotations, numbers, found)
        return figures["ap"] or 0.0, figures["ap50"] or 0.0

    return measured


def _found(photo: _Photo, detections: Detections, categories: dict[int, int]) -> Iterator[Found]:
    for box, score, class_id in zip(
        detections.boxes.tolist(), detections.scores.tolist(), detections.class_ids.tolist(), strict=True
    ):
        if class_id in categories and photo.number is not None:
            left, top = box[0] * photo.width_px, box[1] * photo.height_px
            width, height = box[2] * photo.width_px - left, box[3] * photo.height_px - top
            yield Found(photo.number, categories[class_id], (left, top, width, height), score)
