"""Masks secrets before they are shown: in texts (`redact`), addresses (`mask_address`) and documents.

Secrets are found by their place (user names, passwords and query values of addresses, tokens in headers,
pairs such as ``password=…``) and by their value, once `register_secrets` was called with them.
"""

import base64
import ipaddress
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote, quote_plus, unquote

# Words of our own messages, states and codes, and default user names of cameras.
#
# A password may be such a word. Masking it by its value would make every sentence with the word unreadable,
# and would reveal the password. So these words are masked only by their place: in addresses, headers and
# pairs.
UNMASKED_WORDS = frozenset(
    """
abandoned about above absent accept accepted access accuracy acknowledged across action active add added
address addresses adds adj admin administrator after afterwards again against age agent ages agree aiohttp
algo alias alike alive all alloc allocate allow allowed allows allowzero almost alone already also although
always amd among amx analyse analysed analyzeduration ancestors anchor anchors and anew annotate annotations
anonymous another answer answered answering answers any anything anywhere apart api append application applied
applying archive are area arena args arguments aria around array arrive arrived ascii asctime aside asimd
asimddp ask asked asking asks assign assignment assumed asyncio attempts attends attributes audio auth
authenticate authentication author authority authorization auto automatically available average avi avx away
axes axis azl azure azureiotedge back background bad bare base baseline basic batch batches bbox bear bearer
became because become becomes before began begin begins begun behind being belong belongs below bench beside
best better between beyond bfloat bgr bgtx bias bilinear bill binary bind binds bins bintel bits black blame
blank blanks blas block blocks blue bmp body book bool boolean born both bottleneck bottom bound boundary box
boxes bquadro braced bracket brackets branches break brings broke broken buckets budget buffers build builder
built bundle bundled burst bus busy but bytes cache calibrate call called calls cam came camera cameras can
candidate cannot capability capacity capi caption capture captured car card carries case categories category
cause caution ceiling cell cells center centernet centre centres certificate certificates cfg cfs cgroup chain
challenge challenges change changed changes changing channel channels character characters charset check
checked checkout checks child chn choice choose chosen chown cid class classes classification clearly client
clients clip clips clock close closed closes closing coalesce coco code codec codes col colleague color colour
colours columns com come comes comm common compare compared compares comparing compatibility compile compiled
compiling complete components compressed compression compute computed computes computing condition confidence
config configuration configurations configured connect connected connecting connection connections connects
considers const constant constants constrained container containerd containerenv content context conv convert
converted convolutions copied copy core cores corners cost costs could count counted counter counts cpu
cpuinfo crash crashed crashes create createoptions credential credentials crf css ctl ctx cublas cuda cudart
cudnn cufft cumulative curand cusparse customvision cut cvexport daily damaged dark dart dashed dashes data
datacenter datatype date day days dda debug decodable decode decoded decoder decodes decoding deeds deeper
default defs degrade degraded deliver delivered delivering delivery demanded demo denied dependent deploy
deployed deployment depthwise describes description desired detail details detect detection detections
detector detr dev deviation device devices dict did die died dies differ difference different differs digest
digits dilations dim direct direction directml disable disabled discarded disconnect disconnected disk div dmi
dock docker dockerenv docs doctor doctype document does done door dots double doubt down download dozens draft
draws drew driver drivers drives drop dropouts dropped drops dry dtype due duration dxg each early eased echo
edge edgecolor edgehub edition effect effective efficientdet eflow elevated else elsewhere empty enable
enabled end ended ending endpoints ends engine enough enterprise enum env environment epoch epsilon error
errorcode errors escaped estimate eval even event events ever every everything everywhere evidence exactly
examine examined examines example examples exception excluded exec executing exhausted exist exit exp
expectation expected explains export exports extend extensions external extra fabric fabricmanager fail failed
fails failure faint fainter fairness fall fallback falling false family far fast faster fastest fastestdet
fault faults fcc fell fetched fetching few figure figures file files fill filled fills filter find finding
findings finds fine finish finished finite fire first fit fits fixed fixes flags flat flatter flight float
floats fma folder folders follow followed font fontsize fonttype footer for forbid forbidden force form format
formed forward found four fps fpsprobesize frame frameon framerate frames free frequency fresh from front
frozen fulfilled full function further gain gap garbage gate gated gateway gathered gauge gave geforce
generate get gets give given gives goes gone good goodput got gpu gpus grab graph graphics graphs gray grey
grid group guessed guest gzip had half hand handed handing hands hang hangs happens has hashsalt have head
header headers headless heads health healthz height heights held help helps here hexadecimal hides high higher
histogram hold holds home host hour hours how href html http https hub hung hyper identifier identity idle ids
igd igfx ignore iig image images img imgsz imported included index inf infer inference infinity info init
initial inject ink input inputs insecure inside inspect install installation installed instances instead int
integer integers integrated integrity intel internal interrupted interval into intra invalid iot iotedge iou
iscrowd items its itself jitter jobs joined joins journal jpeg jpg json jsonl judge judged judges just jwt
keep keeps kept kernel kernels key keyboard keys kind kinds knob know known knows kubepods label labelcolor
labels labelsize lacks ladder lane lanes lang large larger largest last late latencies latency later latest
latin layered lead leads least leave leaves left legend length less let lets letterbox letterboxed letters
level levelname levels lib libcu libcublas libcuda libcudart libcudnn libcufft libcurand libdxcore
libnvdxgdmal libnvidia libnvinfer libonnxruntime libpod libraries library libx license lie lies light like
limit limits line linear lines linewidth link linked lint linux list listed listen lists literal little live
lived load loaded loader loading loads loc local localhost locally location lock locking log login loginpas
loginuse long longer longest look looked looking looks loop loopback loops loses loss lost low lower machine
machines made main major make makes making management manager manifest manifests many map mapping maps mariner
mark marked marks masked matched matplotlib max maximum maxwell may mcr mean meaning means measure measured
measuring media median medium meet megapixels mem meminfo memory message messages meta metadata meter meters
method methods metrics microsoft middle milliseconds min mind mine minimum minute minutes misc mismatch
missing mitigation mixed mjpg mkv moby mode model models modes modprobe module modules moment moments more
most motion mouse mov move moved moves moving mpeg mpg msg much multipart multiply must muted name named names
nan nanodet narrow narrowed native ndarray nearest nearly need needed needs negative neither nested nests
network networks never nevertheless new newer newest next nhwc nms nobody node nodes nodev noise none nor
noref norm normalises nosniff nosuid not note notes nothing now nowhere ntp null number numbers numpy nvdec
nvidia nvidiactl object objectness objects octet off offered offers offset often old older oldest omitted once
one ones only onnx onnxruntime onvif oom open openapi opencv opened opening openvino operator operators ops
opset opt optimization option options order org origin original osrelease other others otherwise our ours out
outbox outcome outgoing output outputs outright outside over overdue overlap overlapping overload overs
oversize own owner pace paces package packages packed packets pad paddle pads page paho pair pairs parameters
parent parity part particular parts pass passphrase passthrough passw passwd password passwords patch patches
path paths pattern payload pci pending people per percentiles period perm permission permissions person phone
photo photos picodet picture pictures pid piece pieces ping pip pipeline pixel pixels place placed placeholder
placeholders placement places plain plan plans plant platform plays plots plug png pointer points poison port
ports post power precision precisions prefer prefix preparation prepared preset pretended primary priority
privileges pro probe probes probing problem problems proc process processes processor producer product profile
program programs properties proto protocol provider providers proxy psw public publish published publishes
pulled purpose put pwd pyav pycocotools python pytorch qdq qnn quadro quality quant queries query quota quote
quotes raise ran range ranges rate rates rather ratio ratios raw reach reached read readable readiness reading
reads ready readyz really realm reason reasons rebuild rebuilds recall received recipe recommended reconnect
reconnecting record recovering recovery red redirect redirected redirects reduce ref reference referrer
refusal refusals refuse refused refuses reg registry regular reinstall rejected release remainder remedies
remedy remote remove removed renamed renew renewed repeatable repeats replace replaced replaces reply report
reported reporting reports request requested requests required resample resized resolution resolve resolved
response responses rest restart restarted restarting restarts result results retiring retrying return returned
reverse rewritten rgb right rights ring rise rocm role room root rotation round rounded rounds route routes
row rows rtdetr rtsp rtsps rtx rule rules run running runs runtime rwm safe said same sameness sans sas
saturate saturation save saves saw say says scale scaled scales scaling scene schedstat schedule schema
schemas scheme scope score scores script sdp search second seconds secret secrets section sections security
see seen sees segment self send sends sense sensor sent sentence sequence sequences series serif served server
servers serves service serving session sessionid set sets setting settings settled seven several severity sha
shape shapes share shared sharing sheep shift shm should show shows shutdown side sig sigmoid sign signal
signature silence silent simple simulator since single sink site six size sizes skip skipped sleeps slo slot
slow slowed slower slows small smaller smi smpte snapshot socket softmax software some something source spare
sparse speak speaks speed spent spinning spoils spool sqlite square src sreadyz sse stable stacks stage stages
stale stalled stand stands start started starting starts stat state stated states statm status statuses stay
stays std stderr stdin stdout step steps sticky still stop stopped stopping stops storage store str strategy
stream streams streamtype stretch stretched stretches stride strides string strongest stub stubs stuck style
sub subprocess subscribing substream subtract subtracted subtracts subtype such sudo sum summary supervisor
support supported supports suppressed suppresses suppressing suppression sure surrogatepass surroundings
survives sve svg swaps switched synchronised synchronous synthetic sys system systemctl table tag take taken
takes taking target task tbody tcp telemetry tell telling tells template templates tensor tensorrt tensors
tesla test tests text tfod than that the thead their them then there these they thing things this thorough
those thread threads three throttle through tidying tie tier tif tiff tile tiles time timedatectl timeout
times timing tiny title tls tmp together token tokens tolerance tomorrow too took toolkit tools top topleft
total touched tracks traffic train training transformer transformers transport transportmode trial trials
tried trt truck true trusted truth try trying tsv tuple turn turns twice twin two txt type types udp uint
ultralytics unauthorized unavailable unchanged undecided under unhealthy unicast unified uninstall unit units
unix unknown unless unlike unmatched unplanned unreachable unreadable unseen unsupported until untold update
updated updates upgrade upload uploaded upper upstream uptime uri url urllib usable use used user usermod
username uses using usr usual utf utility uvm vain val valid value values var variable variables variant
variants vendor verbs verdict verify version versions very video videocodec videos viewer viewers viewport
virtual visible vision visionedge visitors vmbus vnni void volume wait waited waiting waits wal want wanted
wants warm warmed warming warn warning warnings was way ways web webm webp weight weights well went were what
whatever when where whether which while who whoever whole whose why wide wider width widths will win window
windows wins winver wished with within without won word words work worked workload works workspace worse would
writable write writes writing written wrong wsl www xtick yaml yard yes yet yml yolov yolox you your ytick yuv
yuvj zero zeros zip zone zones
""".split()  # noqa: SIM905 - a list would take a line for each word
)


