"""createOptions: what Docker is asked for a module, as an object, a text, or a text in pieces."""

import json
import re
from collections.abc import Mapping

from visionedge.errors import ConfigError
from visionedge.ops.manifest.findings import Findings
from visionedge.ops.manifest.place import Place, below, parse

KEY = "createOptions"

MAX_PIECE_CHARACTERS = 512
"""Where the agent itself cuts, and many a tool."""

_PIECE = re.compile(r"createoptions(\d*)", re.IGNORECASE)


def is_options(key: str) -> bool:
    """Whether a key of a module's settings is one of its createOptions."""
    return _PIECE.fullmatch(key) is not None


def read_options(settings: Place, *, template: bool, findings: Findings) -> Place | None:
    """The createOptions of a module's settings as places; None where there are none that can be read."""
    pieces = {key.lower(): item for key, item in settings.entries.items() if is_options(key)}
    whole = pieces.get(KEY.lower())
    if whole is not None and isinstance(whole.value, Mapping):
        if not template:
            remedy = "write it as a text that holds the JSON; only templates have objects here"
            findings.error(whole, "is an object", remedy)
        return _shaped(whole, findings)
    if not pieces or not _are_pieces(pieces, findings):
        return None
    return _parsed("".join(pieces[key].text for key in sorted(pieces)), below(settings.path, KEY), findings)


def _are_pieces(pieces: dict[str, Place], findings: Findings) -> bool:
    """Whether the pieces are texts that follow one another, as the agent wants them."""
    told = [findings.text(item) for item in pieces.values()]
    sound = None not in told
    names = [f"{KEY}{number:02d}" if number else KEY for number in range(len(pieces))]
    for key, item in pieces.items():
        if key not in (name.lower() for name in names) or len(pieces) > 100:
            remedy = f"number the pieces without a gap: {KEY}, {KEY}01, {KEY}02 … {KEY}99"
            findings.error(item, "is not the next piece: the agent does not read it", remedy)
            sound = False
        if len(pieces) > 1 and len(item.text) > MAX_PIECE_CHARACTERS:
            remedy = f"cut after {MAX_PIECE_CHARACTERS} characters, as the agent and its tools do"
            findings.warning(item, f"is a piece of {len(item.text)} characters", remedy)
    return sound


def _parsed(text: str, path: str, findings: Findings) -> Place | None:
    # The agent takes an empty text and the text null for no options.
    if not text.strip() or text.strip().lower() == "null":
        return None
    try:
        options = parse(text, path)
    except json.JSONDecodeError as error:
        remedy = "the text has to be JSON by itself, all quotes inside it escaped"
        findings.error(path, f"is no JSON at character {error.pos + 1}: {error.msg}", remedy)
        return None
    except ConfigError as error:
        findings.error(path, str(error), "write what Docker's API takes")
        return None
    return _shaped(options, findings)


def _shaped(options: Place, findings: Findings) -> Place:
    """The options, after a look at whether those that matter here have the types that Docker wants."""
    findings.mapping(options)
    findings.mapping(options.at("HostConfig"))
    for path in (("Env",), ("HostConfig", "Binds")):
        for item in findings.items(options.at(*path)):
            findings.text(item)
    for key in ("DeviceRequests", "Devices", "Mounts"):
        for item in findings.items(options.at("HostConfig", key)):
            findings.mapping(item)
    return options
