"""The rules of Microsoft's published schemas of IoT Edge, written anew as a check.

Source: SchemaStore (Apache-2.0), read 2026-11-30: `azure-iot-edge-deployment-template-4.0.json`, which
refers to `azure-iot-edgeagent-deployment-1.1.json` and `azure-iot-edgehub-deployment-1.2.json`; for
deployments `azure-iot-edge-deployment-2.0.json`. `iotedgedev` and VS Code validate with them. Stricter here:
unknown keys of modules are refused in templates too, and $edgeHub must be there. edgeHub's MQTT broker is
left out.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

Rule = Callable[[Any, str], list[str]]
"""Gives the problems of a value at a path."""


def _is(*kinds: type) -> Rule:
    def check(value: Any, path: str) -> list[str]:
        good = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        return [] if good else [f"{path}: is no {' or '.join(kind.__name__ for kind in kinds)}"]

    return check


def _one_of(*values: str) -> Rule:
    return lambda value, path: [] if value in values else [f"{path}: is none of {values}"]


def _like(pattern: str) -> Rule:
    def check(value: Any, path: str) -> list[str]:
        return [] if isinstance(value, str) and re.search(pattern, value) else [f"{path}: is not {pattern}"]

    return check


def _between(low: int, high: int) -> Rule:
    def check(value: Any, path: str) -> list[str]:
        return _is(int)(value, path) or ([] if low <= value <= high else [f"{path}: is out of range"])

    return check


def _any_of(*rules: Rule) -> Rule:
    def check(value: Any, path: str) -> list[str]:
        found = [rule(value, path) for rule in rules]
        return [] if [] in found else found[0]

    return check


def _object(
    required: Mapping[str, Rule], optional: Mapping[str, Rule] | None = None, *, more: bool = False
) -> Rule:
    """An object with these keys; other keys only if `more`."""
    known = {**required, **(optional or {})}

    def check(value: Any, path: str) -> list[str]:
        if problems := _is(dict)(value, path):
            return problems
        problems = [f"{path}.{key}: is missing" for key in required if key not in value]
        for key, item in value.items():
            if key in known:
                problems += known[key](item, f"{path}.{key}")
            elif not more:
                problems.append(f"{path}.{key}: is not known")
        return problems

    return check


def _each(name: str, rule: Rule) -> Rule:
    """An object whose keys have a form, and whose values follow a rule."""

    def check(value: Any, path: str) -> list[str]:
        problems = _is(dict)(value, path)
        for key, item in ({} if problems else value).items():
            problems += rule(item, f"{path}.{key}") if re.search(name, key) else [f"{path}.{key}: is no name"]
        return problems

    return check


_TEXT = _is(str)
_REGISTRY = _object({"address": _like(r"^[^\s]+$"), "username": _TEXT, "password": _TEXT})
_RUNTIME_SETTINGS = _object(
    {},
    {
        "minDockerVersion": _TEXT,
        "loggingOptions": _TEXT,
        "registryCredentials": _each(r"^[^.$# ]+$", _REGISTRY),
    },
)
_RUNTIME = _object({"type": _one_of("docker"), "settings": _RUNTIME_SETTINGS})
_ENV = _each(r"^[^+#$\s.]+$", _object({"value": _is(int, float, str, bool)}))
_SECONDS = _between(0, 4_294_967_295)
_STORE = _object({"timeToLiveSecs": _is(int)})
_ROUTE = _object({"route": _like("^.+$")}, {"priority": _between(0, 9), "timeToLiveSecs": _SECONDS})
_ROUTES = _each(r"^[^.$# ]+$", _any_of(_ROUTE, _like("^.+$")))


def _settings(template: bool) -> Rule:
    options = _is(dict, str) if template else _TEXT
    pieces = {f"createOptions{number:02d}" if number else "createOptions": options for number in range(8)}
    return _object({"image": _TEXT}, pieces, more=template)


def _module(template: bool, *required: str) -> Rule:
    keys = {
        "type": _one_of("docker"),
        "settings": _settings(template),
        "status": _one_of("running", "stopped"),
        "restartPolicy": _one_of("never", "on-failure", "on-unhealthy", "always"),
        "env": _ENV,
        "imagePullPolicy": _one_of("never", "on-create"),
        "startupOrder": _SECONDS,
        "version": _TEXT,
    }
    needed = ("type", "settings", *required)
    return _object({key: keys[key] for key in needed}, {k: v for k, v in keys.items() if k not in needed})


def _manifest(*, template: bool) -> Rule:
    always = ("status", "restartPolicy")
    agent = _object(
        {
            "schemaVersion": _like("1.1") if template else _TEXT,
            "runtime": _RUNTIME,
            "systemModules": _object(
                {"edgeAgent": _module(template), "edgeHub": _module(template, *always)}, more=template
            ),
            "modules": _each("^[a-zA-Z0-9_-]+$", _module(template, *always)),
        }
    )
    hub = _object(
        {"schemaVersion": _like("1.2") if template else _TEXT, "routes": _ROUTES},
        {"storeAndForwardConfiguration": _STORE},
    )
    content = {
        "$edgeAgent": _object({"properties.desired": agent}),
        "$edgeHub": _object({"properties.desired": hub}),
    }
    return _object({"modulesContent": _object(content, more=True)}, more=True)


def template_problems(document: Any) -> list[str]:
    """What the schema of templates, version 4.0.0, says of a document."""
    return _manifest(template=True)(document, "$")


def deployment_problems(document: Any) -> list[str]:
    """What the schema of deployments, version 2.0, says of a document."""
    return _manifest(template=False)(document, "$")
