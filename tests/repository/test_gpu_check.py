"""tools/gpu_check.py: verdicts, failing and hanging steps, the report; and its measurements on the CPU."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import gpu_check
import gpu_check_steps
from fault_script import NO_MEMORY
from gpu_check import (
    NOT_A_GPU_RESULT,
    Check,
    CheckOptions,
    Finished,
    ReportScrubber,
    Step,
    Verdict,
    judge_doctor,
    judge_engine_bench,
    judge_measurement,
    judge_pipeline_bench,
    judge_tests,
    list_steps,
    main,
)
from gpu_check_steps import (
    AddressSpace,
    GpuMemory,
    Recovery,
    StepRequest,
    check_kill,
    check_memory,
    check_options,
    check_parity,
    check_session,
    list_option_sets,
)
from tiny_models import TinyDetector
from visionedge.__main__ import build_parser
from visionedge.engine.device.devices import PROVIDERS
from visionedge.engine.device.session import KNOWN_OPTIONS
from visionedge.engine.local_engine import open_engine
from visionedge.engine.process.fault_injection import make_device_backend, read_fault_script
from visionedge.errors import VisionedgeError

BROKEN: dict[str, Any] = {
    "fulfilled": False,
    "firstBroken": "libcuda",
    "device": {"requested": "cuda", "effective": "cpu", "reason": "libcuda.so.1 is missing"},
    "chain": [
        {"name": "kernel", "title": "kernel", "state": "info", "found": "Linux", "remedies": []},
        {
            "name": "libcuda",
            "title": "libcuda",
            "state": "broken",
            "found": "libcuda.so.1 is missing",
            "remedies": [{"instruction": "install the NVIDIA driver", "lines": []}],
        },
    ],
}
WORKING = BROKEN | {"fulfilled": True, "firstBroken": None}
MEASURED = {"problems": [], "findings": ["seen"], "figures": {"batchMs": {}}}


def finished(document: Any = None, *, exit_code: int | None = 0, text: str = "") -> Finished:
    return Finished(exit_code, text, document)


def script(
    name: str,
    text: str,
    *,
    limit_s: float = 60,
    judge: Callable[[Finished, str], Verdict] = judge_measurement,
) -> Step:
    """A step that runs a Python script; ``OUT`` is the document that it may write."""
    prelude = "import json, pathlib, sys\nOUT = pathlib.Path(sys.argv[1])\n"
    return Step(name, name, (sys.executable, "-c", prelude + text, "{out}"), limit_s, judge, "cuda")


def printing(document: Any) -> str:
    return f"OUT.write_text({json.dumps(json.dumps(document))})"


def checked(tmp_path: Path, *steps: Step, device: str = "cuda") -> Check:
    """A check of these steps that has run."""
    scrub = ReportScrubber({}, "edge-17", Path("/srv/anna"))
    folder = tmp_path / "out"
    folder.mkdir()
    check = Check(CheckOptions(device), steps, folder, scrub, {"gpu": "NVIDIA A2"})
    (tmp_path / "work").mkdir()
    check.run(tmp_path / "work")
    return check


# --- steps --------------------------------------------------------------------------------------------------


def test_a_failing_step_does_not_stop_the_others(tmp_path: Path) -> None:
    check = checked(
        tmp_path,
        script("bad", "sys.exit('no such thing')"),
        script("odd", printing({"unknown": 1})),
        script("wrong", printing(MEASURED | {"problems": ["it differs"]})),
        script("good", printing(MEASURED)),
    )
    states = {name: verdict.state for name, verdict in check.verdicts.items()}
    assert states == {"bad": "fails", "odd": "fails", "wrong": "fails", "good": "holds"}
    assert "no such thing" in check.verdicts["bad"].findings[0]
    assert check.verdicts["wrong"].findings[0] == "it differs"
    assert check.exit_code == 1
    assert "**3 of 4 steps do not hold.**" in (check.folder / "report.md").read_text()


def test_a_program_that_is_missing_is_a_failed_step(tmp_path: Path) -> None:
    step = Step("lost", "lost", (str(tmp_path / "no-such-program"),), 60, judge_measurement, "cuda")
    assert checked(tmp_path, step).verdicts["lost"].state == "fails"


def test_a_hanging_step_is_killed_with_its_children_at_its_limit(tmp_path: Path) -> None:
    hang = (
        "import subprocess, threading\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import threading; threading.Event().wait()'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "print('hangs', flush=True)\n"
        "threading.Event().wait()"
    )
    check = checked(tmp_path, script("hangs", hang, limit_s=1.5), script("good", printing(MEASURED)))
    assert check.verdicts["hangs"].state == "timeout"
    assert "hangs" in check.verdicts["hangs"].findings[0]
    assert check.verdicts["good"].state == "holds"
    assert check.exit_code == 1
    child = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_steps_get_no_settings_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration, a token or an identity of IoT Edge would change what is measured."""
    monkeypatch.setenv("VISIONEDGE_HTTP_TOKEN", "bait-token-of-a-module")
    monkeypatch.setenv("IOTEDGE_DEVICEID", "edge")
    show = "import os\nprint(sorted(n for n in os.environ if n.startswith(('VISIONEDGE_', 'IOTEDGE_'))))"
    checked(tmp_path, script("environment", show))
    assert (tmp_path / "out" / "environment.txt").read_text() == "['VISIONEDGE_DATA']\n"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("quick", [True, False])