ESCAPE_HINT = "write %23 for '#', %2F for '/', %3F for '?', %40 for '@', %5B for '[' and %5D for ']'"
"""The remedy for reserved characters in a user name or password."""


# --- addresses, by their structure -------------------------------------------------------------------------

_MASK = "***"
_SEPARATOR = re.compile(r"[/?#]")
HOST_PATTERN = re.compile(r"(?P<host>\[[^\[\]@]*\]|[^\[\]@:]*)(?::(?P<port>[0-9]{0,5}))?")
_PATH_VALUE = re.compile(r"(=|%3[dD])[^/]+")
_MAX_NAME_CHARACTERS = 64
# Placeholders in our own hints.
_PLACEHOLDERS = frozenset({"USER:PASSWORD", "HOST:PORT", "…", ""})


@dataclass(frozen=True, slots=True)
class AddressParts:
    """The parts of an address after its ``://``, split by separators only, so that parsing never fails.

    `is_ambiguous`: the user name or password seems to contain a separator that is not escaped.
    """

    user: str | None
    host: str
    tail: str
    is_ambiguous: bool = False

    @staticmethod
    def parse(rest: str) -> "AddressParts":
        found = _SEPARATOR.search(rest)
        end = len(rest) if found is None else found.start()
        authority, tail = rest[:end], rest[end:]
        user, at, host = authority.rpartition("@")
        # A later '@' belongs to a path or query, unless the text before it can be a user name and a password
        # that contain '/', '?' or '#'. In doubt a host is masked, so that no password is shown.
        if "@" not in tail or _is_host(host, dotted=not at):
            return AddressParts(user if at else None, host, tail)
        user, _, behind = rest.rpartition("@")
        found = _SEPARATOR.search(behind)
        end = len(behind) if found is None else found.start()
        return AddressParts(user, behind[:end], behind[end:], is_ambiguous=True)


