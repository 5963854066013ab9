"""`visionedge completion`: a script for a shell that completes commands, options and their choices.

The script is generated from the parser of this version. It does not call visionedge at each key, because
starting Python takes too long for that.
"""

import argparse
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from visionedge.cli.arguments import Subparsers, add_command

SHELLS = ("bash", "zsh", "fish")


class CompletionEntry(NamedTuple):
    """What may follow a command: its subcommands, its options, and the choices of the options."""

    commands: Mapping[str, str]
    options: Mapping[str, tuple[str, ...] | None]
    """The choices by option; empty: it takes any value; None: it takes no value."""


def add_parser(commands: Subparsers, build_parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Add the command `completion`; `build_parser` makes the parser that the script describes."""
    parser = add_command(
        commands,
        "completion",
        lambda arguments: _print(arguments.shell, build_parser()),
        "print a script that completes commands and options in your shell",
        "  source <(visionedge completion bash)                  in ~/.bashrc\n"
        "  source <(visionedge completion zsh)                   in ~/.zshrc, after compinit\n"
        "  visionedge completion fish | source                   in ~/.config/fish/config.fish",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")


def _print(shell: str, parser: argparse.ArgumentParser) -> int:
    print(generate_script(shell, parser), end="")
    return 0


def generate_script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for a shell."""
    tree = dict(_collect_entries(parser, ()))
    if shell == "fish":
        return _fish_script(parser.prog, tree)
    zsh = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return zsh + _bash_script(parser.prog, tree)


CommandTree = Mapping[tuple[str, ...], CompletionEntry]


def _collect_entries(
    parser: argparse.ArgumentParser, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], CompletionEntry]]:
    """An entry for the parser and each parser below it, by the words of the command."""
    commands: dict[str, str] = {}
    options: dict[str, tuple[str, ...] | None] = {}
    # argparse has no public way to list the actions of a parser.
    for action in parser._actions:  # noqa: SLF001
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}  # noqa: SLF001
            for name, subparser in action.choices.items():
                commands[name] = helps.get(name, "")
                yield from _collect_entries(subparser, (*path, name))
        elif action.option_strings:
            takes_none = action.nargs == 0
            choices = tuple(map(str, action.choices or ()))
            options |= dict.fromkeys(action.option_strings, None if takes_none else choices)
        elif action.choices:
            commands |= dict.fromkeys(map(str, action.choices), "")
    yield path, CompletionEntry(commands, options)


def _bash_script(program: str, tree: CommandTree) -> str:
    cases, values = [], []
    for path, words in tree.items():
        candidates = " ".join([*words.commands, *words.options])
        cases.append(f"    {shlex.quote(' '.join(path))}) words={shlex.quote(candidates)} ;;")
        for option, choices in words.options.items():
            if choices is not None:
                key = shlex.quote(f"{' '.join(path)}|{option}")
                values.append(f"    {key}) words={shlex.quote(' '.join(choices))}; value=1 ;;")
    known = " ".join(shlex.quote(" ".join(path)) for path in tree if path)
    return _BASH.format(
        program=program, known=known, cases="\n".join(cases), values="\n".join(values), function=f"_{program}"
    )


_BASH = """\
{function}() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
  local path="" words="" value="" next known word number
  for ((number = 1; number < COMP_CWORD; number++)); do
    word="${{COMP_WORDS[number]}}"
    next="${{path:+$path }}$word"
    for known in {known}; do
      if [ "$known" = "$next" ]; then path="$next"; fi
    done
  done
  case "$path|$before" in
{values}
  esac
  if [ -z "$value" ]; then
  case "$path" in
{cases}
  esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F {function} {program}
"""
"""Without a match the shell completes file names (`-o default`)."""


def _fish_script(program: str, tree: CommandTree) -> str:
    lines = []
    for path, words in tree.items():
        seen = [f"__fish_seen_subcommand_from {word}" for word in path]
        seen += [f"not __fish_seen_subcommand_from {' '.join(words.commands)}"] if words.commands else []
        where = f" -n {shlex.quote('; and '.join(seen))}" if seen else ""
        for name, help_line in words.commands.items():
            description = f" -d {shlex.quote(help_line)}" if help_line else ""
            lines.append(f"complete -c {program}{where} -f -a {name}{description}")
        for option, choices in words.options.items():
            lines.append(f"complete -c {program}{where} {_fish_option(option, choices)}")
    return "\n".join(lines) + "\n"


def _fish_option(option: str, choices: tuple[str, ...] | None) -> str:
    name = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
    if choices is None:
        return name
    return f"{name} -x -a {shlex.quote(' '.join(choices))}" if choices else f"{name} -r"
