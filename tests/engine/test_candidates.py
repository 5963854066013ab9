"""Which engine is opened: the demanded one, the one that is kept, or the one that is measured now."""

import json
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_models import TinyDetector
from visionedge.config.schema import InferenceConfig
from visionedge.engine.candidates import has_candidates, list_eligible_variants
from visionedge.engine.device.backend import DeviceBackend, open_session
from visionedge.engine.device.devices import USABLE, EffectiveDevice, ReasonCode, Runtime
from visionedge.engine.device.session import (
    CUDA_GRAPHS,
    EXHAUSTIVE_SEARCH,
    PLAIN,
    DeviceSession,
    NodePlacement,
    PictureBatch,
)
from visionedge.engine.engine_choice import CHOICES_FOLDER, CandidateFigures, EngineCandidate, EngineChoice
from visionedge.engine.local_engine import LocalEngine, open_engine
from visionedge.engine.plan import OperatingPoint, Plan
from visionedge.errors import ModelError, UnavailableError
from visionedge.model.compiler.build import CACHE_FOLDER as COMPILED
from visionedge.model.model import Model, load_model
from visionedge.model.parity import Parity, Tolerance
from visionedge.model.postprocess import Rows
from visionedge.model.quantization.variants import (
    VariantRuntime,
    make_tolerance_document,
    make_variant_path,
    save_variant,
)
from visionedge.runtime.ov import installed_openvino

GOOD = Parity(pictures=8, boxes=100, matched=0.97, score_shift=0.01, max_score_shift=0.1)
BAD = Parity(pictures=8, boxes=100, matched=0.5, score_shift=0.01, max_score_shift=0.1)
ORT, ORT_INT8 = EngineCandidate("onnxruntime", "fp32"), EngineCandidate("onnxruntime", "int8")
OV, OV_BF16 = EngineCandidate("openvino", "fp32"), EngineCandidate("openvino", "bf16")
OV_INT8 = EngineCandidate("openvino", "int8")
USUAL, SLOW = 60_000, 200_000
"""Work of a run beside that of the session: a candidate without it is much faster."""

ONLY_ORT: tuple[Runtime, ...] = ("onnxruntime",)
ONE_LANE = {"cpu": Plan(1, (1,), "given"), "cuda": Plan(1, (1,), "given")}


class ScriptedSession:
    """A session on the CPU that says which runtime it is, and is slow or wrong as the test says."""

    node_placement = NodePlacement(1)
    notes: tuple[str, ...] = ()

    def __init__(self, inner: DeviceSession, device: EffectiveDevice, runtime: Runtime) -> None:
        self.device = device
        self.runtime = runtime
        self.rows = inner.rows
        self.closed = False
        self.work = 0
        self.change: Callable[[Rows], Rows] = lambda rows: rows
        self._inner = inner

    def run(self, pictures: PictureBatch, size: int) -> Rows:
        sum(range(self.work))
        return self.change(self._inner.run(pictures, size))

    def keep_only(self, sizes: Collection[int]) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@dataclass
class ScriptedRuntimes:
    """A backend with two runtimes; the slowest is the plain one. `wrong` are changed rows by candidate."""

    device: EffectiveDevice = "cpu"
    runtimes: tuple[Runtime, ...] = ("onnxruntime", "openvino")
    precisions: tuple[str, ...] = ("fp32", "bf16")
    options: tuple[str, ...] = (PLAIN,)
    work: dict[EngineCandidate, int] = field(default_factory=dict)
    wrong: dict[EngineCandidate, Callable[[Rows], Rows]] = field(default_factory=dict)
    broken: set[EngineCandidate] = field(default_factory=set)
    opened: list[tuple[EngineCandidate, ScriptedSession]] = field(default_factory=list)

    def backend(self) -> DeviceBackend:
        def find_precisions(_device: EffectiveDevice, runtime: Runtime) -> tuple[str, ...]:
            return ("fp32",) if runtime == "onnxruntime" else self.precisions

        return DeviceBackend(
            has_provider=lambda device: device == self.device,
            probe_device=lambda _device: USABLE,
            open=self.open,
            find_runtimes=lambda device: self.runtimes if device == "cpu" else ("onnxruntime",),
            find_precisions=find_precisions,
            find_options=lambda device, _: self.options if device == self.device else (PLAIN,),
        )

    def open(
        self,
        graph: bytes,
        device: EffectiveDevice,
        *,
        max_batch: int,
        data: Path | None,
        runtime: Runtime = "onnxruntime",
        precision: str = "fp32",
        options: str = PLAIN,
    ) -> DeviceSession:
        inner = open_session(graph, "cpu", max_batch=max_batch, data=data)
        candidate = EngineCandidate(runtime, precision, options)
        if candidate in self.broken:
            raise RuntimeError("GatherElements: the shapes of data and indices differ")
        session = ScriptedSession(inner, device, runtime)
        session.work = self.work.get(candidate, USUAL if candidate == ORT else 10)
        session.change = self.wrong.get(candidate, session.change)
        self.opened.append((candidate, session))
        return session

    def left_open(self) -> list[EngineCandidate]:
        return [candidate for candidate, session in self.opened if not session.closed]