def _is_host(text: str, *, dotted: bool) -> bool:
    """Whether this can only be a host: an IP address, 'localhost', or, if `dotted`, a name with a dot."""
    found = HOST_PATTERN.fullmatch(text)
    if found is None:
        return False
    host: str = found["host"]
    if host.startswith("[") or host == "localhost" or (dotted and found["port"] is None and "." in host):
        return True
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def mask_address(uri: str) -> str:
    """Return an address without user name, password, and values in its query or path.

    The whole text is one address, so its user name and password may contain blanks and quotes.
    """
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}://{_masked_rest(rest)}" if separator else _PAIR.sub(_masked_pair, uri)


def _masked_rest(rest: str) -> str:
    """Mask the text after a ``://``, also further addresses in its path."""
    shown = []
    while True:
        parts = AddressParts.parse(rest)
        path, nested, behind = parts.tail.partition("://")
        whole = not nested or "?" in path or "#" in path
        shown += [_masked_authority(parts), _masked_tail(parts.tail if whole else path)]
        if whole:
            return "".join(shown)
        shown.append(nested)
        rest = behind


def _masked_authority(parts: AddressParts) -> str:
    if parts.is_ambiguous and "?" in (parts.user or ""):
        return _MASK  # the host may be the end of a query value
    if HOST_PATTERN.fullmatch(parts.host) is None and parts.host not in _PLACEHOLDERS:
        return _MASK  # without an '@', a user name and a password look like a host and a port
    return (
        parts.host
        if parts.user is None
        else f"{parts.user if parts.user in _PLACEHOLDERS else _MASK}@{parts.host}"
    )


