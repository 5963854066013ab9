"""Camera URIs and the masking of secrets."""

import base64
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import get_args
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionedge.app import load_meter
from visionedge.camera import camera as camera_status
from visionedge.config.addresses import parse_camera_uri
from visionedge.engine.device import devices
from visionedge.errors import ConfigError
from visionedge.iothub import client
from visionedge.outbound import spool
from visionedge.runtime.logs import RedactingFormatter
from visionedge.runtime.redaction import (
    MAX_TEXT_CHARACTERS,
    UNMASKED_WORDS,
    KnownSecrets,
    find_secrets,
    mask_address,
    redact,
    redact_document,
    register_secrets,
)
from visionedge.web.responses import RequestError, error_response


@pytest.fixture(autouse=True, scope="module")
def _forgotten() -> Iterator[None]:
    """What is kept here is masked in no other test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionedge.runtime.redaction._known", KnownSecrets())
        yield


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("rtsp://192.0.2.5/stream1", "rtsp"),
        ("RTSPS://camera.local:322/x", "rtsp"),
        ("https://camera.local/video.mjpg", "http"),
        ("v4l2:///dev/video0", "v4l2"),
        ("demo:", "demo"),
        ("clip.mp4", "file"),
        ("C:\\clips\\clip.mp4", "file"),
    ],
)
def test_each_kind_of_uri_is_recognised(uri: str, kind: str) -> None:
    """Every form the contract names is understood."""
    assert parse_camera_uri(uri).kind == kind


def test_a_folder_is_distinguished_from_a_file(tmp_path: Path) -> None:
    """A path that is a folder is a folder of pictures."""
    assert parse_camera_uri(str(tmp_path)).kind == "folder"
    assert parse_camera_uri(f"file://{tmp_path}").kind == "folder"


@pytest.mark.parametrize(
    "uri", ["foo://x", "rtsp:///nohost", "rtsp://h:notaport/", "", "v4l2:video0", "http://"]
)
def test_a_wrong_uri_gives_a_one_line_error(uri: str) -> None:
    """A wrong URI is refused with one line that never holds its secrets."""
    with pytest.raises(ConfigError) as caught:
        parse_camera_uri(uri)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "rtsp://admin:hunter2@192.0.2.5/s",
        "rtsp://admin:hunter2@cam@192.0.2.5/s",
        "rtsp://admin:a/hunter2#x@192.0.2.5/s",
        "rtsp://192.0.2.5/s?user=admin&password=hunter2&channel=1",
        "rtsp://192.0.2.5/user=admin_password=hunter2_channel=1",
        "http://h/x?access_token=hunter2&a=1",
        "Authorization: Bearer hunter2",
        "SharedAccessSignature sr=hub&sig=hunter2&se=1",
        "HostName=h;SharedAccessKey=hunter2==;DeviceId=d",
    ],
)
def test_secrets_are_masked_in_any_text(text: str) -> None:
    """Users, passwords, tokens and keys never survive."""
    shown = redact(f"cannot open '{text}': refused")
    assert "hunter2" not in shown
    assert "***" in shown
    assert shown.endswith("refused")
    assert redact(f"{redact(text)}: refused").endswith(": refused")


@given(
    st.text(
        st.characters(codec="ascii", exclude_characters=" \"'<>", categories=["L", "N", "P", "S"]), min_size=6
    )
)
def test_no_password_survives_for_any_characters(password: str) -> None:
    """Unescaped separators in a password do not carry it past the mask."""
    assert f":{password}@" not in redact(f"open rtsp://me:{password}@host/x failed")


@pytest.mark.parametrize("text", ["http://host:8080/a/b.jpg", "12 frames/s at 10:30", "a@b.example"])
def test_harmless_text_is_unchanged(text: str) -> None:
    """Hosts, paths and plain words stay readable."""
    assert redact(text) == text


def test_a_name_too_long_for_a_disk_is_still_a_file() -> None:
    """Impossible names are reported when they are opened, without a traceback."""
    assert parse_camera_uri("x" * 5000).kind == "file"


MALICIOUS = {
    "schemes": "a://",
    "users": "a://:",
    "queries": "a://h?x=1&",
    "dots": "a.",
    "dashes": "a-",
    "names": "key-",
    "pairs": "x=y=",
    "keys": "key=",
    "quoted keys": 'key="',
    "headers": "Bearer ",
    "tokens": "token",
    "blanks": " ",
    "escapes": "%41",
    "at": "a@",
    "known": "known-secret-0007-",
}


def formatted(text: str) -> str:
    """The text as a line of the log."""
    record = logging.LogRecord("x", logging.ERROR, "x", 1, "%s", (text,), None)
    return RedactingFormatter("%(message)s").format(record)


def answered(text: str) -> str:
    """The text as an answer of HTTP."""
    return bytes(error_response("/v2/x", RequestError(400, text)).body).decode()  # type: ignore[arg-type]


@pytest.mark.parametrize("edge", [redact, formatted, answered])
@pytest.mark.parametrize("filler", MALICIOUS.values(), ids=MALICIOUS)
def test_redaction_time_grows_linearly_with_the_text(edge: Callable[[str], str], filler: str) -> None:
    """No text makes masking slow: not by its length, and not by what it repeats."""
    register_secrets(f"known-secret-{number:04}" for number in range(1_000))

    def cost_s(characters: int) -> float:
        text = (filler * (characters // len(filler) + 1))[:characters]
        started = time.thread_time()
        edge(text)
        return time.thread_time() - started

    for least, most in ((2_000, 4_000), (500_000, 1_000_000)):
        costs = [(cost_s(least), cost_s(most)) for _ in range(9)]
        ratio = median(cost for _, cost in costs) / median(cost for cost, _ in costs)
        assert ratio < 3.5, f"{most} characters cost {ratio:.1f} times what {least} cost"


@pytest.mark.parametrize("filler", MALICIOUS.values(), ids=MALICIOUS)
def test_a_long_text_is_truncated_with_a_note(filler: str) -> None:
    """A megabyte from a client fills neither the log nor an answer, and a secret at the cut stays hidden."""
    register_secrets(f"known-secret-{number:04}" for number in range(1_000))
    shown = redact(filler * (1_000_000 // len(filler)))
    assert len(shown) < MAX_TEXT_CHARACTERS
    assert "(cut, " in shown
    assert "known-secret" not in shown


@pytest.mark.parametrize("before", range(4_000, 4_100, 3))
def test_no_secret_is_cut_in_half(before: int) -> None:
    """Where a text ends because it is cut, no beginning of a secret is left."""
    register_secrets(["half-of-it-is-shown"])
    for secret in ("half-of-it-is-shown", "rtsp://me:half-of-another@h/x", "token=half-of-a-token"):
        shown = redact("x" * before + f" {secret} " + "y" * 10_000)
        assert "half" not in shown


def test_redaction_time_hardly_depends_on_the_number_of_secrets() -> None:
    """A fleet's four hundred passwords do not make each line of the log slow."""
    few, many = KnownSecrets(), KnownSecrets()
    few.add(f"Few-{number:05}-pw" for number in range(2))
    many.add(f"Many{number:05}-pw" for number in range(1_000))
    text = "camera dock is live: 25 frames/s from rtsp://192.0.2.5/stream1 " * 20

    def cost_s(known: KnownSecrets) -> float:
        started = time.thread_time()
        for _ in range(20):
            known.mask(text)
        return time.thread_time() - started

    costs = [(cost_s(few), cost_s(many)) for _ in range(7)]
    assert median(cost for _, cost in costs) < 3.5 * median(cost for cost, _ in costs)


