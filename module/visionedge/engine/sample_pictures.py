"""The pictures on which a variant is compared with fp32, and a device with the CPU."""

import logging
from contextlib import closing

from visionedge.errors import SourceError, UnavailableError
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import InputSpec, Picture, Placement
from visionedge.model.compiler.trial_run import make_test_pictures
from visionedge.model.quantization.search import CalibrationSample
from visionedge.runtime.installation import find_bundled_file

log = logging.getLogger(__name__)

_CLIP = "media/demo.mp4"
_CLIP_PICTURES = 9
_CLIP_STEP = 10


def make_sample_pictures(spec: InputSpec) -> list[CalibrationSample]:
    """Nine pictures of the bundled clip at a model's input size, and some synthetic ones."""
    whole = Placement(0.0, 0.0, float(spec.width_px), float(spec.height_px))
    synthetic = [
        CalibrationSample(image, whole) for image in make_test_pictures(spec.height_px, spec.width_px)
    ]
    return [
        *(CalibrationSample(*fit_to_input(picture, spec)) for picture in _read_clip_pictures()),
        *synthetic,
    ]


def _read_clip_pictures() -> list[Picture]:
    """Pictures a second apart, from its beginning; none if it cannot be read."""
    from visionedge.camera.sources.open import open_source  # takes 50 ms that other processes do not need
    from visionedge.config.addresses import CameraUri

    found: list[Picture] = []
    try:
        with closing(open_source(CameraUri("file", str(find_bundled_file(_CLIP))))) as source:
            for count in range(_CLIP_PICTURES * _CLIP_STEP):
                decoded = source.read()
                if decoded is None:
                    break
                if count % _CLIP_STEP == 0:
                    found.append(decoded.picture())
    except (SourceError, UnavailableError) as error:
        log.info(
            "the bundled clip cannot be read (%s): precisions are compared on synthetic pictures only", error
        )
    return found
