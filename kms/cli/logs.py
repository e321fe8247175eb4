"""What kms-server says on standard error: an event a line, for people or as JSON for programs that collect logs.

Everything it says goes through one formatter: what modules log, what it tells the person who started it, and why it
ends. A JSON line is one object in ASCII, whatever the event holds: what is not ASCII is escaped, so that there is no line
end in it, nothing that a terminal obeys, and no text that is not UTF-8. A line has less than 48 KiB, as journald takes
no longer ones: what is too long loses its middle, since a traceback says most at its two ends.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from kms.cli.words import one_line
from kms.limits import MAX_LOGGED_MESSAGE, MAX_LOGGED_VALUE
from kms.service.event import Event


class HumanFormatter(logging.Formatter):
    """Lines for a terminal. What the program itself says begins with its name, as its other messages do."""

    def __init__(self, program: str) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        if record.name != self._program:
            # A traceback has several lines; what is in them has not.
            return "\n".join(map(one_line, super().format(record).split("\n")))
        error = "error: " if record.levelno >= logging.ERROR else ""
        return f"{self._program}: {error}{one_line(record.getMessage())}"


class JsonFormatter(logging.Formatter):
    """One JSON object: `time` (ISO 8601, UTC), `level`, `logger`, `message`, and the fields of an `Event`."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
        line: dict[str, str | int | None] = {
            "time": f"{time}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": _text(super().format(record), MAX_LOGGED_MESSAGE),
        }
        if isinstance(record.msg, Event):
            for name, value in record.msg.fields.items():
                line[name] = _text(value, MAX_LOGGED_VALUE) if isinstance(value, str) else value
        return json.dumps(line)


def _text(text: str, limit: int) -> str:
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
    # JSON can write half a surrogate pair, but readers refuse it.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Voice:
    """How a program speaks: for people, until it is told otherwise."""

    def __init__(self, program: str) -> None:
        self._program = program
        self.formatter: logging.Formatter = HumanFormatter(program)

    def use(self, log_format: str) -> None:
        """Speak in one of `kms.server.config.LOG_FORMATS` from now on."""
        self.formatter = {"human": HumanFormatter(self._program), "json": JsonFormatter()}[log_format]

    def line(self, level: int, text: str) -> str:
        """The line, with its end, that says `text` in the program's own name."""
        return self.formatter.format(logging.LogRecord(self._program, level, "", 0, text, None, None)) + "\n"
