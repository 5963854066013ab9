"""docs/monitoring.md, followed with a stand-in for Azure Monitor's collector beside the module."""

import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge_runtime.runtime import EdgeRuntime, PortTakenError
from metrics_collector import scrape
from module_process import ModuleProcess
from tiny_models import TinyDetector

pytestmark = pytest.mark.system

CONFIGURATION = """
model: {{path: {folder}/tiny.onnx}}
inference: {{device: cpu, confidence: 0.01}}
cameras: {{dock: {{uri: 'demo:', fps: 5}}}}
http: {{token: secret-token, metricsToken: none}}
"""


def test_every_metric_arrives_while_all_else_needs_the_token(tmp_path: Path) -> None:
    """With the module's id as host name, as in `MetricsEndpointsCSV`; each sample says whose it is."""
    TinyDetector().save(tmp_path / "tiny.onnx")
    path = tmp_path / "vision.yaml"
    path.write_text(CONFIGURATION.format(folder=tmp_path))
    runtime = EdgeRuntime()
    try:
        runtime.start()
    except PortTakenError as error:
        pytest.skip(str(error))
    try:
        with ModuleProcess(tmp_path / "data", "--config", str(path), environ=runtime.environ) as module:
            url = module.ready()
            runtime.wait_for(lambda messages: any(m.output == "detections" for m in messages), timeout_s=60)
            arrived = scrape("http://vision:8080/metrics", urlsplit(url).netloc)
            families = text_string_to_metric_families(module.raw("/metrics").decode())
            exposed = {sample.name for family in families for sample in family.samples}
            assert {name for name, _, _ in arrived} == exposed
            assert len(exposed) > 50
            for _, labels, _ in arrived:
                assert labels["module_name"] == "vision"
                assert {"iothub", "edge_device", "instance_number"} <= labels.keys()
            for other in (
                "api/v1/status",
                "api/v1/cameras/dock/snapshot.jpg",
                "openapi.json",
                "v2/models/tiny",
            ):
                with pytest.raises(urllib.error.HTTPError, match="401"):
                    urllib.request.urlopen(url + other, timeout=15)  # noqa: S310 - http, by ready()
            assert module.stop(10) == 0
    finally:
        runtime.stop()