def test_every_command_exists(device: str, *, quick: bool) -> None:
    for step in list_steps(CheckOptions(device, "model.onnx", quick)):
        if step.command[1:3] == ("-m", "visionedge"):
            build_parser().parse_args(step.command[3:])
        else:
            assert Path(step.command[1]).is_file() or step.command[1:3] == ("-m", "pytest")


def test_all_limits_together_are_less_than_half_an_hour() -> None:
    assert sum(step.limit_s for step in list_steps(CheckOptions("cuda"))) <= 1800


# --- without a GPU ------------------------------------------------------------------------------------------


def test_without_a_gpu_the_report_names_the_first_broken_link(tmp_path: Path) -> None:
    check = checked(
        tmp_path,
        script("doctor", printing(BROKEN), judge=judge_doctor),
        script("session", "sys.exit('cuda is not usable')"),
        script("options", printing(MEASURED)),
    )
    assert check.exit_code == 3
    assert check.verdicts["options"].state == "not run"
    report = (check.folder / "report.md").read_text()
    assert "**No usable GPU**" in report
    assert "first broken link: libcuda: libcuda.so.1 is missing" in report
    assert "remedy: install the NVIDIA driver" in report
    summary = json.loads((check.folder / "summary.json").read_text())
    assert (summary["exitCode"], summary["gpuResult"]) == (3, False)


def test_a_first_session_on_the_gpu_overrules_the_doctor(tmp_path: Path) -> None:
    check = checked(
        tmp_path,
        script("doctor", printing(BROKEN), judge=judge_doctor),
        script("session", printing(MEASURED)),
        script("options", printing(MEASURED)),
    )
    assert check.verdicts["options"].state == "holds"
    assert check.exit_code == 1, "one of the two is wrong"


def test_a_dry_run_on_the_cpu_is_not_shown_as_a_gpu_result(tmp_path: Path) -> None:
    check = checked(tmp_path, script("session", printing(MEASURED)), device="cpu")
    assert check.exit_code == 0
    assert NOT_A_GPU_RESULT in (check.folder / "report.md").read_text()
    assert json.loads((check.folder / "summary.json").read_text())["gpuResult"] is False


# --- verdicts -----------------------------------------------------------------------------------------------

