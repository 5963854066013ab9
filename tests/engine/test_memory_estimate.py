"""A model that does not fit beside the others is refused before its engine is opened."""

from pathlib import Path

import pytest

from tiny_models import TinyDetector
from visionedge.config.schema import InferenceConfig
from visionedge.engine.memory_estimate import check_fits, estimate_memory_bytes
from visionedge.engine.process.client import EngineClient
from visionedge.engine.process.shared_memory import SharedFramePool
from visionedge.errors import UnavailableError
from visionedge.model.model import Model, load_model
from visionedge.model.quantization.variants import make_variant_path
from visionedge.runtime.process_limits import MemoryRoom

MIB = 2**20


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load_model(TinyDetector().save(tmp_path / "helmet.onnx"))


def check(model: Model, left_mib: float, *, is_limited: bool = True) -> None:
    room = MemoryRoom(round(left_mib * MIB), 768 * MIB, is_limited)
    check_fits(model, InferenceConfig(), read_room=lambda: room)


def test_a_model_that_does_not_fit_is_refused_with_the_figures(model: Model) -> None:
    """One line: how much it needs, how much is left, and the remedy."""
    needed_mib = -(-estimate_memory_bytes(model, InferenceConfig()) // MIB)
    for is_limited, remedy in (
        (True, "raise the memory limit of this container"),
        (False, "add memory to this machine"),
    ):
        with pytest.raises(UnavailableError) as refused:
            check(model, 12.7, is_limited=is_limited)
        assert str(refused.value) == (
            f"model helmet is not opened: it needs at least {needed_mib} MiB beside the other models,"
            f" and 12 of 768 MiB are left; {remedy}, or use fewer or smaller models"
        )
    check(model, needed_mib)


def test_where_nothing_is_known_nothing_is_refused(model: Model) -> None:
    check_fits(model, InferenceConfig(), read_room=lambda: None)
    check_fits(model, InferenceConfig(), read_room=lambda: MemoryRoom(2**40, 2**40, is_limited=False))


def test_on_servers_no_memory_is_needed(model: Model) -> None:
    assert estimate_memory_bytes(model, InferenceConfig(device="remote")) == 0


def test_the_estimate_grows_with_the_weights_their_precision_and_the_picture(
    model: Model, tmp_path: Path
) -> None:
    """Weights beside the file count; a model that may run in int8 needs less."""
    auto, exact = InferenceConfig(), InferenceConfig(precision="fp32")
    alone = estimate_memory_bytes(model, auto)
    (tmp_path / "helmet.onnx.data").write_bytes(bytes(2 * MIB))
    assert estimate_memory_bytes(model, auto) == estimate_memory_bytes(model, exact) == alone + 3 * MIB
    data = tmp_path / "data"
    for folder in (None, data):
        variant = make_variant_path(model, "int8", data=folder)
        variant.parent.mkdir(parents=True, exist_ok=True)
        variant.touch()
        assert estimate_memory_bytes(model, auto, data) < estimate_memory_bytes(model, exact, data)
        variant.unlink()
    large = load_model(TinyDetector(width_px=640, height_px=640).save(tmp_path / "large.onnx"))
    assert estimate_memory_bytes(large, auto) > alone + 4 * MIB


def test_an_engine_in_this_process_needs_no_second_one(model: Model) -> None:
    with_process = estimate_memory_bytes(model, InferenceConfig())
    assert estimate_memory_bytes(model, InferenceConfig(process=False)) < with_process / 10


def test_the_process_of_an_engine_takes_more_than_was_estimated(model: Model) -> None:
    """So that nothing is refused that would fit: even the smallest model on the leanest runtime."""
    inference = InferenceConfig(device="cpu", runtime="onnxruntime")
    client = EngineClient(model, inference, SharedFramePool(model.input, 4))
    before = set(children())
    client.open()
    try:
        (pid,) = set(children()) - before
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        private_kib = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))
        assert estimate_memory_bytes(model, inference) < private_kib << 10
    finally:
        client.close()


def children() -> list[str]:
    return [
        pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    ]
