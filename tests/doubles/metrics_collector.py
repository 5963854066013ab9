"""A stand-in for Azure Monitor's metrics collector 2.0: its requests, and the rules of its parser."""

import math
import re
import urllib.request
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

Metric = tuple[str, Mapping[str, str], float]

_LINE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? ([^ ]+)(?: -?\d+)?")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"(?:,|$)')


def collect(text: str) -> Iterator[Metric]:
    """The samples that the metrics collector 2.0 takes from a page.

    Its rules: classic Prometheus text, a sample per line, no exemplars; it drops infinite and undefined
    values.

    Raises:
        ValueError: the collector would lose a line.
    """
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"lost: {line}")
        labels = found[2] or ""
        if _LABEL.sub("", labels):
            raise ValueError(f"labels: {line}")
        value = float(found[3])
        if not math.isfinite(value):
            raise ValueError(f"dropped: {line}")
        yield found[1], dict(_LABEL.findall(labels)), value


def scrape(endpoint: str, address: str) -> list[Metric]:
    """The samples that the collector takes from an endpoint of `MetricsEndpointsCSV`.

    It sends no token. `address` is where the endpoint's host name leads to, such as ``127.0.0.1:40123``.

    Raises:
        urllib.error.HTTPError: the module refuses.
        ValueError: the collector would lose a line.
    """
    parts = urlsplit(endpoint)
    request = urllib.request.Request(f"http://{address}{parts.path}", headers={"Host": parts.netloc})
    with urllib.request.urlopen(request, timeout=15) as answer:  # noqa: S310 - as above
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return list(collect(answer.read().decode()))
