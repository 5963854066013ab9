"""`visionedge doctor` on the machine that runs the tests, and inside a running module."""

import io
import json
import logging
import os
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from doctor_hosts import DATA, HostBuilder, linux
from module_process import ModuleProcess
from scripted_inference import HttpInferenceServer, InferenceModel
from tiny_models import TinyDetector
from visionedge.__main__ import main
from visionedge.cli.arguments import supports_colours
from visionedge.config.load import parse_config
from visionedge.engine.device.devices import USABLE, DeviceState, DeviceVerdict, ReasonCode
from visionedge.engine.device.remote import ReplicaStatus, ServerExamination
from visionedge.engine.device.session import NodePlacement
from visionedge.frames.types import utc_now
from visionedge.model.model_store import ModelStore
from visionedge.ops.doctor.facts import DoctorRequest, RunningEngine
from visionedge.ops.doctor.host import detect_environment, this_host
from visionedge.ops.doctor.report import DoctorReport, examine
from visionedge.runtime import logs
from visionedge.runtime.memory_requirement import CPU_MEMORY_MIB, MORE_MODEL_MIB

NO_GPU_HERE = detect_environment(this_host(os.environ)).passthrough in ("none", "intel")
without_gpu = pytest.mark.skipif(not NO_GPU_HERE, reason="this machine has a GPU")


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of this machine counts."""
    monkeypatch.setenv("VISIONEDGE_DATA", str(tmp_path / "data"))
    for name in ("VISIONEDGE_DEVICE", "VISIONEDGE_CONFIG", "VISIONEDGE_HTTP", "VISIONEDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)


@without_gpu
def test_without_a_gpu_doctor_ends_quickly_with_cpu_and_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun_s = time.monotonic()
    assert main(["doctor", "--json"]) == 0
    assert time.monotonic() - begun_s < 5
    report = json.loads(capsys.readouterr().out)
    assert report["device"]["effective"] == "cpu"
    gpu = next(link for link in report["chain"] if link["name"] == "passthrough")
    # A container or a VM may lack a GPU that its host has: then there is a remedy.
    assert (report["firstBroken"], gpu["state"]) in [(None, "info"), ("passthrough", "broken")]
    assert bool(gpu["remedies"]) == (gpu["state"] == "broken")
    assert report["fulfilled"]


@without_gpu
def test_a_missing_demanded_gpu_gives_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cuda"]) == 3
    out = capsys.readouterr().out
    assert "requested cuda, effective cpu" in out
    assert "first broken link: GPU" in out


def test_a_requested_cpu_is_always_available(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    assert "(asked-cpu)" in capsys.readouterr().out


def test_the_cameras_of_a_configuration_are_checked_without_showing_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "vision.yaml"
    path.write_text("cameras: {dock: {uri: 'rtsp://me:hunter2@127.0.0.1:1/x'}, clip: {uri: 'demo:'}}\n")
    bundle = tmp_path / "doctor.zip"
    more = ("--config", str(path), "--http", "127.0.0.1:1", "--bundle", str(bundle))
    assert main(["doctor", "--json", *more]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)["systemChecks"]
    cameras = {f["title"]: f["state"] for f in found if f["name"] == "camera"}
    assert cameras == {"camera dock": "broken", "camera clip": "ok"}
    assert "check it before you send it" in captured.err
    with zipfile.ZipFile(bundle) as archive:
        everything = "".join(archive.read(name).decode() for name in archive.namelist())
    assert "hunter2" not in captured.out + captured.err + everything


@pytest.mark.parametrize(
    "arguments",
    [
        ("--plan", "--windows-build", "x", "--edition", "pro", "--gpu", "NVIDIA A2"),
        ("--config", "no-such.yaml"),
        ("--http", "nowhere"),
    ],
)
def test_wrong_arguments_give_a_one_line_error_and_exit_code_2(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_a_plan_lists_all_missing_arguments_together(capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each option."""
    assert main(["doctor", "--plan"]) == 2
    lines = capsys.readouterr().err.splitlines()
    names = [line.removeprefix("visionedge: ").partition(":")[0] for line in lines]
    assert names == ["--windows-build", "--edition", "--gpu"]


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environ", "shown"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_colours_are_used_only_on_terminals_that_allow_them(
    stream: io.StringIO, environ: dict[str, str], shown: bool
) -> None:
    """Not for files and pipes, and not with NO_COLOR."""
    assert supports_colours(stream, environ) == shown


