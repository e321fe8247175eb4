"""Secrets typed at a terminal, or taken from the environment or a file."""

from __future__ import annotations

import contextlib
import os
import pty
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kms.cli import prompt
from kms.core.secret import Secret
from kms.errors import ConfigError, InputError


class Person:
    """Someone at a terminal: sees what is written on it, and types an answer when a question ends in a colon."""

    def __init__(self, descriptor: int, answers: list[bytes]) -> None:
        self.screen = b""
        self._descriptor = descriptor
        self._answers = answers
        self._thread = threading.Thread(target=self._sit, daemon=True)
        self._thread.start()

    def _sit(self) -> None:
        for answer in self._answers:
            seen = b""
            while not seen.endswith(b": "):
                seen += os.read(self._descriptor, 1024)
            self.screen += seen
            os.write(self._descriptor, answer)

    def leave(self) -> bytes:
        """Everything that stood on the screen."""
        self._thread.join(5)
        os.set_blocking(self._descriptor, False)
        with contextlib.suppress(BlockingIOError):
            self.screen += os.read(self._descriptor, 4096)
        return self.screen


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    monkeypatch.setattr(prompt, "TERMINAL", os.ttyname(theirs))
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prompt, "TERMINAL", str(tmp_path / "no-tty"))


def reveal(secret: Secret) -> bytes:
    with secret.view() as view:
        return bytes(view)


def test_a_typed_secret_is_read_without_echo_and_echo_comes_back(terminal: tuple[int, int]) -> None:
    before = termios.tcgetattr(terminal[1])
    person = Person(terminal[0], [b"hunter2\n"])
    with prompt.obtain("passphrase", "KMS_TEST_UNSET", None, "--passphrase-file") as secret:
        assert reveal(secret) == b"hunter2"
    assert termios.tcgetattr(terminal[1]) == before
    screen = person.leave()
    assert b"passphrase: " in screen
    assert b"hunter2" not in screen


def test_a_new_secret_is_asked_for_twice(terminal: tuple[int, int]) -> None:
    person = Person(terminal[0], [b"hunter2\n", b"hunter2\n"])
    with prompt.obtain("passphrase", "KMS_TEST_UNSET", None, "--passphrase-file", new=True) as secret:
        assert reveal(secret) == b"hunter2"
    assert b"passphrase again: " in person.leave()


def test_two_inputs_that_differ_are_refused(terminal: tuple[int, int]) -> None:
    Person(terminal[0], [b"hunter2\n", b"hunter3\n"])
    with pytest.raises(ConfigError, match="differ") as refusal:
        prompt.obtain("passphrase", "KMS_TEST_UNSET", None, "--passphrase-file", new=True)
    assert "hunter" not in str(refusal.value)


def test_an_empty_line_is_no_secret(terminal: tuple[int, int]) -> None:
    Person(terminal[0], [b"\n"])
    with pytest.raises(InputError, match="the passphrase is empty"):
        prompt.ask("passphrase", "remedy")


def test_end_of_input_aborts(terminal: tuple[int, int]) -> None:
    Person(terminal[0], [b"\x04"])
    with pytest.raises(click.Abort):
        prompt.ask("passphrase", "remedy")


def test_an_interrupted_prompt_brings_the_echo_back(terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    before = termios.tcgetattr(terminal[1])

    def interrupted(_descriptor: int, _buffers: list[bytearray]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "readv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prompt.ask("passphrase", "remedy")
    assert termios.tcgetattr(terminal[1]) == before


@pytest.mark.usefixtures("no_terminal")
def test_without_a_terminal_the_error_names_variable_and_option() -> None:
    with pytest.raises(ConfigError, match="set KMS_TEST_UNSET, or name a file with --passphrase-file"):
        prompt.obtain("passphrase", "KMS_TEST_UNSET", None, "--passphrase-file")


def test_the_environment_wins_over_the_file_and_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_TEST_SECRET", "from-environment")
    with prompt.obtain("token", "KMS_TEST_SECRET", tmp_path / "missing", "--token-file") as secret:
        assert reveal(secret) == b"from-environment"
    assert "KMS_TEST_SECRET" not in os.environ


def test_an_empty_variable_is_one_that_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_bytes(b"from-file\n")
    file.chmod(0o600)
    monkeypatch.setenv("KMS_TEST_SECRET", "")
    with prompt.obtain("token", "KMS_TEST_SECRET", file, "--token-file") as secret:
        assert reveal(secret) == b"from-file"


def test_an_overlong_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_TEST_SECRET", "x" * 4097)
    with pytest.raises(ConfigError, match="KMS_TEST_SECRET holds more than 4096 bytes"):
        prompt.obtain("token", "KMS_TEST_SECRET", None, "--token-file")


def test_only_yes_confirms(terminal: tuple[int, int]) -> None:
    person = Person(terminal[0], [b"yes\n", b"no\n"])
    prompt.confirm("Really?", "give --yes")
    with pytest.raises(click.Abort):
        prompt.confirm("Really?", "give --yes")
    assert b"Really?" in person.leave()


@pytest.mark.usefixtures("no_terminal")
def test_nothing_is_confirmed_without_a_terminal() -> None:
    with pytest.raises(ConfigError, match="give --yes"):
        prompt.confirm("Really?", "give --yes")


@pytest.mark.parametrize(
    ("typed", "goes_on"), [(b"billing\n", True), (b" billing \n", True), (b"Billing\n", False), (b"yes\n", False)]
)
def test_a_name_is_confirmed_by_that_name_only(terminal: tuple[int, int], typed: bytes, goes_on: bool) -> None:
    person = Person(terminal[0], [typed])
    with contextlib.nullcontext() if goes_on else pytest.raises(click.Abort):
        prompt.confirm_by_name("Really?", "billing", "the name", "give --yes")
    assert b"Really?\r\nType the name to go on: " in person.leave()


def test_a_blank_answer_confirms_no_name(terminal: tuple[int, int]) -> None:
    Person(terminal[0], [b"\n"])
    with pytest.raises(click.Abort):
        prompt.confirm_by_name("Really?", "billing", "the name", "give --yes")


def test_what_was_typed_before_the_question_is_no_answer_to_it(terminal: tuple[int, int]) -> None:
    os.write(terminal[0], b"yes\n")
    Person(terminal[0], [b"no\n"])
    with pytest.raises(click.Abort):
        prompt.confirm("Really?", "give --yes")
