"""The errors that people see, by what has to be corrected; `__main__` turns each into its exit code.

    VisionedgeError                1  the work failed
    ├── SourceError                1  a picture, video or camera cannot be read
    │   ├── DamagedPictureError    1  one picture of a source cannot be decoded; the next one may be
    │   └── UnsupportedFormatError 1  the container or codec of a source is not allowed
    ├── DownloadError              1  a model cannot be downloaded
    ├── BusyError                  1  no capacity for a request now; the caller may try again
    ├── ConfigError                2  arguments or configuration are wrong (every problem at once)
    ├── ModelError                 2  a model cannot be loaded or understood
    └── UnavailableError           3  the machine cannot do what was demanded
        └── DeviceError            3  the demanded device is not usable and fallback is off

Each message is one line that names the object and the remedy, and is shown as it is.
"""

import re
from collections.abc import Sequence

# Longer than any useful path; longer words are shortened, as they would hide the rest of the line.
_LONG_WORD = re.compile(r"\S{401,}")

_MAX_SHOWN = 20
"""Problems in the text of a ConfigError."""


class VisionedgeError(Exception):
    """Base of all errors that people see; their messages hold no secrets (see `runtime.redaction`)."""

    exit_code = 1


class SourceError(VisionedgeError):
    """A picture, video or camera cannot be opened or read."""


class DamagedPictureError(SourceError):
    """One picture of a source cannot be decoded; the next one may be."""


class UnsupportedFormatError(SourceError):
    """The container or codec of a source is not allowed; another try would fail, too."""


class DownloadError(VisionedgeError):
    """A model cannot be downloaded; `permanent`: another try would most likely fail, too."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class BusyError(VisionedgeError):
    """There is no capacity for this request now; the caller may try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ConfigError(VisionedgeError):
    """The configuration or the arguments are wrong.

    `problems` holds one line each, starting with the path of the key (``cameras.dock.fps: …``).
    """

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = [*self.problems[:_MAX_SHOWN]]
        if more := len(self.problems) - len(shown):
            shown.append(f"and {more} more problems")
        super().__init__("; ".join(shown))


class ModelError(VisionedgeError):
    """A model cannot be loaded, understood or run.

    Names from a model file are not trusted: characters that would break the line or the terminal are blanks.
    `state` holds the lines for `MODEL.yaml` that would help: empty if no line would, None if that is unknown.
    """

    exit_code = 2

    def __init__(self, message: str, *, state: Sequence[str] | None = None) -> None:
        self.state = None if state is None else tuple(state)
        line = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(_LONG_WORD.sub(lambda word: f"{word[0][:40]}…{word[0][-40:]}", line))


class UnavailableError(VisionedgeError):
    """This machine cannot do what was demanded: a port is in use, a package or a device is missing."""

    exit_code = 3


class DeviceError(UnavailableError):
    """The demanded device cannot be used; `code` is one of the reason codes in the docs."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code
