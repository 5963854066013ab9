"""How doctor looks: children that may hang or crash, real libraries, real headers, real sockets."""

import json
import socket
import sys
from pathlib import Path

from tiny_models import TinyDetector
from visionedge.engine.device.backend import open_session
from visionedge.engine.device_parity import SpeedCheck
from visionedge.engine.placement import measure_speed_check
from visionedge.model.compiler.build import load_or_compile
from visionedge.model.model import find_bundled_model, load_model
from visionedge.ops.doctor import probe_child
from visionedge.ops.doctor.host import ProbeResult, run_probe_child, this_host

NO_LIBRARY = "libvisionedge-is-not-here.so.7"


def test_a_probe_reports_step_by_step_and_its_steps_survive_a_timeout() -> None:
    """A name that resolves at once, and a server that never answers: one is known, the other late."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        question = {"resolve": ["localhost"], "reach": {}, "date": [f"127.0.0.1:{port}"]}
        answer = run_probe_child("network", question, 1.5)
    assert answer.ended == "late"
    assert answer.reason == "no answer within 1.5 s"
    assert "127.0.0.1" in answer.step("resolve:localhost")["addresses"]


def test_a_probe_that_dies_leaves_its_steps_and_its_exit_status() -> None:
    """An unknown question is an error of the child, in one line."""
    answer = run_probe_child("riddle", {}, 10)
    assert answer == ProbeResult({}, "died", "KeyError: 'riddle'")


def test_ports_and_names_are_checked_in_parallel() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        reach = {"dock": ["127.0.0.1", port], "yard": ["127.0.0.1", 1]}
        question = {"resolve": ["no-such-name.invalid"], "reach": reach, "date": []}
        answer = run_probe_child("network", question, 10)
    assert answer.ended == "fine"
    assert answer.step("reach:dock") == {"step": "reach:dock", "reached": True}
    assert answer.step("reach:yard")["error"] == "Connection refused"
    assert answer.step("resolve:no-such-name.invalid")["error"]


def test_libraries_are_loaded_and_a_missing_one_has_the_error_of_the_loader() -> None:
    answer = run_probe_child("libraries", {"folders": [], "names": ["libc.so.6", NO_LIBRARY]}, 10)
    assert Path(answer.step("libc.so.6")["path"]).name.startswith("libc")
    assert answer.step(NO_LIBRARY)["error"].startswith(f"{NO_LIBRARY}: cannot open shared object file")


def test_a_library_of_a_package_precedes_that_of_the_system(tmp_path: Path) -> None:
    """One that is damaged too, as onnxruntime would meet it."""
    (tmp_path / "libc.so.6").write_text("no library at all")
    answer = run_probe_child("libraries", {"folders": [str(tmp_path)], "names": ["libc.so.6"]}, 10)
    assert "file too short" in answer.step("libc.so.6")["error"]


def test_device_nodes_are_opened(tmp_path: Path) -> None:
    answer = run_probe_child("driver", {"nodes": ["/dev/null", str(tmp_path / "nvidia0")]}, 10)
    assert answer.step("open")["errors"] == {"/dev/null": None, str(tmp_path / "nvidia0"): "ENOENT"}


def test_the_kernel_reports_whether_its_clock_is_synchronised() -> None:
    assert isinstance(run_probe_child("clock", {}, 10).step("kernel")["synchronised"], bool)


def test_the_probe_answers_every_question_with_the_standard_library_alone() -> None:
    assert set(probe_child.PROBES) == {"driver", "libraries", "openvino", "network", "clock"}
    source = Path(probe_child.__file__).read_text()
    imports = [line.split()[1] for line in source.splitlines() if line.startswith(("import", "from"))]
    assert {name.partition(".")[0] for name in imports} <= sys.stdlib_module_names


def test_the_nodes_of_a_model_are_placed_in_a_child() -> None:
    answer = run_probe_child("placement", {"device": "cpu", "model": str(find_bundled_model())}, 60)
    placed = answer.step("placement")
    assert (placed["device"], placed["onCpu"]) == ("cpu", [])
    assert placed["model"] == find_bundled_model().stem
    assert placed["onDevice"] > 50


def test_a_session_is_timed_beside_one_on_the_cpu(tmp_path: Path) -> None:
    """Two on the CPU take about the same, which is no pace for a GPU."""
    model = load_model(TinyDetector().save(tmp_path / "tiny.onnx"))
    graph = load_or_compile(model, None)
    session = open_session(graph, "cpu", max_batch=1)
    pace = measure_speed_check(session, graph, model)
    session.close()
    assert min(pace.device_ms, pace.cpu_ms) > 0
    assert SpeedCheck(pace.cpu_ms, pace.cpu_ms).doubt("cuda") is not None


def test_a_model_that_cannot_be_placed_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model")
    answer = run_probe_child("placement", {"device": "cpu", "model": str(path)}, 60)
    assert "broken.onnx" in answer.step("placement")["error"]


def test_the_host_describes_this_machine() -> None:
    host = this_host({"A": "b"})
    assert host.packages["numpy"]
    assert host.exists("/proc/self")
    assert not host.exists("/no/such/thing")
    assert host.text("/no/such/thing") == ""
    assert host.names("/no/such/thing") == ()
    assert "self" in host.names("/proc")
    space = host.space(Path("/no/such/folder"))
    assert space is not None
    assert 0 < space.free_bytes <= space.total_bytes
    assert json.dumps(dict(host.environ)) == '{"A": "b"}'
