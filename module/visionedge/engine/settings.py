"""The settings that an engine needs: `inference` of the configuration, without what only the module needs.

Worker processes get this instead of the configuration, so that they start without pydantic (65 ms less).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Union

from visionedge.engine.device.devices import RequestedDevice

if TYPE_CHECKING:
    from visionedge.config.schema import InferenceConfig

FallbackPolicy = Literal["degrade", "hold", "exit"]
"""Without the requested device: the CPU computes, nothing computes until it is back, or the module ends."""

ParityPolicy = Literal["refuse", "warn", "off"]
"""A device that differs from the CPU is not used, is used with a warning, or is not compared at all."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """See the section `inference` in docs/configuration.md: the fields have the same names."""

    device: RequestedDevice
    fallback: FallbackPolicy
    parity: ParityPolicy
    iou: float
    max_batch: int
    precision: Literal["auto", "fp32", "fp16", "int8"]
    latency_budget_ms: float | None

    @staticmethod
    def of(inference: Union["InferenceConfig", "EngineSettings"]) -> "EngineSettings":
        """The settings in a configuration."""
        return EngineSettings(
            inference.device,
            inference.fallback,
            inference.parity,
            inference.iou,
            inference.max_batch,
            inference.precision,
            inference.latency_budget_ms,
        )