ENGINE = {
    "machine": {"effectiveDevice": "cuda"},
    "device": "requested cuda, effective cuda",
    "table": [{"lanes": 1, "batch": 8, "framesPerSecond": 900.0, "batchMs": 8.9}],
    "best": {"lanes": 1, "batch": 8},
    "choice": {"lanes": 1, "batch": 8, "shareOfBest": 1.0},
    "bare": [{"engineToBare": 0.97}],
}
PIPELINE = {
    "machine": {"effectiveDevice": "cuda"},
    "device": "requested cuda, effective cuda",
    "pipeline": {
        "framesPerSecond": 500.0,
        "framesPerSecondAll": [500.0],
        "cpuMsPerFrame": 2.0,
        "latencyMs": {"p50": 9.0},
    },
    "ratio": {"framesPerSecond": 3.0},
    "baselineAgreement": {"matched": 0.97},
}


@pytest.mark.parametrize(
    ("judge", "report"), [(judge_engine_bench, ENGINE), (judge_pipeline_bench, PIPELINE)]
)
def test_a_benchmark_holds_only_if_the_device_computed(
    judge: Callable[[Finished, str], Verdict], report: dict[str, Any]
) -> None:
    """It falls back to the CPU, and its figures look fine."""
    assert judge(finished(report), "cuda").state == "holds"
    on_cpu = report | {"machine": {"effectiveDevice": "cpu"}, "device": "libcublas.so.12 is missing"}
    verdict = judge(finished(on_cpu), "cuda")
    assert verdict.state == "fails"
    assert "libcublas.so.12 is missing" in verdict.findings[0]
    assert judge(finished(report, exit_code=1), "cuda").state == "fails"
    assert judge(finished(), "cuda").state == "fails"


@pytest.mark.parametrize(
    ("line", "exit_code", "device", "state"),
    [
        ("==== 3 passed, 2000 deselected in 9.1s ====", 0, "cuda", "holds"),
        ("2 passed, 1 skipped in 9.1s", 0, "cuda", "fails"),
        ("1 failed, 2 passed in 9.1s", 1, "cuda", "fails"),
        ("no tests ran in 0.1s", 5, "cuda", "fails"),
        ("no tests ran in 0.1s", 0, "cuda", "fails"),
        ("3 skipped in 9.1s", 0, "cpu", "not run"),
        ("2 passed, 1 skipped in 9.1s", 0, "cpu", "fails"),
        ("ModuleNotFoundError: No module named 'hypothesis'", 4, "cuda", "fails"),
    ],
)
def test_tests_hold_if_all_passed_and_none_was_skipped(
    line: str, exit_code: int, device: str, state: str
) -> None:
    assert judge_tests(finished(text=f"…\n{line}\n", exit_code=exit_code), device).state == state


def test_a_doctor_without_a_report_fails_and_is_no_proof_of_a_missing_gpu() -> None:
    verdict = judge_doctor(finished(exit_code=1, text="Traceback\nValueError: x"), "cuda")
    assert (verdict.state, dict(verdict.figures)) == ("fails", {})
    assert "ValueError: x" in verdict.findings[0]
    assert judge_doctor(finished(WORKING), "cuda").state == "holds"


# --- the folder ---------------------------------------------------------------------------------------------


def test_no_file_has_secrets_host_names_or_folders_of_the_user(tmp_path: Path) -> None:
    secret = "bait-9f3c2a"
    words = (
        f"rtsp://anna:{secret}@192.0.2.5/stream on edge-17, /srv/anna/models/a.onnx,"
        " CUDA failure 2: out of memory ; GPU=0 ; hostname=edge-17 ; line=63"
    )
    text = f"print({words!r})\n" + printing(MEASURED | {"findings": [words], "figures": {"text": words}})
    check = checked(tmp_path, script("leaky", text))
    for path in check.folder.iterdir():
        content = path.read_text()
        assert [word for word in (secret, "edge-17", "/srv/anna") if word in content] == [], path.name
    assert "~/models/a.onnx" in (check.folder / "leaky.txt").read_text()
    json.loads((check.folder / "leaky.json").read_text())


def test_a_secret_of_the_environment_is_masked() -> None:
    scrub = ReportScrubber({"CONTAINER_REGISTRY_PASSWORD": "bait-77aa51"}, "h", Path("/"))
    assert scrub("login with bait-77aa51 failed") == "login with *** failed"