def with_nan(rows: Rows) -> Rows:
    return np.full_like(rows, np.nan)


def moved(rows: Rows) -> Rows:
    rows = rows.copy()
    rows[..., :4] += 25
    return rows


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidates differ so much that short trials suffice, also on a busy machine."""
    monkeypatch.setattr("visionedge.engine.engine_choice.MIN_CPU_SHARE", 0.0)
    monkeypatch.setattr("visionedge.engine.engine_choice.MIN_CPU_SHARE_DEFAULT", 0.0)
    monkeypatch.setattr("visionedge.engine.engine_choice._TRIAL_S", 0.005)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled graphs are kept: the same few in every test."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def data(tmp_path: Path, compiled: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / COMPILED).symlink_to(compiled)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load_model(TinyDetector().save(tmp_path / "tiny.onnx"))


def keep_variant(
    model: Model, parity: Parity = GOOD, seed: int = 1, runtime: VariantRuntime | None = None
) -> None:
    report = {
        "recipe": "a test's",
        "parity": parity.document(),
        "tolerance": make_tolerance_document(Tolerance()),
        "made": {"at": "2026-01-01T00:00:00Z"},
    }
    path = make_variant_path(model, "int8", runtime=runtime)
    save_variant(path, TinyDetector(seed=seed).proto(), model, "int8", report, runtime=runtime)


def opened(
    model: Model, data: Path | None, runtimes: ScriptedRuntimes, *, measuring: bool = True, **inference: Any
) -> LocalEngine:
    config = InferenceConfig.model_validate({"device": runtimes.device, "maxBatch": 1, **inference})
    return open_engine(
        model,
        config,
        data=data,
        plans=ONE_LANE,
        measuring=measuring,
        cores=1,
        backend=runtimes.backend(),
    )


def figures(engine: LocalEngine, candidate: EngineCandidate) -> CandidateFigures:
    return next(each for each in engine.info().choice.results if each.candidate == candidate)


# --- measured -----------------------------------------------------------------------------------------------


def test_the_fastest_runtime_and_precision_computes_and_the_others_are_closed(
    model: Model, data: Path
) -> None:
    runtimes = ScriptedRuntimes(work={OV: SLOW})
    engine = opened(model, data, runtimes)
    info = engine.info()
    assert (info.choice.candidate, info.runtime) == (OV_BF16, "openvino")
    assert [each.candidate for each in info.choice.results] == [ORT, OV, OV_BF16]
    assert runtimes.left_open() == [OV_BF16]


def test_a_choice_is_kept_and_only_its_engine_is_opened_at_the_next_start(model: Model, data: Path) -> None:
    first = opened(model, data, ScriptedRuntimes()).info().choice
    runtimes = ScriptedRuntimes()
    again = opened(model, data, runtimes).info().choice
    assert (again.candidate, again.reason) == (first.candidate, first.reason)
    assert [candidate for candidate, _ in runtimes.opened] == [ORT, first.candidate]
    assert runtimes.left_open() == [first.candidate]


def test_a_data_folder_that_cannot_be_reached_does_not_stop_the_engine(model: Model, data: Path) -> None:
    """Its name is too long, an error that root meets, too, as other users do without permission."""
    choice = opened(model, data / ("n" * 300), ScriptedRuntimes()).info().choice
    assert [each.candidate for each in choice.results] == [ORT, OV, OV_BF16]


def test_without_measuring_a_kept_choice_counts_else_onnxruntime(model: Model, data: Path) -> None:
    engine = opened(model, data, ScriptedRuntimes(), measuring=False)
    choice = engine.info().choice
    assert (choice.candidate, choice.reason, choice.results) == (ORT, "nothing was measured", ())
    chosen = opened(model, data, ScriptedRuntimes()).info().choice
    again = opened(model, data, ScriptedRuntimes(), measuring=False).info().choice
    assert (again.candidate, again.reason) == (chosen.candidate, chosen.reason)


def test_a_process_that_is_restarted_opens_the_same_engine_without_a_cache(model: Model, data: Path) -> None:
    """A data folder on a full or read-only disk keeps nothing."""
    choice = opened(model, data, ScriptedRuntimes()).info().choice
    runtimes = ScriptedRuntimes()
    (entry,) = (data / CHOICES_FOLDER).glob("*.json")
    entry.unlink()
    engine = open_engine(
        model,
        InferenceConfig(device="cpu"),
        data=data,
        plans=ONE_LANE,
        choices={"cpu": choice},
        backend=runtimes.backend(),
    )
    assert engine.info().choice == choice
    assert [candidate for candidate, _ in runtimes.opened] == [ORT, choice.candidate]


def test_a_kept_engine_that_cannot_be_opened_any_more_gives_way_to_onnxruntime(
    model: Model, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(model, data, ScriptedRuntimes(work={OV: SLOW}))
    runtimes = ScriptedRuntimes(broken={OV_BF16})
    assert opened(model, data, runtimes).info().choice.candidate == ORT
    assert "openvino bf16, which was chosen before, cannot be opened" in caplog.text
    assert runtimes.left_open() == [ORT]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_nan, "opening: its output contains NaN or infinity"),
        (moved, "its results differ: "),
        (np.zeros_like, "its results differ: "),
    ],
)
def test_a_fast_engine_with_wrong_results_is_not_used(
    model: Model, data: Path, change: Callable[[Rows], Rows], words: str
) -> None:
    runtimes = ScriptedRuntimes(work={OV: SLOW}, wrong={OV_BF16: change})
    engine = opened(model, data, runtimes)
    assert engine.info().choice.candidate == ORT
    assert words in figures(engine, OV_BF16).note


def test_a_graph_that_a_runtime_refuses_is_reported_and_onnxruntime_goes_on(model: Model, data: Path) -> None:
    runtimes = ScriptedRuntimes(broken={OV, OV_BF16})
    engine = opened(model, data, runtimes)
    assert engine.info().choice.candidate == ORT
    assert figures(engine, OV).note.startswith("opening: GatherElements: ")
    assert "opening: GatherElements" in engine.info().choice.reason


def test_an_engine_that_fails_at_its_warm_up_gives_way_to_onnxruntime(
    model: Model, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It computed before: what it does with the sizes of the plan is seen only now."""
    opened(model, data, ScriptedRuntimes(work={OV: SLOW}))

    def fail(_: Rows) -> Rows:
        raise RuntimeError("out of registers")

    runtimes = ScriptedRuntimes(wrong={OV_BF16: fail})
    info = opened(model, data, runtimes).info()
    assert (info.choice.candidate, info.runtime) == (ORT, "onnxruntime")
    assert "openvino bf16 is not used: " in info.choice.reason
    assert "out of registers" in caplog.text
    assert runtimes.left_open() == [ORT]


