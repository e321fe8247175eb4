"""Secrets typed at a terminal, or taken from the environment or a file."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kms.cli import prompt
from kms.cli.prompt import Wanted
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

    def leave(self, after: bytes = b"") -> bytes:
        """Everything that stood on the screen, once that ends with `after`: it shows a little later what is written."""
        self._thread.join(5)
        os.set_blocking(self._descriptor, False)
        with contextlib.suppress(BlockingIOError):
            self.screen += os.read(self._descriptor, 4096)
        while not self.screen.endswith(after) and select.select([self._descriptor], [], [], 10)[0]:
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


PASSPHRASE = Wanted("passphrase", "KMS_TEST_UNSET", "--passphrase-file")


def token(file: Path | None, flag: str | None = None) -> Wanted:
    return Wanted("token", "KMS_TEST_SECRET", "--token-file", flag, lambda: file)


def reveal(secret: Secret) -> bytes:
    with secret.view() as view:
        return bytes(view)


def test_a_typed_secret_is_read_without_echo_and_echo_comes_back(terminal: tuple[int, int]) -> None:
    before = termios.tcgetattr(terminal[1])
    person = Person(terminal[0], [b"hunter2\n"])
    with prompt.obtain_passphrase(PASSPHRASE) as secret:
        assert reveal(secret) == b"hunter2"
    assert termios.tcgetattr(terminal[1]) == before
    screen = person.leave()
    assert b"passphrase: " in screen
    assert b"hunter2" not in screen


def test_a_new_secret_is_asked_for_twice(terminal: tuple[int, int]) -> None:
    told: list[str] = []
    person = Person(terminal[0], [b"hunter2 hunter\n", b"hunter2 hunter\n"])
    with prompt.obtain_new_passphrase(PASSPHRASE, told.append, allow_weak=False) as secret:
        assert reveal(secret) == b"hunter2 hunter"
    assert b"passphrase again: " in person.leave()


def test_two_inputs_that_differ_are_refused(terminal: tuple[int, int]) -> None:
    told: list[str] = []
    Person(terminal[0], [b"hunter2 hunter\n", b"hunter3 hunter\n"])
    with pytest.raises(ConfigError, match="was not typed twice the same") as refusal:
        prompt.obtain_new_passphrase(PASSPHRASE, told.append, allow_weak=False)
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

    def interrupted(*_: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr("kms.cli.prompt.select.select", interrupted)
    with pytest.raises(click.Abort):
        prompt.ask("passphrase", "remedy")
    assert termios.tcgetattr(terminal[1]) == before


@pytest.mark.parametrize("typed", [b"\x04", None])
def test_a_question_that_nobody_answers_ends_its_line(
    typed: bytes | None, terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> object:
        raise KeyboardInterrupt

    if typed is None:
        monkeypatch.setattr("kms.cli.prompt.select.select", interrupted)
    person = Person(terminal[0], [] if typed is None else [typed])
    with pytest.raises(click.Abort):
        prompt.confirm("It is gone then.", "remedy")
    monkeypatch.undo()
    assert person.leave(b"\r\n").endswith(b"Type yes to go on: \r\n")


def test_a_new_one_that_is_too_short_has_not_to_be_typed_again(terminal: tuple[int, int]) -> None:
    person = Person(terminal[0], [b"hunter2\n"])
    with pytest.raises(InputError, match="has only 7 characters"):
        prompt.obtain_new_passphrase(PASSPHRASE, lambda _: None)
    assert b"again" not in person.leave()


@pytest.mark.usefixtures("no_terminal")
def test_without_a_terminal_the_error_names_variable_and_option() -> None:
    with pytest.raises(ConfigError, match="set KMS_TEST_UNSET, or name a file with --passphrase-file"):
        prompt.obtain_passphrase(PASSPHRASE)


def test_the_environment_wins_over_the_file_and_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_TEST_SECRET", "from-environment")
    with prompt.obtain(token(tmp_path / "missing")) as secret:
        assert reveal(secret) == b"from-environment"
    assert "KMS_TEST_SECRET" not in os.environ


def test_an_empty_variable_is_one_that_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_bytes(b"from-file\n")
    file.chmod(0o600)
    monkeypatch.setenv("KMS_TEST_SECRET", "")
    with prompt.obtain(token(file)) as secret:
        assert reveal(secret) == b"from-file"


@pytest.mark.parametrize("value", ["  ", "a\tb", "\ufeffabc", "two\nlines"])
def test_a_variable_has_the_rule_of_a_file(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_TEST_SECRET", value)
    with pytest.raises(ConfigError, match=r"^KMS_TEST_SECRET "):
        prompt.obtain(token(None))


def test_a_flag_wins_over_the_variable_which_is_cleared_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_bytes(b"from-file\n")
    file.chmod(0o600)
    monkeypatch.setenv("KMS_TEST_SECRET", "from-environment")
    with prompt.obtain(token(tmp_path / "missing", str(file))) as secret:
        assert reveal(secret) == b"from-file"
    assert "KMS_TEST_SECRET" not in os.environ


@pytest.mark.parametrize("flag", ["", " "])
def test_a_blank_flag_is_an_error_and_no_reason_to_take_another_secret(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_TEST_SECRET", "from-environment")
    with pytest.raises(ConfigError, match="--token-file: name a file"):
        prompt.obtain(token(None, flag))


def test_what_is_not_needed_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def look() -> Path | None:
        raise AssertionError("the variable has it")

    monkeypatch.setenv("KMS_TEST_SECRET", "from-environment")
    with prompt.obtain(Wanted("token", "KMS_TEST_SECRET", "--token-file", None, look)) as secret:
        assert reveal(secret) == b"from-environment"


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
def test_a_hyphen_is_standard_input_and_so_is_its_path(name: str) -> None:
    code = (
        "import sys; from kms.cli.prompt import Wanted, obtain\n"
        f"with obtain(Wanted('token', 'KMS_TEST_SECRET', '--token-file', {name!r})) as secret: print(bytes(secret.view()))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=b"hunter2\n", capture_output=True, check=True)
    assert done.stdout == b"b'hunter2'\n"


@pytest.mark.parametrize(("typed", "length"), [("short77", 7), ("한글암호문구다", 7)])
def test_a_new_passphrase_of_less_than_8_characters_is_taken_only_when_that_is_allowed(
    typed: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setenv("KMS_TEST_UNSET", typed)
    with pytest.raises(InputError, match=f"has only {length} characters; take 8 at least, .* or give --allow-weak"):
        prompt.obtain_new_passphrase(PASSPHRASE, told.append, allow_weak=False)
    monkeypatch.setenv("KMS_TEST_UNSET", typed)
    with prompt.obtain_new_passphrase(PASSPHRASE, told.append, allow_weak=True) as secret:
        assert reveal(secret) == typed.encode()


def test_it_is_told_how_weak_a_new_passphrase_is_and_nothing_of_a_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setenv("KMS_TEST_UNSET", "aaaaaaaa1")
    prompt.obtain_new_passphrase(PASSPHRASE, told.append, allow_weak=False).wipe()
    (line,) = told
    assert "the passphrase is weak: at 1,000,000 guesses a second" in line
    monkeypatch.setenv("KMS_TEST_UNSET", "correct horse battery staple")
    prompt.obtain_new_passphrase(PASSPHRASE, told.append, allow_weak=False).wipe()
    assert told == [line]


def test_a_new_passphrase_breaks_no_rule_and_an_old_one_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_TEST_UNSET", "two\tcolumns of it")
    with pytest.raises(InputError, match="control character"):
        prompt.obtain_new_passphrase(PASSPHRASE, print, allow_weak=True)
    monkeypatch.setenv("KMS_TEST_UNSET", "two\tcolumns of it")
    with prompt.obtain_passphrase(PASSPHRASE) as secret:
        assert "control character" in (secret.complaint or "")


def test_a_line_that_the_terminal_has_cut_off_is_no_secret(terminal: tuple[int, int]) -> None:
    Person(terminal[0], [b"x" * 5000 + b"\n"])
    with pytest.raises(InputError, match="longer than a line that can be typed"):
        prompt.ask("token", "remedy")


def test_a_question_breaks_between_words_on_a_narrow_terminal(terminal: tuple[int, int]) -> None:
    termios.tcsetwinsize(terminal[1], (24, 40))
    person = Person(terminal[0], [b"yes\n"])
    prompt.confirm("Destroying version 1 of billing can never be undone: everything is lost for good.", "give --yes")
    lines = person.leave().decode().split("\r\n")
    assert lines[:3] == ["Destroying version 1 of billing can", "  never be undone: everything is lost", "  for good."]


def test_an_overlong_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_TEST_SECRET", "x" * 4097)
    with pytest.raises(ConfigError, match="KMS_TEST_SECRET holds more than 4096 bytes"):
        prompt.obtain(token(None))


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