PIECES = [
    *(
        "rtsp://",
        "://",
        "http://h",
        "@",
        ":",
        "/",
        "?",
        "&",
        "=",
        "#",
        "***",
        "%3D",
        "%40",
        " ",
        "\t",
        '"',
        "'",
    ),
    *("<", ">", ";", ",", ".", "[", "]", "token", "key", "password=", "Bearer ", "Basic ", "Digest"),
    *(
        "admin",
        "camera",
        "live",
        "known-one",
        "cat",
        "a b",
        "x",
        "1",
        "…",
        "USER:PASSWORD",
        "HOST:PORT",
        "==",
    ),
]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=24).map("".join))
def test_redaction_is_idempotent(text: str) -> None:
    """What was masked once is safe, however many edges it passes."""
    register_secrets(["known-one", "cat", "a b:c", "two words"])
    once = redact(text)
    assert redact(once) == once


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join), st.integers(8_000, 9_000))
def test_redaction_of_long_texts_is_idempotent(text: str, characters: int) -> None:
    """Nor where masks make a text longer than it may be."""
    once = redact((text * (characters // len(text) + 1))[:characters])
    assert redact(once) == once
    assert len(once) <= MAX_TEXT_CHARACTERS


def test_a_hint_is_not_masked() -> None:
    """The remedy with the form of an address or a header must be readable."""
    for hint in (
        "write rtsp://USER:PASSWORD@192.0.2.5/…",
        "this needs the header 'Authorization: Bearer TOKEN'",
        "this needs the header 'Authorization: Bearer …'",
        "the server sent no Basic challenge",
        "write http://HOST:PORT",
    ):
        assert redact(hint) == hint


# --- addresses ----------------------------------------------------------------------------------------------

BAIT = "hunter2x"
ADDRESSES = [
    "rtsp://admin:hunter2x@127.0.0.1:9/cam",
    "rtsp://admin:hunter 2x@127.0.0.1:9/cam",
    "rtsp://admin:hunter\t2x@127.0.0.1:9/cam",
    "rtsp://admin:hunter'2x@127.0.0.1:9/cam",
    'rtsp://admin:hunter"2x@127.0.0.1:9/cam',
    "rtsp://admin:hunter<2x@127.0.0.1:9/cam",
    "rtsp://admin:hunter>2x@127.0.0.1:9/cam",
    "rtsp://hunter 2x:pw@127.0.0.1:9/cam",
    "rtsp://hunter2x@127.0.0.1:9/cam",
    "rtsp://admin:hunter%202x@127.0.0.1:9/cam",
    "rtsp://admin:hunter%402x@127.0.0.1:9/cam",
    "rtsp://admin:hunter%232x@127.0.0.1:9/cam",
    "rtsp://admin:hunter@2x@127.0.0.1:9/cam",
    "http://admin:hunter 2x@127.0.0.1:9/x.mjpg",
    *(
        f"http://127.0.0.1:9/cgi?channel=1&{name}=hunter2x"
        for name in (
            *("loginuse", "loginpas", "psw", "p", "u", "pin", "sid", "session", "jwt", "hash", "code"),
            *("passphrase", "pwd", "password", "sig", "key[]"),
        )
    ),
    "http://127.0.0.1:9/cgi?password=a;hunter2x",
    "http://127.0.0.1:9/cgi?password=a,hunter2x",
    "http://127.0.0.1:9/cgi?password=a&hunter2x",
    "http://127.0.0.1:9/cgi?token%3Dhunter2x",
    "http://127.0.0.1:9/cgi?hunter2x",
    "http://127.0.0.1:9/cgi#token=hunter2x",
    "rtsp://127.0.0.1:9/user=admin_password=hunter2x_channel=1_stream=0.sdp",
    "rtsp://[fe80::1%25eth0]:9/cgi?p=hunter2x",
]
RAW = [
    f"rtsp://admin:hunter{character}2x@{host}/cam"
    for character in "#/?[]"
    for host in ("127.0.0.1:9", "camera.local", "cam")
] + ["rtsp://admin:1/hunter2x@cam/x", "rtsp://hunter/2x@127.0.0.1/x", "rtsp://admin:hunter2x"]


def holds_bait(text: str) -> bool:
    """Whether a text shows the bait, a part of it or another spelling."""
    return any(part in text.lower() for part in ("hunter", "2x"))


@pytest.mark.parametrize("uri", [*ADDRESSES, *RAW])
def test_an_address_is_shown_without_secrets(uri: str) -> None:
    """User names, passwords, every query value and every value of a path after '='."""
    assert not holds_bait(mask_address(uri))
    assert mask_address(uri).startswith(uri.partition("://")[0])


@pytest.mark.parametrize("uri", ADDRESSES)
def test_the_secrets_of_an_address_are_masked_in_any_sentence(uri: str) -> None:
    """In the address as it is, and where a library quotes only its password."""
    register_secrets(find_secrets({"cameras": {"dock": {"uri": uri}}}))
    for sentence in (
        f"cannot open {uri}: refused",
        f"'{uri}'",
        f'{{"uri": "{uri}"}}',
        f"open={uri!r} failed",
    ):
        assert not holds_bait(redact(sentence)), redact(sentence)
    assert redact("cannot open: refused") == "cannot open: refused"


@pytest.mark.parametrize("uri", ADDRESSES)
def test_a_camera_with_such_an_address_is_accepted(uri: str) -> None:
    """A password may hold anything but the separators of an address."""
    parsed = parse_camera_uri(uri)
    assert "hunter" in parsed.target
    assert not holds_bait(f"{parsed} {parsed!r}")


@pytest.mark.parametrize("uri", RAW)
def test_a_raw_separator_in_a_password_is_refused_without_showing_it(uri: str) -> None:
    """And the message shows how such a character is written."""
    with pytest.raises(ConfigError) as caught:
        parse_camera_uri(uri)
    shown = f"{caught.value} {caught.value!r}"
    assert not holds_bait(shown)
    assert "%23" in shown or "HOST:PORT" in shown


@pytest.mark.parametrize(
    ("uri", "target"),
    [
        ("RTSP://192.0.2.5/Stream1", "rtsp://192.0.2.5/Stream1"),
        ("  rtsp://192.0.2.5/s\n", "rtsp://192.0.2.5/s"),
        ("rtsp://admin@192.0.2.5/s", "rtsp://admin:@192.0.2.5/s"),
        ("rtsp://admin:@192.0.2.5/s", "rtsp://admin:@192.0.2.5/s"),
        ("rtsp://[fe80::1%eth0]/s", "rtsp://[fe80::1%eth0]/s"),
        ("rtsp://[fe80::1%25eth0]:8554/s", "rtsp://[fe80::1%eth0]:8554/s"),
        ("rtsp://u:p@[2001:db8::1]:8554/s", "rtsp://u:p@[2001:db8::1]:8554/s"),
        ("http://192.0.2.5:8080/x?mail=a@b.example", "http://192.0.2.5:8080/x?mail=a@b.example"),
        ("http://camera.local/mail@x", "http://camera.local/mail@x"),
        ("file:///a%20b.mp4", "/a b.mp4"),
        ("file://localhost/a%20b.mp4", "/a b.mp4"),
        ("file:a%20b.mp4", "a%20b.mp4"),
        (" clip.mp4 ", "clip.mp4"),
        ("Demo:", "demo:"),
    ],
)
def test_an_address_is_passed_to_the_decoder_in_its_own_encoding(uri: str, target: str) -> None:
    """Capitals, blanks around, a user without a password, a zone, and escapes in the path of a file."""
    assert parse_camera_uri(uri).target == target


@pytest.mark.parametrize(
    "uri", ["rtsp://h:70000/", "rtsp://[192.0.2.5]/", "rtsp://[::1/", "rtsp://h/a\nb", "http://:80/"]
)
def test_an_invalid_address_is_refused_in_one_line(uri: str) -> None:
    """With our words, not those of a parser."""
    with pytest.raises(ConfigError) as caught:
        parse_camera_uri(uri)
    assert len(str(caught.value).splitlines()) == 1


# --- words of our own ---------------------------------------------------------------------------------------

WORDS = ["camera", "live", "admin", "user", "root", "demo", "cpu", "failed"]


@pytest.mark.parametrize("user", WORDS)
@pytest.mark.parametrize("password", WORDS)
def test_a_password_that_is_a_word_of_the_module_is_not_masked_in_sentences(user: str, password: str) -> None:
    """It is masked in its address and nowhere else: a masked word in a sentence would show which it is."""
    uri = f"rtsp://{user}:{password}@192.0.2.5/s?u={password}"
    register_secrets(find_secrets({"cameras": {"dock": {"uri": uri}}}))
    sentence = "camera dock is live, the demo failed on the cpu: user root, admin"
    assert redact(sentence) == sentence
    for text in (uri, f"cannot open {uri}: refused", f"'{uri}'", f"psw?{user}:{password}@"):
        assert f"{user}:{password}" not in redact(text)
    assert mask_address(uri) == "rtsp://***@192.0.2.5/s?u=***"
    document = {"state": "live", "device": "cpu", "name": "camera", "reason": f"{uri} failed"}
    assert redact_document(document) == {**document, "reason": "rtsp://***@192.0.2.5/s?u=*** failed"}


def test_every_state_and_code_consists_of_words_of_the_module() -> None:
    """A state, a device or a reason is never masked, even if a password is the same word."""
    kinds = (
        camera_status.CameraState,
        devices.RequestedDevice,
        load_meter.Bottleneck,
        client.HubState,
        client.HubFault,
        spool.SpoolEventCode,
    )
    codes = {str(code) for kind in kinds for code in get_args(kind)} | set(devices.ReasonCode)
    words = {word for code in codes for word in code.split("-") if word.isalpha() and len(word) > 2}
    assert words - UNMASKED_WORDS == set(), "add them to UNMASKED_WORDS in visionedge/runtime/redaction.py"


def test_a_camera_may_have_the_name_of_a_password() -> None:
    """The name of a camera stays readable, on the command line too."""
    register_secrets(find_secrets(["--camera", "harbour-7=rtsp://me:harbour-7@192.0.2.5/s"]))
    assert redact("camera harbour-7 is live") == "camera harbour-7 is live"


def test_any_other_password_is_masked_in_sentences() -> None:
    """Also one of letters only."""
    register_secrets(find_secrets({"cameras": {"dock": {"uri": "rtsp://camera:dragonfly@192.0.2.5/s"}}}))
    assert redact("login of camera with dragonfly failed") == "login of camera with *** failed"
    assert "dragonfly" not in UNMASKED_WORDS


def test_query_values_are_masked_only_in_the_address() -> None:
    """`channel=main` is no secret of which a sentence would have to be cleaned."""
    uri = "http://192.0.2.5/x?channel=substreamer&resolution=1920x1080&token=Zebra-77"
    register_secrets(find_secrets([uri]))
    assert mask_address(uri) == "http://192.0.2.5/x?channel=***&resolution=***&token=***"
    assert redact("substreamer is 1920x1080 with Zebra-77") == "substreamer is 1920x1080 with ***"


@pytest.mark.parametrize("password", ["p%C3%A4ss wort", "Größe&Maß=7", "a:b:c-d"])
def test_a_login_is_masked_as_http_sends_it(password: str) -> None:
    """Percent-encoded, decoded, and in base64."""
    register_secrets(find_secrets([f"rtsp://somebody:{quote(password, safe='')}@h/x"]))
    login = base64.b64encode(f"somebody:{password}".encode()).decode()
    assert login not in redact(f"sent {login} to the server")


def test_an_invalid_character_in_a_secret_is_no_error() -> None:
    """JSON may hold it, so a twin may."""
    register_secrets(["\ud800hunter2"])
    assert redact("with \ud800hunter2 in it") == "with *** in it"


@given(st.text(st.characters(exclude_characters="@*", exclude_categories=["Cs"]), min_size=4, max_size=12))
def test_no_password_is_shown_with_any_characters(password: str) -> None:
    """Neither in the address nor in the reason why it is refused; to mask again changes nothing."""
    uri = f"rtsp://me:{password}@192.0.2.5/s"
    shown = mask_address(uri)
    assert shown in ("rtsp://***@192.0.2.5/s", "rtsp://***/s")
    assert mask_address(shown) == shown
    assert redact(f"{shown}: refused") == f"{shown}: refused"
    message = ""
    try:
        assert password in parse_camera_uri(uri).target
    except ConfigError as error:
        message = str(error)
    assert f"me:{password}" not in message
    assert f"{password}@" not in message