def test_the_report_shows_options_and_the_way_back_side_by_side(tmp_path: Path) -> None:
    times = {
        "1": {"heuristic": {"ms": 2.0, "speedup": 1.0}, "graphs": {"ms": 1.6, "speedup": 1.25}},
        "8": {"heuristic": {"ms": 9.0, "speedup": 1.0}, "graphs": {"ms": 9.0, "speedup": 1.0}},
    }
    timeline = [{"seconds": 0.2, "effective": "cpu", "reasonCode": "engine-died"}]
    check = checked(
        tmp_path,
        script("options", printing(MEASURED | {"figures": {"batchMs": times}})),
        script("kill", printing(MEASURED | {"figures": {"timeline": timeline}})),
    )
    report = (check.folder / "report.md").read_text()
    assert "Everything holds." in report
    assert "| graphs | 1.60 (1.25 x) | 9.00 (1.00 x) |" in report
    assert "| 0.2 | cpu | engine-died |" in report
    assert check.exit_code == 0


def test_wrong_arguments_give_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    for words in (["--only", "no-such-step"], ["--device", "abacus"], ["--out", str(blocked)]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


def test_the_list_names_every_step_with_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [step.name for step in list_steps(CheckOptions("cuda"))]


def test_one_step_can_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [script("one", printing(MEASURED)), script("two", "sys.exit(1)")]
    monkeypatch.setattr(gpu_check, "list_steps", lambda _options: steps)
    assert main(["--only", "one", "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["one.json", "report.md", "summary.json"]
    assert "Everything holds." in capsys.readouterr().out


def test_an_interrupted_check_has_a_report_of_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_done: Finished, _device: str) -> Verdict:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError

    steps = [script("one", printing(MEASURED)), script("two", "pass", judge=interrupt)]
    monkeypatch.setattr(gpu_check, "list_steps", lambda _options: steps)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--out", str(tmp_path / "out")]) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert [step["name"] for step in json.loads((tmp_path / "out/summary.json").read_text())["steps"]] == [
        "one"
    ]
    assert "interrupted" in capsys.readouterr().err


# --- the measurements, on the CPU ---------------------------------------------------------------------------


@pytest.fixture
def request_on_cpu(tmp_path: Path) -> StepRequest:
    model = TinyDetector(width_px=320, height_px=320).save(tmp_path / "tiny.onnx")
    return StepRequest("cpu", model, tmp_path / "data", quick=True)


def test_a_first_session_is_described(request_on_cpu: StepRequest) -> None:
    outcome = check_session(request_on_cpu)
    assert outcome.problems == []
    assert outcome.figures["nodesOnDevice"] > 10
    assert outcome.figures["unplannedShapes"] == 0


@pytest.mark.system
def test_parity_is_measured_and_a_precision_that_cannot_be_made_is_named(request_on_cpu: StepRequest) -> None:
    outcome = check_parity(request_on_cpu)
    assert outcome.problems == []
    assert outcome.figures["parity"]["fp32"]["rows"] == 1.0
    assert "fp16" in outcome.figures["parity"] or any("fp16" in line for line in outcome.findings)


def test_option_sets_are_compared_with_the_cpu_and_timed_in_turns(request_on_cpu: StepRequest) -> None:
    outcome = check_options(request_on_cpu)
    assert outcome.problems == []
    names = list(list_option_sets("cpu"))
    assert list(outcome.figures["parity"]) == names
    assert {size: list(sets) for size, sets in outcome.figures["batchMs"].items()} == {"1": names, "4": names}


def test_an_option_set_that_is_refused_is_named_with_the_reason(
    request_on_cpu: StepRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {"odd": gpu_check_steps.OptionSet({"no_such_option": "1"}), "plain": gpu_check_steps.OptionSet()}
    monkeypatch.setattr(gpu_check_steps, "list_option_sets", lambda _device: sets)
    outcome = check_options(request_on_cpu)
    assert outcome.findings[0] == "odd was refused: CPUExecutionProvider has no option no_such_option"
    assert list(outcome.figures["parity"]) == ["plain"]


def test_every_option_of_a_set_is_known() -> None:
    """A misspelt one would be found only on a GPU."""
    for option_set in list_option_sets("cuda").values():
        assert set(option_set.options) <= KNOWN_OPTIONS[PROVIDERS["cuda"]]
        assert ("enable_cuda_graph" in option_set.options) is option_set.cuda_graphs


@pytest.mark.system
def test_a_full_memory_narrows_the_plan(request_on_cpu: StepRequest, tmp_path: Path) -> None:
    """In a process of its own, whose address space is limited."""
    out = tmp_path / "memory.json"
    script_path = Path(gpu_check_steps.__file__)
    words = ["memory", "--device", "cpu", "--model", str(request_on_cpu.model), "--quick"]
    done = subprocess.run(
        [sys.executable, str(script_path), *words, "--data", str(tmp_path / "data"), "--out", str(out)],
        env=os.environ | {"PYTHONPATH": str(script_path.parents[1] / "module")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert (document["problems"], document["figures"]["bucketsAfter"]) == ([], [1, 2])


def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["session", "--device", "cpu", "--model", "no-such.onnx", "--data", str(tmp_path)]
    assert gpu_check_steps.main([*words, "--out", str(tmp_path / "out.json")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no-such.onnx" in line


@pytest.mark.system
def test_frames_come_back_after_the_engine_is_killed(request_on_cpu: StepRequest) -> None:
    outcome = check_kill(request_on_cpu)
    assert outcome.problems == []
    assert outcome.figures["framesSeconds"] is not None
    assert outcome.figures["deviceSeconds"] is not None


# --- a GPU, simulated ---------------------------------------------------------------------------------------


class SimulatedCard:
    """A full card as faults of a simulated device: nothing starts on it, or batches of four do not fit."""

    def __init__(self, folder: Path) -> None:
        self._little, self._full = folder / "little", folder / "full"
        when = {"file": str(self._little), "minBatch": 4}
        faults = [
            {"when": when, "raise": NO_MEMORY},
            {"at": "probe", "when": {"file": str(self._full)}, "raise": NO_MEMORY},
        ]
        self.script = folder / "faults.json"
        self.script.write_text(json.dumps({"device": "cuda", "faults": faults}))
        self.free = 8 << 30

    def free_bytes(self) -> int:
        self.free -= 100 << 20  # each engine that opens takes some
        return self.free

    def fill(self, leave_bytes: int) -> int:
        self._little.touch()
        if not leave_bytes:
            self._full.touch()
        return self.free

    def release(self) -> None:
        self._little.unlink()
        self._full.unlink(missing_ok=True)


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimulatedCard:
    """Engines of the steps run on a simulated CUDA device with this card."""
    found = SimulatedCard(tmp_path)
    backend = make_device_backend(read_fault_script(found.script))
    monkeypatch.setattr(gpu_check_steps, "open_engine", partial(open_engine, backend=backend))
    monkeypatch.setattr(gpu_check_steps, "open_gpu_memory", lambda: found)
    return found


@pytest.mark.usefixtures("card")
def test_a_full_card_narrows_the_plan_and_is_the_reason_for_the_cpu(request_on_cpu: StepRequest) -> None:
    outcome = check_memory(replace(request_on_cpu, device="cuda"))
    assert outcome.problems == []
    assert outcome.figures["bucketsAfter"] == [1, 2]
    assert outcome.figures["keptBuckets"] == [1, 2]
    assert "out-of-memory" in outcome.figures["fullCard"]


def test_a_card_that_cannot_be_filled_is_a_problem(
    request_on_cpu: StepRequest, card: SimulatedCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some drivers use the memory of the machine when the card is full: then nothing was tested."""
    monkeypatch.setattr(card, "fill", lambda _leave: 0)
    monkeypatch.setattr(card, "release", lambda: None)
    problems = check_memory(replace(request_on_cpu, device="cuda")).problems
    assert [line.split(":")[0] for line in problems] == [
        "running",
        "opening on a full card",
        "opening with little memory",
    ]


def status(pid: int | None, effective: str, code: str, analysed: int, returns: int = 0) -> dict[str, Any]:
    recovery = {"changeOvers": returns}
    engine = {"process": {"pid": pid}, "effective": effective, "reasonCode": code, "recovery": recovery}
    return {"engine": engine, "cameras": [{"framesAnalysed": analysed}]}


def test_the_way_back_of_a_killed_engine_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of the CPU come first, then the device; frames and state of the dead process do not count."""
    seen = [
        status(7, "cuda", "ok", 90),
        status(None, "cuda", "ok", 95),
        status(8, "cuda", "ok", 95),
        status(8, "cpu", "engine-died", 97),
        status(9, "cuda", "ok", 99, returns=1),
    ]
    statuses = iter(seen)
    monkeypatch.setattr(gpu_check_steps, "fetch_status", lambda _url, _token: next(statuses))
    memory = GpuMemory(FakeDriver(total=6000 * MIB, used=0))
    recovery = Recovery(7, "cuda", 0)
    states = []
    for _ in seen:
        done = recovery.look("http://127.0.0.1:1", memory, 6000 * MIB, 5000 * MIB)
        states.append((done, recovery.frames_s is not None, recovery.device_s is not None))
    assert states == [(False, False, False)] * 3 + [(False, True, False), (True, True, True)]
    assert recovery.memory_s is not None
    timeline = [(each["effective"], each["reasonCode"]) for each in recovery.timeline]
    assert timeline == [("cuda", "ok"), ("cpu", "engine-died"), ("cuda", "ok")]


# --- the memory of a card -----------------------------------------------------------------------------------

MIB = 2**20


class FakeDriver:
    """The calls of libcuda that fill a card: `total` bytes, of which `used` are taken by others."""

    def __init__(self, total: int, used: int, failing: str = "") -> None:
        self.total, self.used, self.failing = total, used, failing
        self.taken: dict[int, int] = {}
        self.pushed = 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: 100 if name == self.failing else self._answer(name, *arguments)

    def _answer(self, name: str, *arguments: Any) -> int:
        free = self.total - self.used - sum(self.taken.values())
        if name == "cuMemGetInfo_v2":
            arguments[0]._obj.value, arguments[1]._obj.value = free, self.total
        elif name == "cuMemAlloc_v2":
            if arguments[1].value > free:
                return 2
            arguments[0]._obj.value = len(self.taken) + 1
            self.taken[len(self.taken) + 1] = arguments[1].value
        elif name == "cuMemFree_v2":
            del self.taken[arguments[0].value]
        self.pushed += {"cuCtxPushCurrent_v2": 1, "cuCtxPopCurrent_v2": -1}.get(name, 0)
        return 0


@pytest.mark.parametrize("leave_mib", [0, 100, 5000])
def test_a_card_is_filled_up_to_what_is_to_be_left(leave_mib: int) -> None:
    driver = FakeDriver(total=6000 * MIB, used=700 * MIB)
    memory = GpuMemory(driver)
    taken = memory.fill(leave_mib * MIB)
    assert 0 <= memory.free_bytes() - leave_mib * MIB < 2 * MIB
    assert taken == sum(driver.taken.values())
    memory.release()
    assert (driver.taken, memory.free_bytes(), driver.pushed) == ({}, 5300 * MIB, 0)


def test_a_driver_that_fails_is_named_by_its_call() -> None:
    with pytest.raises(VisionedgeError, match="answers 100 to cuInit"):
        GpuMemory(FakeDriver(0, 0, failing="cuInit"))


def test_the_limit_of_the_address_space_is_taken_back() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    space = AddressSpace()
    space.fill(4 << 30)
    assert resource.getrlimit(resource.RLIMIT_AS) != before
    space.release()
    assert resource.getrlimit(resource.RLIMIT_AS) == before