def test_a_plan_is_text_or_json_and_an_unsupported_one_gives_exit_code_3(
    capsys: pytest.CaptureFixture[str],
) -> None:
    question = ["doctor", "--plan", "--windows-build", "19044.1620", "--edition", "pro", "--gpu"]
    assert main([*question, "NVIDIA A2"]) == 0
    assert "-gpuPassthroughType DirectDeviceAssignment" in capsys.readouterr().out
    assert main([*question, "AMD Radeon", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["supported"] is False


def whole(root: Path) -> HostBuilder:
    """A machine whose chain is whole."""
    machine = linux(root).nvidia_nodes().kernel_driver().on_pci()
    return machine.driver("NVIDIA GeForce RTX 3060", 86).gpu_wheel().session_works()


def state(effective: str) -> DeviceState:
    code = ReasonCode.OK if effective == "cuda" else ReasonCode.CUDA_ERROR
    return DeviceState("auto", effective, code, "as it is", utc_now())  # type: ignore[arg-type]  # of the closed list


def test_a_running_engine_on_the_gpu_is_trusted_and_not_probed(tmp_path: Path) -> None:
    """No second session is opened beside it, which could take memory that it needs."""
    machine = whole(tmp_path / "root")
    running = RunningEngine(state("cuda"), NodePlacement(99, ("Loop post",)))
    report = examine(DoctorRequest("auto", parse_config({}), DATA, running), machine.host())
    assert report.effective == "cuda"
    assert not [question for question in machine.asked if question.startswith(("session", "placement"))]
    assert report.chain[-1].found == "99 nodes on cuda, 1 on the CPU: Loop post"


@pytest.mark.parametrize("runs", [True, False])
def test_a_gpu_not_faster_than_a_cpu_core_is_reported(tmp_path: Path, runs: bool) -> None:
    """By the engine that runs here, or by a session beside one on the CPU; a doubt breaks nothing."""
    doubt = "cuda takes 24.0 ms for a picture, one core of the CPU 24.6 ms: is it really a GPU that computes?"
    machine = whole(tmp_path / "root")
    assert machine.placement is not None
    machine.placement["doubt"] = doubt
    running = RunningEngine(state("cuda"), NodePlacement(99), doubt) if runs else None
    report = examine(DoctorRequest("auto", parse_config({}), DATA, running), machine.host())
    last = report.chain[-1]
    assert (last.name, last.state, last.found) == ("placement", "warning", doubt)
    assert report.effective == "cuda"


def test_an_engine_that_fell_back_to_the_cpu_is_examined_again(tmp_path: Path) -> None:
    """The GPU may work again, and then doctor reports it."""
    machine = whole(tmp_path / "root")
    running = RunningEngine(state("cpu"), NodePlacement(99))
    report = examine(DoctorRequest("auto", parse_config({}), DATA, running), machine.host())
    assert report.effective == "cuda"
    assert "session CUDAExecutionProvider" in machine.asked


def test_a_model_by_address_is_placed_after_its_download(tmp_path: Path) -> None:
    """Before that nothing is reported about it."""
    machine = whole(tmp_path / "root")
    config = parse_config({"model": {"url": "https://192.0.2.5/m.onnx", "sha256": "ab" * 32}})
    report = examine(DoctorRequest("auto", config, tmp_path), machine.host())
    assert report.chain[-1].found == "unknown: the model is not downloaded yet"
    with ModelStore(tmp_path).open_partial("ab" * 32) as part:
        part.commit()
    report = examine(DoctorRequest("auto", config, tmp_path), machine.host())
    assert report.chain[-1].found == "all 212 nodes of the model on cuda"


def test_the_file_of_each_model_is_checked(tmp_path: Path) -> None:
    """Of the section `model` and of `models`; the bundled one has none."""
    here = tmp_path / "here.onnx"
    here.touch()
    addressed = {"url": "https://h/m.onnx?sig=hunter2", "sha256": "ab" * 32}
    models = {"here": {"path": str(here)}, "lost": {"path": "/models/lost.onnx"}, "far": addressed, "own": {}}
    machine = linux(tmp_path / "root").cpu_wheel()
    machine.file(str(here), "")

    def checked() -> dict[str, tuple[str, str]]:
        config = parse_config({"models": models, "model": {"path": "/models/none.onnx"}})
        report = examine(DoctorRequest("cpu", config, tmp_path / "data"), machine.host())
        return {
            each.title: (str(each.state), each.found) for each in report.system_checks if each.name == "model"
        }

    missing = "No such file or directory"
    assert checked() == {
        "model": ("broken", f"/models/none.onnx: {missing}"),
        "model here": ("ok", "can be read"),
        "model lost": ("broken", f"/models/lost.onnx: {missing}"),
        "model far": ("info", "is not downloaded yet; `visionedge run` does it"),
    }
    machine.file(str(tmp_path / "data" / "models" / f"{'ab' * 32}.onnx"), "")
    assert checked()["model far"] == ("ok", "can be read")


def test_each_further_model_raises_the_recommended_memory(tmp_path: Path) -> None:
    machine = linux(tmp_path).cpu_wheel().memory(total_mib=800)

    def found(models: dict[str, object]) -> tuple[str, str]:
        report = examine(DoctorRequest("cpu", parse_config({"models": models}), DATA), machine.host())
        (memory,) = (each for each in report.system_checks if each.name == "memory")
        return str(memory.state), memory.found

    assert found({})[0] == "ok"
    state, text = found({"a": {}})
    assert state == "warning"
    assert f"{CPU_MEMORY_MIB + MORE_MODEL_MIB} MiB are recommended" in text


def test_only_needed_probes_are_started(tmp_path: Path) -> None:
    """Without CUDA in the package no session, without cameras and IoT Edge no network."""
    machine = linux(tmp_path / "root").cpu_wheel()
    examine(DoctorRequest("auto", parse_config({}), DATA), machine.host())
    assert sorted(machine.asked) == ["clock", "driver", "libraries"]


def test_a_clock_earlier_than_the_installed_files_is_reported(tmp_path: Path) -> None:
    machine = linux(tmp_path / "root").cpu_wheel()
    past = utc_now().replace(year=2019)
    report = examine(
        DoctorRequest("auto", parse_config({}), DATA), replace(machine.host(), utc_now=lambda: past)
    )
    clock = next(finding for finding in report.system_checks if finding.name == "clock")
    assert "days behind the files of this installation" in clock.found


def test_the_newest_lines_of_the_log_are_kept_bounded_and_masked() -> None:
    logs.configure_logging("info")
    for number in range(600):
        logging.getLogger("visionedge.test").info("line %d rtsp://me:hunter2@192.0.2.5/", number)
    logging.getLogger("visionedge.test").info("x" * 10_000)
    lines = logs.read_recent_log().splitlines()
    assert len(lines) == 500
    assert "line 599 rtsp://***@192.0.2.5/" in lines[-2]
    assert len(lines[-1]) == 2000


def test_a_running_module_is_examined_over_http_and_bundled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ModuleProcess(tmp_path / "data", "--camera", "dock=demo:") as module:
        report = module.get("/api/v1/doctor")
        assert report["schema"] == "visionedge/doctor/1"
        assert report["device"]["requested"] == "auto"
        assert [f["title"] for f in report["systemChecks"] if f["name"] == "camera"] == ["camera dock"]
        bundle = tmp_path / "doctor.zip"
        address = module.ready().removeprefix("http://").rstrip("/")
        assert main(["doctor", "--http", address, "--bundle", str(bundle)]) == 0
        capsys.readouterr()
    with zipfile.ZipFile(bundle) as archive:
        status = json.loads(archive.read("module/status.json"))
        log = archive.read("module/log.txt").decode()
    assert status["cameras"][0]["name"] == "dock"
    assert "ready: open" in log


@pytest.mark.parametrize(
    ("http", "states"),
    [
        ({"host": "0.0.0.0", "allowAnonymous": True}, ["warning"]),
        ({"host": "::", "allowAnonymous": True}, ["warning"]),
        ({"host": "0.0.0.0"}, []),  # a token is made
        ({"host": "0.0.0.0", "token": "secret-token", "allowAnonymous": True}, []),
        ({"host": "localhost"}, []),
        ({}, []),
    ],
)
def test_http_open_to_other_machines_is_reported(
    http: dict[str, str], states: list[str], tmp_path: Path
) -> None:
    machine = linux(tmp_path / "root").cpu_wheel()
    report = examine(DoctorRequest("auto", parse_config({"http": http}), DATA), machine.host())
    found = [finding for finding in report.system_checks if finding.name == "http"]
    assert [finding.state for finding in found] == states
    assert all("without a token" in finding.found and finding.remedies for finding in found)


# --- a remote device ----------------------------------------------------------------------------------------

REMOTE = parse_config(
    {"inference": {"device": "remote", "remote": {"url": ["https://a", "https://b"], "model": "m"}}}
)
UNREACHABLE = DeviceVerdict(ReasonCode.REMOTE_UNREACHABLE, "https://b Connection refused")
UP = ServerExamination("https://a", USABLE, "ready, m is UINT8 [-1, 8, 8, 3] -> FP32 [-1, 5, 6]")
DOWN = ServerExamination("https://b", UNREACHABLE, "Connection refused")


def examine_remote(
    folder: Path, *servers: ServerExamination, running: RunningEngine | None = None
) -> DoctorReport:
    """The report of a machine without a GPU whose servers answer so."""
    host = replace(HostBuilder(folder / "root").host(), servers=lambda _remote: servers)
    return examine(DoctorRequest("remote", REMOTE, DATA, running), host)


def test_doctor_shows_each_server_and_that_pictures_leave(tmp_path: Path) -> None:
    """One that works is enough; the chain to a GPU breaks nothing."""
    report = examine_remote(tmp_path, UP, DOWN)
    assert (report.effective, report.fulfilled, report.first_broken) == ("remote", True, None)
    first, second = (check for check in report.system_checks if check.name == "remote")
    assert (first.state, first.found) == ("ok", f"https://a: {UP.found}; pictures leave this device")
    assert (second.state, second.found) == ("broken", "https://b: Connection refused")
    assert second.remedies[0].instruction.startswith("check inference.remote.url")
    assert report.to_text().endswith("a server computes: pictures leave this device\n")


def test_without_a_usable_server_the_demand_is_not_fulfilled(tmp_path: Path) -> None:
    report = examine_remote(tmp_path, DOWN)
    assert (report.effective, report.fulfilled, report.code) == ("cpu", False, "remote-unreachable")
    last = "the CPU computes instead of a server: https://b Connection refused (remote-unreachable)\n"
    assert report.to_text().endswith(last)


def test_a_running_module_reports_its_servers_and_asks_none(tmp_path: Path) -> None:
    device = DeviceState("remote", "remote", ReasonCode.OK, "usable", utc_now())
    replicas = (ReplicaStatus("https://a", "up", None, 7, 1), ReplicaStatus("https://b", "down", "timed out"))
    running = RunningEngine(device, NodePlacement(0), None, replicas)
    report = examine_remote(tmp_path, running=running)
    assert report.effective == "remote"
    found = [check.found for check in report.system_checks if check.name == "remote"]
    assert found == [
        "https://a: in use, 7 batches, 1 failures; pictures leave this device",
        "https://b: timed out",
    ]


def test_doctor_asks_real_servers_for_readiness_shapes_and_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No picture is sent; a wrong token is named; the token is not shown."""
    path = TinyDetector().save(tmp_path / "tiny.onnx")
    token = "t0ken-for-doctor"
    with HttpInferenceServer(InferenceModel(path, token=token)) as server:
        section = {"url": server.url, "model": "tiny", "insecure": True}
        config = tmp_path / "vision.json"
        config.write_text(json.dumps({"inference": {"device": "remote", "remote": section}}))
        monkeypatch.setenv("VISIONEDGE_REMOTE_TOKEN", token)
        assert main(["doctor", "--config", str(config)]) == 0
        right = capsys.readouterr().out
        assert "ready, tiny is UINT8 [-1, 48, 64, 3] -> FP32 [-1, 320, 6], answers" in " ".join(right.split())
        monkeypatch.setenv("VISIONEDGE_REMOTE_TOKEN", "wrong-t0ken")
        assert main(["doctor", "--config", str(config)]) == 3
        wrong = capsys.readouterr().out
        assert "answered 401: a token is needed" in wrong
        assert "check VISIONEDGE_REMOTE_TOKEN" in wrong
        assert not server.model.batches
    assert token not in right + wrong