def _masked_tail(tail: str) -> str:
    tail, sharp, fragment = tail.partition("#")
    path, mark, query = tail.partition("?")
    path = _PATH_VALUE.sub(rf"\1{_MASK}", path)
    query = "&".join(_masked_chunk(chunk) for chunk in query.split("&"))
    return f"{path}{mark}{query}{sharp}{_MASK if fragment else ''}"


def _masked_chunk(chunk: str) -> str:
    name, equals, _ = chunk.partition("=")
    if not equals or "%3d" in name.lower() or len(name) > _MAX_NAME_CHARACTERS:
        return chunk if chunk in _PLACEHOLDERS else _MASK
    return f"{name}={_MASK}"


# --- texts -------------------------------------------------------------------------------------------------

MAX_TEXT_CHARACTERS = 8192
"""A longer text is cut before it is masked."""

_KEPT_CHARACTERS = 4096
# A secret at the end of a cut text is shorter than this, or is masked up to that end.
_MARGIN_CHARACTERS = 1024
_MAX_PASSES = 8

# Each pattern begins with fixed text, and no unbounded run is tried twice: masking is linear in the text.
_ADDRESS = re.compile(r"://([^\s\"'<>]+)")
_END_OF_SENTENCE = ".,:;)"
_HEADER = re.compile(
    r"(?i)\b((?:(?:Bearer|Basic|Digest|SharedAccessSignature)[ \t]{1,8}){1,16})([^\s\"'<>]+)"
)
_HEADER_WORDS = ("bearer", "basic", "digest", "sharedaccesssignature")
_SECRET_NAMES = (
    *("token", "key", "password", "passwd", "pass", "pwd", "psw", "secret", "sig", "signature"),
    *("auth", "credential", "credentials", "user", "username", "login", "usr", "loginuse", "loginpas"),
    *("passphrase", "jwt", "sessionid", "response", "sas"),
)
_SECRET_NAMES_PATTERN = "|".join(sorted(_SECRET_NAMES, key=len, reverse=True))
_SECRET_KEY = re.compile(rf"(?i)[\w.-]*(?:{_SECRET_NAMES_PATTERN})")
_PAIR = re.compile(
    rf"(?i)((?:{_SECRET_NAMES_PATTERN})(?:\[\w{{0,16}}\])?(?:=|%3D))"
    r"(\"[^\"]{1,256}\"|'[^']{1,256}'|[^&\s\"'<>]+)"
)


