"""The boundary between a command and the shell: every way a command can end, as an exit status and at most one line.

Nothing past this point sees an exception. A line names what went wrong and what to do about it, never a secret and
never a traceback; what comes from outside (a server's message, a file's name) cannot move the cursor or add a line.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final

import rich_click as click
from click.exceptions import Exit

from kms.cli.complaints import complaint
from kms.cli.signals import StoppedError
from kms.cli.words import fitted, one_line
from kms.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERNAL,
    EXIT_IO,
    EXIT_OK,
    EXIT_SYSTEM,
    EXIT_USAGE,
    AlteredFileError,
    FrameTooLargeError,
    InternalError,
    KmsError,
    LimitExceededError,
    ProtocolError,
    ReaderGoneError,
    ThrottledError,
    UnauthorizedError,
)
from kms.host.standard import abandon_output, finish_output

EXIT_INTERRUPTED: Final = 128 + signal.SIGINT

_REMEDIES: Final[dict[type[KmsError], str]] = {
    UnauthorizedError: "ask whoever runs the server for access",
    ThrottledError: "try again later",
    LimitExceededError: "ask whoever runs the server for a higher one",
    AlteredFileError: "the file is not as it was written: damaged, altered or cut off; take another copy",
    FrameTooLargeError: "use encrypt-file for data of this size",
    InternalError: "look into the server's log",
    ProtocolError: "check that a mini-kms server answers at this address",
}
"""What to do about the errors whose text comes from a server, which cannot know how it was called."""


def run(
    command: click.Command,
    program: str,
    arguments: Sequence[str] | None = None,
    *,
    obj: Any = None,
    error_line: Callable[[str], str] | None = None,
) -> int:
    """Run `command` with `arguments` (those of the process by default) and return the exit status.

    `obj` is what `click.pass_obj` passes. `error_line` makes the line, with its end, that says an error; without it that is
    `PROGRAM: error: ...`.
    """

    def fail(message: str, status: int) -> int:
        # What was printed before tells how far it came.
        abandon_output()
        with contextlib.suppress(OSError):
            line = error_line(message) if error_line else f"{program}: error: {one_line(message)}\n"
            click.echo(fitted(line.rstrip("\n"), 2), err=True)
        # Nor may a line that nobody can be told change the status.
        abandon_output()
        return status

    # What is made here is for its owner alone, who can use it whatever the umask was: 0777 would take even that.
    umask = os.umask(0o077)
    try:
        status = _invoke(command, program, sys.argv[1:] if arguments is None else list(arguments), obj)
    except (BrokenPipeError, ReaderGoneError):
        abandon_output()
        return EXIT_BROKEN_PIPE
    except KmsError as error:
        remedy = _REMEDIES.get(type(error))
        message = str(error)
        return fail(f"{message}; {remedy}" if remedy and ";" not in message else message, error.exit_code)
    except click.ClickException as error:
        return fail(complaint(error, program), EXIT_USAGE)
    except click.Abort:
        return fail("aborted; nothing was changed", EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        return fail("interrupted; it was not finished", EXIT_INTERRUPTED)
    except StoppedError as stop:
        return fail(f"stopped by {signal.Signals(stop.number).name}; it was not finished", 128 + stop.number)
    except MemoryError:
        return fail("there is not enough memory; free some, or raise the limit (ulimit -v)", EXIT_SYSTEM)
    except OSError as error:
        return fail(_system_complaint(error), EXIT_IO)
    except Exception as error:
        # The text of an exception nobody foresaw may hold anything, so only its kind and place are told.
        where = _place(error.__traceback__)
        return fail(f"internal error ({type(error).__name__} at {where}); please report it", EXIT_INTERNAL)
    finally:
        os.umask(umask)
    return status


def _invoke(command: click.Command, program: str, arguments: list[str], obj: Any) -> int:
    # Not `command.main(standalone_mode=False)`: rich-click's exits by itself, with the status that here means "the
    # server refused", when the reader of standard output has gone.
    result: object
    try:
        if os.environ.get(f"_{program}_COMPLETE".replace("-", "_").upper()):
            # A shell asks for completions: click answers and exits.
            command.main(prog_name=program)
        with command.make_context(program, arguments, obj=obj) as context, _of_its_command(context):
            result = command.invoke(context)
    except Exit as end:
        result = end.exit_code
    except SystemExit as end:
        result = end.code
    finish_output()
    return result if isinstance(result, int) else EXIT_OK


@contextlib.contextmanager
def _of_its_command(context: click.Context) -> Iterator[None]:
    """Have what cannot be parsed of a command tell that it is that command, which click forgets of some of it."""
    try:
        yield
    except click.UsageError as error:
        name, group = context.invoked_subcommand, context.command
        if error.ctx is None and name is not None and isinstance(group, click.Group):
            error.ctx = click.Context(group.commands[name], parent=context, info_name=name)
        raise


def _system_complaint(error: OSError) -> str:
    what = error.strerror or type(error).__name__
    return f"{error.filename}: {what}" if error.filename else f"input or output failed: {what}"


def _place(trace: TracebackType | None) -> str:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "an unknown place"
    return f"{trace.tb_frame.f_globals.get('__name__', '?')}:{trace.tb_lineno}"