def test_the_options_of_a_gpu_are_candidates_that_plain_options_can_win_against(
    model: Model, data: Path
) -> None:
    """A device that only pretends to be CUDA."""
    graphs = EngineCandidate("onnxruntime", "fp32", CUDA_GRAPHS)
    search = EngineCandidate("onnxruntime", "fp32", EXHAUSTIVE_SEARCH)
    options = (PLAIN, EXHAUSTIVE_SEARCH, CUDA_GRAPHS)
    fast = ScriptedRuntimes("cuda", options=options, work={search: SLOW})
    assert opened(model, data, fast, parity="off").info().choice.candidate == graphs
    wrong = ScriptedRuntimes("cuda", options=options, work={search: SLOW}, wrong={graphs: moved})
    (entry,) = (data / CHOICES_FOLDER).glob("*.json")
    entry.unlink()
    info = opened(model, data, wrong, parity="off").info()
    assert info.choice.candidate == ORT
    assert [candidate for candidate in wrong.left_open() if candidate != ORT] == []


@pytest.mark.skipif(not installed_openvino(), reason="the package openvino is not here")
def test_both_real_runtimes_are_measured_and_agree(model: Model, data: Path) -> None:
    """Whichever is faster here."""
    config = InferenceConfig.model_validate({"device": "cpu", "precision": "fp32", "maxBatch": 1})
    with closing(open_engine(model, config, data=data, plans=ONE_LANE, cores=1)) as engine:
        choice = engine.info().choice
        assert [each.candidate for each in choice.results] == [ORT, OV]
        assert choice.candidate.runtime == engine.info().runtime
        assert all(each.ms is not None and not each.note.startswith("opening") for each in choice.results)
        assert "differ:" not in figures(engine, OV).note
    with closing(open_engine(model, config, data=data, plans=ONE_LANE, cores=1)) as engine:
        assert engine.info().choice.reason == choice.reason