def redact(text: str) -> str:
    """Return a text without secrets, for logs, errors and answers; a very long text is cut.

    User names, passwords and query values of addresses, tokens, and values of pairs such as ``password=…``
    become ``***``, and so do registered secrets (`register_secrets`). Redacting a text twice changes nothing.
    """
    shown = _truncate(text) if len(text) > MAX_TEXT_CHARACTERS else _masked(text)
    while len(shown) > MAX_TEXT_CHARACTERS:  # masks can be longer than what they hide
        shown = _truncate(shown)
    return shown


def _truncate(text: str) -> str:
    shown = _masked(text[: _KEPT_CHARACTERS + _MARGIN_CHARACTERS])
    # The end may be the start of a secret that could not be recognised.
    kept = shown[: max(0, min(_KEPT_CHARACTERS, len(shown) - _MARGIN_CHARACTERS))]
    return _masked(f"{kept} … (cut, {len(text)} characters)")


def _masked(text: str) -> str:
    for _ in range(_MAX_PASSES):
        shown = _ADDRESS.sub(_masked_url, _known.mask(text))
        # Most texts contain neither, and searching for a word costs a tenth of a pattern.
        if any(word in shown.lower() for word in _HEADER_WORDS):
            shown = _HEADER.sub(_masked_header, shown)
        if "=" in shown or "%3" in shown:
            shown = _PAIR.sub(_masked_pair, shown)
        if shown == text:
            break
        text = shown
    return text


def _masked_url(found: re.Match[str]) -> str:
    rest = found[1].rstrip(_END_OF_SENTENCE)
    return f"://{_masked_rest(rest)}{found[1][len(rest) :]}"


def _masked_header(found: re.Match[str]) -> str:
    value = found[2].rstrip(_END_OF_SENTENCE)
    # "Bearer TOKEN" in a hint and "Basic challenge" in a sentence are not secrets.
    if value in _PLACEHOLDERS or value.casefold() in UNMASKED_WORDS:
        return found[0]
    return f"{found[1]}{_MASK}{found[2][len(value) :]}"


def _masked_pair(found: re.Match[str]) -> str:
    if found[2][0] in "\"'":
        return f"{found[1]}{found[2][0]}{_MASK}{found[2][0]}"
    value = found[2].rstrip(_END_OF_SENTENCE)
    return f"{found[1]}{_MASK if value else ''}{found[2][len(value) :]}"


# Keys of documents whose values are sentences. Names, states, codes, labels and devices are our own words and
# are not redacted.
_FREE_TEXT_KEYS = frozenset(
    {
        *("reason", "reasons", "lastError", "message", "error", "sentence", "notes", "note", "problems"),
        *("found", "instruction", "lines", "words", "detail", "text", "why", "fetching", "remedy", "down"),
    }
)
_ADDRESS_KEYS = frozenset({"uri", "url"})


def redact_document(document: Any, key: str = "") -> Any:
    """Return a JSON value with addresses masked and sentences redacted, both found by their keys."""
    if isinstance(document, str):
        if key in _ADDRESS_KEYS:
            return mask_address(document)
        return redact(document) if key in _FREE_TEXT_KEYS else document
    if isinstance(document, Mapping):
        return {name: redact_document(item, str(name)) for name, item in document.items()}
    if isinstance(document, list | tuple):
        return [redact_document(item, key) for item in document]
    return document


