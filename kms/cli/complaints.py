"""What is wrong with a command line, as one line: what click found, and the option or command that may have been meant."""

from __future__ import annotations

import re
from typing import Final

import rich_click as click

from kms.cli.words import closest

_UNKNOWN: Final = re.compile(r"no such (option|command):? '?([^' ]+?)'?(?:[. (].*)?", re.DOTALL)
_GUESS: Final = re.compile(r"[. ]*\(?Did you mean.*", re.DOTALL)


def complaint(error: click.ClickException, program: str) -> str:
    """The line for `error`; `program` is where help is when the error does not tell the command."""
    context = getattr(error, "ctx", None)
    context = context if isinstance(context, click.Context) else None
    if "\n" in error.format_message().strip():
        # Of a group that was given no command, click complains with the whole help.
        found = "give a command"
    else:
        found = " ".join(error.format_message().split())
        found = _GUESS.sub("", found).rstrip(".")
        found = found[:1].lower() + found[1:]
    if found.startswith("got unexpected extra argument") and context is not None and _has_text(context.command):
        # Those that follow in parentheses may be the rest of an unquoted --text.
        found = found.partition(" (")[0]
    unknown = _UNKNOWN.fullmatch(found)
    if unknown is not None and context is not None:
        meant = _nearest(unknown[2], context)
        if meant is not None:
            return f"no such {unknown[1]} '{unknown[2]}'; did you mean {meant}?"
    path = program if context is None else context.command_path
    return f"{found}; see {path} --help"


def _has_text(command: click.Command) -> bool:
    return any("--text" in parameter.opts for parameter in command.params)


def _nearest(typed: str, context: click.Context) -> str | None:
    """Of those that the command has, the option or command that is most like what was typed; None where none is."""
    command = context.command
    if typed.startswith("-"):
        options = [
            name for parameter in command.get_params(context) for name in (*parameter.opts, *parameter.secondary_opts)
        ]
        known = [name for name in options if name.startswith("--")]
    else:
        known = command.list_commands(context) if isinstance(command, click.Group) else []
    return closest(typed, known)