# --- demanded -----------------------------------------------------------------------------------------------


def test_a_demanded_runtime_is_used_without_a_comparison_of_speed(model: Model, data: Path) -> None:
    runtimes = ScriptedRuntimes(precisions=("fp32",), work={OV: SLOW})
    choice = opened(model, data, runtimes, runtime="openvino").info().choice
    assert (choice.candidate, choice.reason, choice.results) == (OV, "openvino was requested", ())
    assert runtimes.left_open() == [OV]


def test_a_demanded_runtime_narrows_the_candidates(model: Model, data: Path) -> None:
    runtimes = ScriptedRuntimes(work={OV: SLOW})
    choice = opened(model, data, runtimes, runtime="openvino").info().choice
    assert [each.candidate for each in choice.results] == [OV, OV_BF16]
    assert choice.candidate == OV_BF16
    assert runtimes.left_open() == [OV_BF16]


def test_a_demanded_runtime_that_disagrees_is_refused_by_the_parity_policy(model: Model, data: Path) -> None:
    def choice(parity: str) -> tuple[EngineCandidate, ReasonCode]:
        runtimes = ScriptedRuntimes(precisions=("fp32",), wrong={OV: moved})
        info = opened(model, data, runtimes, runtime="openvino", parity=parity).info()
        assert runtimes.left_open() == [info.choice.candidate]
        return info.choice.candidate, info.device.code

    cpu = ReasonCode.CPU_REQUESTED
    assert [choice(parity) for parity in ("refuse", "warn", "off")] == [
        (ORT, ReasonCode.RUNTIME_REFUSED),
        (OV, cpu),
        (OV, cpu),
    ]


def test_where_a_demanded_runtime_is_not_installed_onnxruntime_computes_alone(
    model: Model, data: Path
) -> None:
    info = opened(model, data, ScriptedRuntimes(runtimes=ONLY_ORT), runtime="openvino").info()
    assert (info.choice.candidate, info.device.code) == (ORT, ReasonCode.RUNTIME_MISSING)
    assert "requested" not in info.choice.reason


def test_a_demanded_precision_that_no_runtime_has_is_an_error(model: Model, data: Path) -> None:
    runtimes = ScriptedRuntimes(runtimes=ONLY_ORT)
    with pytest.raises(UnavailableError, match="bf16 cannot be used: only OpenVINO has it on a CPU"):
        opened(model, data, runtimes, precision="bf16")


def test_bf16_may_be_demanded_without_a_data_folder(model: Model) -> None:
    choice = opened(model, None, ScriptedRuntimes(), precision="bf16").info().choice
    assert (choice.candidate, choice.reason) == (OV_BF16, "bf16 was requested")


# --- variants -----------------------------------------------------------------------------------------------


def test_a_variant_is_a_candidate_of_each_runtime(model: Model, data: Path) -> None:
    keep_variant(model)
    choice = opened(model, data, ScriptedRuntimes(precisions=("fp32",))).info().choice
    assert [str(each.candidate) for each in choice.results] == [
        "onnxruntime fp32",
        "openvino fp32",
        "onnxruntime int8",
        "openvino int8",
    ]


def test_openvino_computes_a_variant_of_its_own_with_bf16_between_the_integers(
    model: Model, data: Path
) -> None:
    """In place of the general one, which onnxruntime computes. Its floats were judged in bf16, too."""
    keep_variant(model)
    keep_variant(model, runtime="openvino")
    runtimes = ScriptedRuntimes()
    results = opened(model, data, runtimes).info().choice.results
    assert [str(each.candidate) for each in results] == [
        "onnxruntime fp32",
        "openvino fp32",
        "openvino bf16",
        "onnxruntime int8",
        "openvino int8",
    ]
    asked = [candidate for candidate, _ in runtimes.opened]
    assert asked.count(OV_BF16) == 2, "the model, and the variant"