# --- known secrets -----------------------------------------------------------------------------------------

_MIN_CHARACTERS, _MAX_CHARACTERS = 3, 4096
_LONG_CHARACTERS = 6
_SHORT_NUMBER = re.compile(r"[0-9]{1,3}")


class KnownSecrets:
    """Secrets that are masked by value, anywhere in a text and in any escaping.

    A secret of six characters or more is masked inside words, one of three to five only as a whole word. A
    shorter one is masked only by its place, because it looks like ordinary text; so is one of
    `UNMASKED_WORDS`.
    """

    def __init__(self, limit: int = 4_000) -> None:
        self._limit = limit
        self._kept: dict[str, frozenset[str]] = {}
        self._by_start: dict[str, tuple[str, ...]] = {}

    def __repr__(self) -> str:
        return f"<KnownSecrets {len(self._kept)}>"

    def add(self, secrets: Iterable[str]) -> None:
        """Mask these secrets from now on; above the limit the oldest are forgotten."""
        new = [secret for secret in dict.fromkeys(secrets) if secret not in self._kept]
        fresh = [secret for secret in new if _is_searchable(secret)][-self._limit :]
        if not fresh:
            return
        kept = {**self._kept, **{secret: frozenset(_spellings(secret)) for secret in fresh}}
        kept = dict([*kept.items()][-self._limit :])
        by_start: dict[str, set[str]] = {}
        for form in frozenset[str]().union(*kept.values()):
            by_start.setdefault(form[: _prefix_characters(form)], set()).add(form)
        # Replaced, not changed: other threads read them meanwhile.
        self._kept, self._by_start = kept, {start: tuple(forms) for start, forms in by_start.items()}

    def mask(self, text: str) -> str:
        """Return the text with known secrets masked; the cost hardly depends on their number."""
        by_start = self._by_start
        if not by_start:
            return text
        starts = {text[at : at + _MIN_CHARACTERS] for at in range(len(text) - _MIN_CHARACTERS + 1)}
        starts |= {text[at : at + _LONG_CHARACTERS] for at in range(len(text) - _LONG_CHARACTERS + 1)}
        found = [form for start in by_start.keys() & starts for form in by_start[start] if form in text]
        if not found:
            return text
        # Longest first: one secret may be the start of another.
        choices = "|".join(
            _spelling_pattern(form) for form in sorted(found, key=lambda form: (-len(form), form))
        )
        return re.sub(choices, _MASK, text)


# One for the process: texts are masked in log handlers and in threads of libraries, which cannot get it as an
# argument.
_known = KnownSecrets()


def register_secrets(secrets: Iterable[str]) -> None:
    """Make `redact` mask these secrets wherever they appear."""
    _known.add(secrets)


def find_secrets(document: object) -> set[str]:
    """Return the secrets of a document or a list of arguments, found by their place.

    A word that is also a key of the document, such as the name of a camera, is not a secret: masking it would
    make the texts unreadable.
    """
    found, keys = set[str](), set[str]()
    _collect_secrets(document, "", found, keys)
    return found - keys


# A camera on the command line: NAME=URI.
_CAMERA_ARGUMENT = re.compile(r"([a-z0-9_-]{1,64})=\w")


def _collect_secrets(value: object, key: str, found: set[str], keys: set[str]) -> None:
    match value:
        case str():
            found |= _secrets_of_text(value)
            keys |= {
                match[1]
                for match in [_CAMERA_ARGUMENT.match(value)]
                if match and not _SECRET_KEY.fullmatch(match[1])
            }
            if _SECRET_KEY.fullmatch(key):
                found.add(value)
        case Mapping():
            for name, item in value.items():
                keys.add(str(name))
                _collect_secrets(str(name), "", found, keys)
                # The keys of attributes are names of models, such as user-badge: their values are labels.
                _collect_secrets(item, "" if key == "attributes" else str(name), found, keys)
        case list() | tuple():
            for item in value:
                _collect_secrets(item, key, found, keys)
        case int() | float() if _SECRET_KEY.fullmatch(key) and not isinstance(value, bool):
            found.add(str(value))


