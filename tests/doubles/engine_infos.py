"""An `EngineInfo` for doubles of `Engine`."""

from datetime import UTC, datetime

from visionedge.engine.device.devices import DeviceState, ReasonCode
from visionedge.engine.device.session import NodePlacement
from visionedge.engine.device_parity import DeviceCheck
from visionedge.engine.engine_choice import EngineCandidate, EngineChoice
from visionedge.engine.interface import EngineInfo
from visionedge.engine.plan import Plan
from visionedge.model.model import Model

ON_CPU = DeviceState("cpu", "cpu", ReasonCode.CPU_REQUESTED, "", datetime(2026, 11, 22, tzinfo=UTC))


def make_engine_info(model: Model, plan: Plan | None = None, device: DeviceState = ON_CPU) -> EngineInfo:
    """An engine on the CPU with one lane, unless something else is given."""
    plan = plan or Plan(1, (8,), "test")
    return EngineInfo(
        model,
        device,
        EngineChoice(EngineCandidate("onnxruntime", "fp32"), "test"),
        plan,
        NodePlacement(1),
        DeviceCheck(),
        notes=(),
        max_rows=9,
    )
