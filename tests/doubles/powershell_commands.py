"""The commands of a PowerShell text and their parameters, by a small tokenizer.

It knows comments, strings, here-strings, line continuation, brackets and splatting; it evaluates nothing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""
      (?P<skip>[ \t]+|`\r?\n|\#[^\n]*|<\#.*?\#>)
    | (?P<end>\r?\n|;|\|\||&&|\||&)
    | (?P<string>@'\r?\n.*?\r?\n'@|@"\r?\n.*?\r?\n"@|'(?:[^']|'')*'|"(?:[^"`]|`.|"")*")
    | (?P<open>[@$]?\(|@?\{|\[)
    | (?P<close>[)}\]])
    | (?P<splat>@[A-Za-z]\w*)
    | (?P<equals>=)
    | (?P<comma>,)
    | (?P<word>[^\s;|&(){}\[\]=,'"]+)
    """,
    re.VERBOSE | re.DOTALL,
)
_CMDLET = re.compile(r"[A-Za-z]+-[A-Za-z]\w*")
_PARAMETER = re.compile(r"-([A-Za-z]\w*):?")
_KEYWORDS = {"return", "throw", "exit", "in", "else", "try", "catch", "finally", "do", ".", "param"}


class PowerShellSyntaxError(ValueError):
    """A quote or a bracket is not closed, or closes nothing."""


@dataclass
class PowerShellCommand:
    """A cmdlet or function at the beginning of a statement, and the parameters that it is given."""

    name: str
    parameters: list[str] = field(default_factory=list)
    splats: list[str] = field(default_factory=list)


def read_commands(text: str) -> list[PowerShellCommand]:
    """All commands of a text, inner ones too.

    Raises:
        PowerShellSyntaxError: a quote or a bracket does not match.
    """
    reader = _CommandReader()
    for kind, token in _tokens(text):
        reader.read(kind, token)
    reader.end()
    return reader.commands


class _CommandReader:
    """Follows brackets; knows the command of the current statement, and whether one may begin."""

    def __init__(self) -> None:
        self.commands: list[PowerShellCommand] = []
        self._stack: list[tuple[str, PowerShellCommand | None]] = []
        self._current: PowerShellCommand | None = None
        self._may_begin = True

    def read(self, kind: str, token: str) -> None:
        """Read one token."""
        match kind:
            case "end" | "equals":
                self._current, self._may_begin = None, True
            case "open":
                self._stack.append((token[-1], self._current))
                self._current, self._may_begin = None, token[-1] != "["
            case "close":
                self._close(token)
            case "splat" if self._current is not None:
                self._current.splats.append(token[1:])
            case "word":
                self._word(token)
            case _:
                self._may_begin = False

    def end(self) -> None:
        """The text is over."""
        if self._stack:
            raise PowerShellSyntaxError(f"{self._stack[-1][0]} is not closed")

    def _close(self, token: str) -> None:
        if not self._stack or "([{".index(self._stack[-1][0]) != ")]}".index(token):
            raise PowerShellSyntaxError(f"{token} closes nothing")
        bracket, self._current = self._stack.pop()
        # After `if (…)` a block follows, and after a block the next statement.
        self._may_begin = bracket != "[" and self._current is None

    def _word(self, token: str) -> None:
        if self._may_begin and _CMDLET.fullmatch(token):
            self._current, self._may_begin = PowerShellCommand(token), False
            self.commands.append(self._current)
            return
        self._may_begin = token.lower() in _KEYWORDS
        if self._current is not None and (found := _PARAMETER.fullmatch(token)):
            self._current.parameters.append(found[1])


def read_functions(text: str) -> dict[str, set[str]]:
    """The functions that a script defines, with the names of their parameters."""
    found = {}
    for function in re.finditer(
        r"^function ([A-Za-z]+-[A-Za-z]\w*) \{(.*?)^\}", text, re.MULTILINE | re.DOTALL
    ):
        block = re.search(r"param\((.*?)\)\n", function[2], re.DOTALL)
        found[function[1]] = set(re.findall(r"\$(\w+)", block[1] if block else ""))
    return found


def read_splatted_keys(text: str, variable: str) -> set[str]:
    """The keys that a script puts into a hashtable: `$x = @{ a = … }`, `$x.a = …`."""
    keys = set(re.findall(rf"\${variable}\.(\w+)\s*=", text))
    for body in re.findall(rf"\${variable}\s*=\s*@\{{(.*?)\}}", text, re.DOTALL):
        keys |= set(re.findall(r"(?:^|[;\n{])\s*(\w+)\s*=", f"\n{body}"))
    return keys


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or found.lastgroup is None:
            raise PowerShellSyntaxError(f"a quote is not closed: {text[at : at + 40]!r}")
        at = found.end()
        if found.lastgroup == "string" and found[0][0] == '"':
            yield "string", found[0]
        elif found.lastgroup != "skip":
            yield found.lastgroup, found[0]