# A text that is one address, on the command line with a name before it; it may contain blanks.
_WHOLE_ADDRESS = re.compile(r"\s*([\w-]{1,64}=)?[a-zA-Z][a-zA-Z0-9+.-]{0,31}://")


def _secrets_of_text(text: str) -> set[str]:
    """Return the secrets of a text that is an address, or contains addresses, headers or pairs."""
    found = {match[2] for match in _HEADER.finditer(text)}
    pairs = {match[2].strip("\"'") for match in _PAIR.finditer(text)}
    # In a connection string the value ends before the ';'.
    found |= pairs | {re.split("[;,]", value, maxsplit=1)[0] for value in pairs}
    rests = [match[1] for match in _ADDRESS.finditer(text)]
    if whole := _WHOLE_ADDRESS.match(text):
        rests.append(text[whole.end() :])
    for rest in rests:
        found |= _secrets_of_address(rest)
    return found - {"", *_PLACEHOLDERS}


# Query values of these names choose a stream; masked in sentences, they would hide ordinary words and
# numbers.
_STREAM_PARAMETERS = re.compile(
    r"(?i)(channel|subtype|stream|streamtype|resolution|fps|framerate|width|height|quality|compression|codec|"
    r"videocodec|profile|transport|transportmode|unicast|proto|camera|cam|chn|rotation|sensor|media|video|audio|format)"
)


def _secrets_of_address(rest: str) -> set[str]:
    """Return user name, password and query values of the text after a ``://``."""
    parts = AddressParts.parse(rest)
    found = set[str]()
    if parts.user is not None and parts.user not in _PLACEHOLDERS:
        name, _, password = parts.user.partition(":")
        found |= {parts.user, name, password}
    query = parts.tail.partition("#")[0].partition("?")[2]
    for chunk in query.split("&"):
        name, equals, value = chunk.partition("=")
        if not equals:
            found.add(chunk)
        elif not _STREAM_PARAMETERS.fullmatch(name):
            found.add(value)
    return found


def _is_searchable(secret: str) -> bool:
    """Whether a secret can be masked by value: see `KnownSecrets`."""
    if len(secret) > _MAX_CHARACTERS:
        return False
    plain = unquote(secret)
    short = len(plain) < _MIN_CHARACTERS or _SHORT_NUMBER.fullmatch(plain)
    return not short and plain.casefold() not in UNMASKED_WORDS and bool(plain.strip("*"))


def _spellings(secret: str) -> set[str]:
    """Return the spellings of a secret: plain, percent-encoded, and inside JSON or Python texts."""
    plain = unquote(secret)
    # JSON can contain half a surrogate pair, which UTF-8 cannot.
    percent = partial(quote, plain, errors="surrogatepass")
    forms = {
        secret,
        plain,
        percent(),
        percent(safe=""),
        percent(safe=":"),
        quote_plus(plain, errors="surrogatepass"),
    }
    forms |= {quote(secret, errors="surrogatepass"), quote(secret, safe="", errors="surrogatepass")}
    for form in (secret, plain):
        forms |= {json.dumps(form, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)}
        forms.add(repr(form)[1:-1])
    if ":" in plain:  # a login, as HTTP sends it
        forms.add(base64.b64encode(plain.encode(errors="surrogatepass")).decode())
    return {form for form in forms if len(form) >= _MIN_CHARACTERS}


def _prefix_characters(form: str) -> int:
    """Return the length of the prefix that is looked up first."""
    return _LONG_CHARACTERS if len(form) >= _LONG_CHARACTERS else _MIN_CHARACTERS


def _spelling_pattern(form: str) -> str:
    exact = re.escape(form)
    return exact if len(form) >= _LONG_CHARACTERS else rf"(?<![A-Za-z0-9]){exact}(?![A-Za-z0-9])"
