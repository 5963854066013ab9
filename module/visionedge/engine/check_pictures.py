"""Pictures that a variant of a model is tried on where it is to be used: the same ones everywhere."""

import logging
from contextlib import closing

from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import CameraUri
from visionedge.errors import SourceError, UnavailableError
from visionedge.frames.letterbox import fit
from visionedge.frames.types import InputSpec, Picture, Placement
from visionedge.model.compiler.trial_run import pictures
from visionedge.model.quantization.search import Sample
from visionedge.runtime.installation import bundled

log = logging.getLogger(__name__)

_CLIP = "media/demo.mp4"
_OF_THE_CLIP = 9
_EVERY = 10


def samples_for(spec: InputSpec) -> list[Sample]:
    """A few pictures of the bundled clip at a model's input size, and some that were made up."""
    whole = Placement(0.0, 0.0, float(spec.width_px), float(spec.height_px))
    made_up = [Sample(image, whole) for image in pictures(spec.height_px, spec.width_px)]
    return [*(Sample(*fit(picture, spec)) for picture in _of_the_clip()), *made_up]


def _of_the_clip() -> list[Picture]:
    """Pictures a second apart, from its beginning; none where it cannot be read."""
    found: list[Picture] = []
    try:
        with closing(open_source(CameraUri("file", str(bundled(_CLIP))))) as source:
            for count in range(_OF_THE_CLIP * _EVERY):
                decoded = source.read()
                if decoded is None:
                    break
                if count % _EVERY == 0:
                    found.append(decoded.picture())
    except (SourceError, UnavailableError) as error:
        log.info("precisions are compared without the bundled clip: %s", error)
    return found
