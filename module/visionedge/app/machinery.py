"""What computes: a model and its engine, and what was made for the two."""

from dataclasses import dataclass

from visionedge.camera.camera import Fitting
from visionedge.config.schema import InferenceConfig
from visionedge.engine.interface import AnyEngine
from visionedge.engine.process.client import EngineProcess
from visionedge.engine.process.shared_memory import Arena
from visionedge.model.model import Model
from visionedge.model.postprocess import Selection
from visionedge.model.supply import Source
from visionedge.runtime.threads import Crew


@dataclass(slots=True)
class Machinery:
    """A model, its engine once that is open, and what was made for the two. `crew` is the engine's alone.

    `has_contenders`: there are variants that may be faster on the CPU; None: nobody has looked yet.
    """

    source: Source
    model: Model
    selection: Selection
    inference: InferenceConfig
    arena: Arena | None
    crew: Crew
    engine: AnyEngine | None = None
    child: EngineProcess | None = None
    has_contenders: bool | None = None

    @property
    def fitting(self) -> Fitting:
        """How cameras prepare pictures for it."""
        spec = self.model.input
        return Fitting(spec) if self.arena is None else Fitting(spec, self.arena.allocate)

    def close(self) -> None:
        """End the engine, also one that still opens, and give its memory back. Blocks."""
        closing = self.child or self.engine
        if closing is not None:
            closing.close()
        if self.arena is not None:
            self.arena.close()
