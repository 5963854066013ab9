"""Models by address, over real https: what arrives, what is refused, what is tried again."""

import hashlib
import logging
import os
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tenacity

from model_server import (
    Answer,
    ModelServer,
    ConnectProxy,
    content,
    cut,
    endless,
    hanging,
    in_turn,
    redirect,
    stalled,
    status,
)
from visionedge.errors import FetchError
from visionedge.model.download import (
    MODELS_FOLDER,
    DownloadProgress,
    DownloadRequest,
    DownloadRetryPolicy,
    DownloadTimeouts,
    ModelDownload,
    ModelStore,
)

DATA = b"\x08\x08" + os.urandom(300_000)
SUM = hashlib.sha256(DATA).hexdigest()
AT_ONCE = DownloadRetryPolicy(DownloadTimeouts(read_s=20), 0.0, 0.0, 0.0, 0.0)
IMPATIENT = DownloadRetryPolicy(DownloadTimeouts(connect_s=0.3, read_s=0.3, total_s=20), 0.0, 0.0, 0.0, 0.0)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    """An https server that this process trusts."""
    with ModelServer(tmp_path) as running:
        for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("SSL_CERT_FILE", str(running.authority))
        running.answers["/m.onnx"] = content(DATA)
        yield running


def fetch(
    tmp_path: Path,
    url: str,
    *,
    sha256: str = SUM,
    tries: int | None = 1,
    retry_policy: DownloadRetryPolicy = AT_ONCE,
    max_bytes: int = 1_000_000,
) -> Path | None:
    """Fetch a model into the data folder of a test."""
    return ModelDownload(
        DownloadRequest(url, sha256, max_bytes),
        ModelStore(tmp_path / "data"),
        tries=tries,
        retry_policy=retry_policy,
    ).run()


def whole(tmp_path: Path) -> list[str]:
    """The models that are kept."""
    return sorted(path.name for path in (tmp_path / "data" / MODELS_FOLDER).glob("*.onnx"))


# --- what arrives -----------------------------------------------------------------------------------------


def test_a_model_is_stored_under_its_checksum_and_readable_only_by_its_owner(tmp_path: Path, server: ModelServer) -> None:
    """Whole, mode 0600, and nothing beside it."""
    path = fetch(tmp_path, server.url("/m.onnx"))
    assert path == tmp_path / "data" / MODELS_FOLDER / f"{SUM}.onnx"
    assert path.read_bytes() == DATA
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_second_start_needs_no_network(tmp_path: Path, server: ModelServer) -> None:
    """What is kept is taken; only when it is damaged is it fetched again."""
    path = fetch(tmp_path, server.url("/m.onnx"))
    assert path is not None
    assert fetch(tmp_path, "https://127.0.0.1:9/m.onnx", sha256=SUM.upper()) == path
    assert len(server.seen) == 1
    path.write_bytes(DATA[:-1])
    assert fetch(tmp_path, server.url("/m.onnx")) == path
    assert path.read_bytes() == DATA


def test_the_signature_in_an_address_is_sent_unchanged(tmp_path: Path, server: ModelServer) -> None:
    """Escapes of a signed address are part of what was signed."""
    query = "?sv=2024&sig=a%2Fb%2Bc%3D&path=%2Fx"
    fetch(tmp_path, server.url("/m.onnx") + query)
    path, headers = server.seen[0]
    assert path == "/m.onnx" + query
    assert headers["Accept-Encoding"] == "identity"
    assert re.match(r"visionedge/\d", headers["User-Agent"])


def test_a_redirect_is_followed_without_the_password(tmp_path: Path, server: ModelServer) -> None:
    """User and password go to the host that they were written for."""
    server.answers["/old"] = redirect(server.url("/m.onnx").replace("https://", "https://other:pw@"))
    assert fetch(tmp_path, server.url("/old").replace("https://", "https://me:hunter2@")) is not None
    (_, first), (_, second) = server.seen
    assert first["Authorization"].startswith("Basic ")
    assert "Authorization" not in second
    assert "Cookie" not in second