def test_a_variant_for_openvino_is_never_opened_in_onnxruntime(model: Model, data: Path) -> None:
    """Also where int8 is demanded."""
    keep_variant(model, runtime="openvino")
    only_ort = ScriptedRuntimes(runtimes=ONLY_ORT)
    choice = opened(model, data, only_ort).info().choice
    assert choice.reason.endswith("its int8 variant for openvino needs that runtime")
    assert not has_candidates(model, choice, "auto", data=data, backend=only_ort.backend())
    with pytest.raises(ModelError, match="has no int8 variant"):
        opened(model, data, only_ort, precision="int8")
    assert opened(model, data, ScriptedRuntimes(), precision="int8").info().choice.candidate == OV_INT8


def test_another_variant_is_measured_again(model: Model, data: Path) -> None:
    """The choice belongs to exactly these graphs."""
    for seed in (1, 2):
        keep_variant(model, seed=seed)
        opened(model, data, ScriptedRuntimes(runtimes=ONLY_ORT))
    assert len(list((data / CHOICES_FOLDER).glob("*.json"))) == 2


def test_a_damaged_choice_is_measured_again(model: Model, data: Path) -> None:
    first = opened(model, data, ScriptedRuntimes()).info().choice
    (entry,) = (data / CHOICES_FOLDER).glob("*.json")
    entry.write_text("{")
    assert opened(model, data, ScriptedRuntimes()).info().choice.results != ()
    assert json.loads(entry.read_text())["choice"]["runtime"] in ("onnxruntime", "openvino")
    assert first.results


def test_a_variant_refused_by_its_report_is_excluded(model: Model, data: Path) -> None:
    keep_variant(model, BAD)
    assert list_eligible_variants(model, device="cpu", data=data) == []
    choice = opened(model, data, ScriptedRuntimes(runtimes=ONLY_ORT)).info().choice
    assert choice.candidate == ORT
    assert choice.reason.startswith(
        "the model file is used as it is: its int8 variant is refused by its report: "
    )


def test_int8_is_used_only_on_cpus(model: Model, data: Path) -> None:
    keep_variant(model)
    assert list_eligible_variants(model, device="cuda", data=data) == []
    choice = opened(model, data, ScriptedRuntimes("cuda"), parity="off").info().choice
    assert choice.reason == "the model file is used as it is: its int8 variant is not used on cuda"


def test_an_engine_that_was_not_measured_makes_a_comparison_worthwhile(model: Model, data: Path) -> None:
    ort = ScriptedRuntimes(runtimes=ONLY_ORT).backend()
    unmeasured = EngineChoice(ORT, "nothing was measured")
    measured = EngineChoice(ORT, "no gain", (CandidateFigures(ORT, 9.0), CandidateFigures(OV, 9.0)))
    assert not has_candidates(model, unmeasured, "auto", data=data, backend=ort)
    both = ScriptedRuntimes().backend()
    assert has_candidates(model, unmeasured, "auto", data=data, backend=both)
    assert not has_candidates(model, unmeasured, "onnxruntime", data=data, backend=both)
    assert not has_candidates(model, measured, "auto", data=data, backend=both)
    keep_variant(model)
    assert has_candidates(model, measured, "auto", data=data, backend=ort)
    with_int8 = EngineChoice(ORT, "no gain", (CandidateFigures(ORT, 9.0), CandidateFigures(ORT_INT8, 9.0)))
    assert not has_candidates(model, with_int8, "auto", data=data, backend=ort)


def test_the_reason_for_a_model_without_variants_says_so(model: Model, data: Path) -> None:
    choice = opened(model, data, ScriptedRuntimes(runtimes=ONLY_ORT)).info().choice
    assert choice.reason == (
        "the model file is used as it is: no variant of it in another precision was found"
    )


# --- the plan -----------------------------------------------------------------------------------------------


def test_each_engine_has_its_own_plan(model: Model, data: Path) -> None:
    """The graph is the same, and the speed is not."""
    plans = set[str]()
    for wanted in ("onnxruntime", "openvino"):
        config = InferenceConfig.model_validate(
            {"device": "cpu", "runtime": wanted, "precision": "fp32", "maxBatch": 1}
        )
        engine = open_engine(model, config, data=data, cores=1, backend=ScriptedRuntimes().backend())
        measured = engine.info().plan.measured
        assert measured is not None
        assert measured.choice == OperatingPoint(1, 1)
        plans = {file.name for file in (data / "plans").glob("*.json")}
    assert len(plans) == 2
