"""The tree of errors: who owns which code and which exit status."""

from __future__ import annotations

import inspect

import pytest

from kms import errors
from kms.errors import KmsError, WireError, from_wire

EXITS = [
    (1, ["InvalidRequestError", "LimitExceededError", "DecryptionFailedError", "AlteredFileError", "FrameTooLargeError"]),
    (2, ["WrongPassphraseError"]),
    (64, ["ConfigError"]),
    (65, ["CutOffError", "InputError", "KeystoreError", "AuditLogError"]),
    (66, ["InputMissingError"]),
    (69, ["ServerUnreachableError", "UnavailableError"]),
    (70, ["InternalError", "OutcomeUnknownError", "SaveOutcomeUnknownError", "ProtocolError", "KmsError"]),
    (71, ["MemoryShortError"]),
    (74, ["SaveFailedError", "FileAccessError"]),
    (75, ["ThrottledError", "KeystoreLockedError", "KeystoreReplacedError"]),
    (77, ["AuthFailedError", "UnauthorizedError", "SecretFileError", "UnknownServerError"]),
    (141, ["ReaderGoneError"]),
]
CODES: dict[str, type[WireError]] = {
    "AuthFailed": errors.AuthFailedError,
    "Unauthorized": errors.UnauthorizedError,
    "InvalidRequest": errors.InvalidRequestError,
    "DecryptionFailed": errors.DecryptionFailedError,
    "FrameTooLarge": errors.FrameTooLargeError,
    "InternalError": errors.InternalError,
    "Unavailable": errors.UnavailableError,
    "Throttled": errors.ThrottledError,
    "LimitExceeded": errors.LimitExceededError,
}
ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, KmsError)]


@pytest.mark.parametrize(("exit_code", "name"), [(code, name) for code, names in EXITS for name in names])
def test_each_error_ends_a_command_with_the_status_of_the_contract(exit_code: int, name: str) -> None:
    assert getattr(errors, name).exit_code == exit_code


def test_no_error_is_missing_from_the_table_of_statuses() -> None:
    assert {kind.__name__ for kind in ALL} == {name for _, names in EXITS for name in names} | {"WireError"}


@pytest.mark.parametrize("code", [*CODES, "OfALaterVersion"])
def test_an_error_of_unknown_outcome_is_one_of_its_own_whatever_its_code(code: str) -> None:
    error = from_wire(code, "why", is_outcome_known=False)
    assert type(error) is errors.OutcomeUnknownError
    assert str(error) == "why"


@pytest.mark.parametrize("code", CODES)
def test_each_code_on_the_wire_is_one_error(code: str) -> None:
    assert CODES[code].code == code
    assert type(from_wire(code, "why")) is CODES[code]


def test_no_error_of_the_wire_is_missing_from_the_table_of_codes() -> None:
    assert {kind for kind in ALL if issubclass(kind, WireError)} == {
        *(*CODES.values(), WireError),
        errors.CutOffError,
        errors.AlteredFileError,  # never on the wire: only who decrypts a file can tell
    }


@pytest.mark.parametrize("code", [code for code in CODES if code != "DecryptionFailed"])
def test_the_message_of_the_wire_is_the_message_of_the_error(code: str) -> None:
    assert str(from_wire(code, "why")) == "why"


def test_there_is_one_message_for_a_ciphertext_that_does_not_open() -> None:
    assert str(errors.DecryptionFailedError()) == "decryption failed"
    assert str(from_wire("DecryptionFailed", "since the key is wrong")) == "decryption failed"


def test_a_code_of_another_protocol_is_a_protocol_error() -> None:
    error = from_wire("Sorry", "why")
    assert type(error) is errors.ProtocolError
    assert "Sorry" in str(error)


@pytest.mark.parametrize("kind", ALL)
def test_the_name_of_each_error_ends_in_error(kind: type[KmsError]) -> None:
    assert kind.__name__.endswith("Error")