def test_a_proxy_of_the_environment_is_used(
    tmp_path: Path, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTPS_PROXY and NO_PROXY, as other modules of a device have them."""
    with ConnectProxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        assert fetch(tmp_path, server.url("/m.onnx")) is not None
        assert proxy.asked == [f"127.0.0.1:{server.port}"]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert fetch(tmp_path / "again", server.url("/m.onnx")) is not None
        assert len(proxy.asked) == 1


def test_a_file_address_may_be_the_source(tmp_path: Path) -> None:
    """Copied, checked and kept like any other."""
    source = tmp_path / "my model.onnx"
    source.write_bytes(DATA)
    path = fetch(tmp_path, f"file://{tmp_path}/my%20model.onnx")
    assert path is not None
    source.unlink()
    assert path.read_bytes() == DATA


# --- what is refused --------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Answer, str]] = {
    "404": (status(404), "the server answers 404 Not Found"),
    "403": (status(403), "the server answers 403 Forbidden"),
    "418": (status(499), "the server answers 499"),
    "304": (status(304), "the server answers 304 Not Modified"),
    "another file": (
        content(DATA + b"x"),
        f"has the sha256 {hashlib.sha256(DATA + b'x').hexdigest()[:12]}…, not {SUM[:12]}…",
    ),
    "an empty file": (content(b""), "has the sha256 e3b0c44298fc…"),
    "a zip": (content(b"PK\x03\x04" + DATA), "is a ZIP archive; give the address of the .onnx file itself"),
    "gzip": (content(b"\x1f\x8b" + DATA), "is compressed (gzip)"),
    "a page": (
        content(b"<!DOCTYPE html><html>Sign in</html>"),
        "is a web page; give the address that downloads the file",
    ),
    "a pointer": (content(b"version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS"),
    "too large, as it says": (content(b"x" * 1_000_001), "has 1.0 MB, but model.maxMegabytes is 1"),
    "too large, without end": (endless, "has more, but model.maxMegabytes is 1"),
    "to http": (redirect("http://127.0.0.1/m.onnx"), "is redirected to http:, but only https: is followed"),
    "to a file": (redirect("file:///etc/passwd"), "is redirected to file:, but only https: is followed"),
    "in a circle": (redirect("/m.onnx?again=1"), "is redirected more than 5 times"),
    "to no address": (redirect("https://[::1/m.onnx"), "is redirected to an invalid address"),
    "compressed": (status(200, **{"Content-Encoding": "gzip"}), "comes compressed"),
}


@pytest.mark.parametrize(("answer", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_permanent_errors_are_refused_at_once(
    tmp_path: Path, server: ModelServer, answer: Answer, message: str
) -> None:
    """In one line that names the address without its secret; nothing is kept, and nobody asks again."""
    server.answers["/bad.onnx"] = server.answers["/m.onnx"] = answer
    with pytest.raises(FetchError) as caught:
        fetch(tmp_path, server.url("/bad.onnx?sig=s3cret-s3cret"), tries=5)
    shown = str(caught.value)
    assert shown.startswith(f"{server.url('/bad.onnx')}?…: ")
    assert message in shown
    assert "\n" not in shown
    assert whole(tmp_path) == []
    assert sum(path.startswith("/bad") for path, _ in server.seen) == 1
    assert all(path.stat().st_size == 0 for path in (tmp_path / "data" / MODELS_FOLDER).iterdir())


PASSING: dict[str, tuple[Answer, str]] = {
    "503": (status(503), "the server answers 503 Service Unavailable"),
    "429": (status(429), "the server answers 429 Too Many Requests"),
    "hangs": (hanging, "no data for 0.3 s"),
    "stalls": (stalled(DATA[:5000]), "no data for 0.3 s"),
    "breaks": (cut(DATA, 5000), "the connection broke before the file was complete"),
    "closes": (lambda _: None, "the connection broke before the file was complete"),
    "garbage": (lambda request: (request.wfile.write(b"hello\r\n\r\n"), None)[1], "cannot be read"),
    "no range": (status(206), "cannot resume the interrupted download"),
}


@pytest.mark.parametrize(("answer", "message"), PASSING.values(), ids=PASSING.keys())
def test_temporary_errors_are_retried(
    tmp_path: Path, server: ModelServer, answer: Answer, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Told once, however often it happens, and forgotten when the model is there."""
    server.answers["/m.onnx"] = in_turn(answer, answer, content(DATA))
    assert fetch(tmp_path, server.url("/m.onnx"), tries=3, retry_policy=IMPATIENT) is not None
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert message in warnings[0]
    assert len(server.seen) == 3


def test_the_number_of_attempts_is_limited(tmp_path: Path, server: ModelServer) -> None:
    """A change of the model cannot wait for ever."""
    server.answers["/m.onnx"] = status(503)
    with pytest.raises(FetchError, match="503"):
        fetch(tmp_path, server.url("/m.onnx"), tries=3)
    assert len(server.seen) == 3


def test_the_first_download_never_gives_up(tmp_path: Path, server: ModelServer) -> None:
    """Files are put where they were missing, and certificates where they were wrong."""
    server.answers["/m.onnx"] = in_turn(status(404), content(b"PK\x03\x04"), status(500), content(DATA))
    assert fetch(tmp_path, server.url("/m.onnx"), tries=None) is not None


def wait_s(retry_policy: DownloadRetryPolicy, attempt: int, *, permanent: bool) -> float:
    """The wait after an attempt, without jitter."""
    state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
    state.attempt_number = attempt
    return retry_policy.wait(permanent=permanent)(state)


def test_the_pauses_grow_up_to_a_limit() -> None:
    """Short ones for what may pass, long ones for what a person has to mend."""
    retry_policy = DownloadRetryPolicy()
    assert [wait_s(retry_policy, n, permanent=False) for n in (1, 2, 3, 7, 5000)] == [1, 2, 4, 60, 60]
    assert [wait_s(retry_policy, n, permanent=True) for n in (1, 2, 7, 5000)] == [60, 120, 3600, 3600]


def test_an_untrusted_certificate_is_refused(
    tmp_path: Path, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the remedy for an authority of one's own is in the line."""
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(FetchError, match=r"its certificate is not trusted \(.+\); .*SSL_CERT_FILE"):
        fetch(tmp_path, server.url("/m.onnx"))
    assert server.seen == []


def test_a_certificate_of_another_host_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trusted, but not for this name."""
    with ModelServer(tmp_path, host="models.example") as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(server.authority))
        with pytest.raises(FetchError, match=r"not trusted \(.*127\.0\.0\.1"):
            fetch(tmp_path, server.url("/m.onnx"))


def test_a_server_without_tls_is_refused(tmp_path: Path) -> None:
    """Told as what it is, not as a riddle of a library."""
    with (
        ModelServer(tmp_path, tls=False) as server,
        pytest.raises(FetchError, match="no TLS with the server"),
    ):
        fetch(tmp_path, server.url("/m.onnx").replace("http:", "https:"))


@pytest.mark.parametrize(
    ("host", "message"),
    [("127.0.0.1:9", "cannot be reached: .*refused"), ("no-such-host.invalid", "cannot be found")],
)
def test_an_unreachable_server_is_reported(tmp_path: Path, host: str, message: str) -> None:
    """The system's own word for it."""
    with pytest.raises(FetchError, match=message):
        fetch(tmp_path, f"https://{host}/m.onnx")


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_a_file_address_that_is_not_a_file_is_refused(tmp_path: Path, kind: str) -> None:
    """Also a pipe, which would never end."""
    if kind == "folder":
        (tmp_path / kind).mkdir()
    if kind == "pipe":
        os.mkfifo(tmp_path / kind)
    with pytest.raises(FetchError, match=r"cannot be read: No such file|is no regular file|Is a directory"):
        fetch(tmp_path, f"file://{tmp_path}/{kind}")


# --- interruptions ----------------------------------------------------------------------------------------


def test_an_interrupted_download_is_resumed(tmp_path: Path, server: ModelServer) -> None:
    """Also after the module was started again: slow links get there in the end."""
    server.answers["/m.onnx"] = in_turn(cut(DATA, 100_000), content(DATA))
    with pytest.raises(FetchError):
        fetch(tmp_path, server.url("/m.onnx"))
    assert fetch(tmp_path, server.url("/m.onnx")) is not None
    first = int(server.seen[1][1]["Range"].removeprefix("bytes=").removesuffix("-"))
    assert 0 < first <= 100_000


def test_a_server_without_ranges_sends_the_whole_file_again(tmp_path: Path, server: ModelServer) -> None:
    """Nothing of the first try is left in it."""
    server.answers["/m.onnx"] = in_turn(cut(DATA, 100_000), content(DATA, ranges=False))
    assert fetch(tmp_path, server.url("/m.onnx"), tries=2) is not None


def test_a_file_that_changed_meanwhile_is_downloaded_again(tmp_path: Path, server: ModelServer) -> None:
    """Two halves of two files have a wrong sum, which another try mends."""
    older = b"\x08\x07" + os.urandom(300_000)
    server.answers["/m.onnx"] = in_turn(cut(older, 100_000), content(DATA))
    assert fetch(tmp_path, server.url("/m.onnx"), tries=3) is not None


def test_a_complete_file_is_not_requested_again(tmp_path: Path) -> None:
    """The module ended between the last byte and the new name."""
    with ModelStore(tmp_path / "data").open_partial(SUM) as part:
        part.write(DATA)
    assert fetch(tmp_path, "https://127.0.0.1:9/m.onnx") is not None


def test_a_partial_file_that_is_too_long_is_downloaded_again(tmp_path: Path, server: ModelServer) -> None:
    """A part that is longer than the file is of another one."""
    with ModelStore(tmp_path / "data").open_partial(SUM) as part:
        part.write(DATA + b"more")
    assert fetch(tmp_path, server.url("/m.onnx"), tries=2) is not None


class LogWaiter(logging.Handler):
    """Waits for a line of the log."""

    def __init__(self, wanted: str) -> None:
        super().__init__()
        self._wanted = wanted
        self.said = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self._wanted in record.getMessage():
            self.said.set()


@pytest.mark.parametrize(
    ("answer", "said"),
    [(stalled(DATA), "downloading the model: 99 %"), (status(404), "retrying in")],
    ids=["in the middle", "in a pause"],
)
def test_a_download_can_be_stopped_at_any_moment(
    tmp_path: Path, server: ModelServer, answer: Answer, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of a file and in the middle of a pause; meanwhile it says how far it is, or why not."""
    caplog.set_level(logging.INFO)
    server.answers["/m.onnx"] = answer
    download = ModelDownload(
        DownloadRequest(server.url("/m.onnx"), SUM),
        ModelStore(tmp_path / "data"),
        retry_policy=DownloadRetryPolicy(progress_interval_s=0.02),
    )
    listener, results = LogWaiter(said), list[Path | None]()
    logging.getLogger("visionedge").addHandler(listener)
    thread = threading.Thread(target=lambda: results.append(download.run()))
    thread.start()
    try:
        assert listener.said.wait(20)
        assert download.message.startswith(
            "downloading the model: 99 %" if "99" in said else "cannot download the model, retrying: "
        )
    finally:
        logging.getLogger("visionedge").removeHandler(listener)
        download.stop()
        thread.join()
    assert results == [None]


def test_a_download_stopped_before_its_start_does_nothing(tmp_path: Path, server: ModelServer) -> None:
    """And stopped after its end, nothing happens either."""
    early = ModelDownload(DownloadRequest(server.url("/m.onnx"), SUM), ModelStore(tmp_path / "data"))
    early.stop()
    assert early.run() is None
    assert server.seen == []
    late = ModelDownload(DownloadRequest(server.url("/m.onnx"), SUM), ModelStore(tmp_path / "data"))
    assert late.run() is not None
    late.stop()


def test_progress_is_a_percentage_if_the_size_is_known() -> None:
    """Else the megabytes that are there."""
    assert DownloadProgress(999, 1000).message == "99 %"
    assert DownloadProgress(2_500_000, None).message == "2.5 MB"
