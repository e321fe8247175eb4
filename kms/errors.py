"""The one tree of errors.

Each error that crosses the wire owns its code; each error that ends a command owns its exit status. Errors are
translated at a boundary, never in the middle: the daemon turns a `WireError` into an error reply, the command
lines turn any `KmsError` into one line on stderr and its `exit_code`. Messages never hold a secret.
"""

from __future__ import annotations

from typing import ClassVar, Self

EXIT_OK = 0
EXIT_REFUSED = 1
EXIT_WRONG_PASSPHRASE = 2
EXIT_USAGE = 64
EXIT_BAD_INPUT = 65
EXIT_NO_INPUT = 66
EXIT_UNREACHABLE = 69
EXIT_INTERNAL = 70
EXIT_SYSTEM = 71
EXIT_IO = 74
EXIT_TEMPFAIL = 75
EXIT_PERMISSION = 77
EXIT_BROKEN_PIPE = 141
"""What a shell reports for a program that SIGPIPE ended, as it ends most programs whose reader went away."""


class KmsError(Exception):
    """The root of the tree: catch it, never raise it. `exit_code` is the status a command ends with."""

    exit_code: ClassVar[int] = EXIT_INTERNAL


class WireError(KmsError):
    """An error a server answers with. `code` is its `errorCode` on the wire; the text is its `message`."""

    code: ClassVar[str]
    exit_code = EXIT_REFUSED
    is_outcome_known = True
    """Whether nothing was changed; else it may have been, or was."""

    def of_unknown_outcome(self) -> Self:
        """The same error, of a change that may have been made."""
        self.is_outcome_known = False
        return self


class AuthFailedError(WireError):
    """The token is missing, wrong, or of the other plane."""

    code = "AuthFailed"
    exit_code = EXIT_PERMISSION


class UnauthorizedError(WireError):
    """Authenticated, but the policy forbids this operation on this group."""

    code = "Unauthorized"
    exit_code = EXIT_PERMISSION


class InvalidRequestError(WireError):
    """The request breaks a rule that the message names: its form, a name, or a state change that is refused."""

    code = "InvalidRequest"


class DecryptionFailedError(WireError):
    """A ciphertext does not open.

    It takes no reason on purpose: whether the key was wrong, the AAD, the bytes or the version's state is what an
    attacker who can submit ciphertexts wants to learn (a decryption oracle), so there is exactly one message.
    """

    code = "DecryptionFailed"

    def __init__(self) -> None:
        super().__init__("decryption failed")


class AlteredFileError(DecryptionFailedError):
    """A file does not open, though its data key did: with the right AAD, and its key version enabled.

    Only who decrypts a file knows this. Its data key is under the same AAD, so that was right; what follows it was not.
    """


class CutOffError(AlteredFileError):
    """The same, of a file that was being decrypted into a stream, which has an authentic beginning of it."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, released: int) -> None:
        WireError.__init__(
            self, f"decryption failed after {released} bytes, which are authentic; the rest is damaged or cut off"
        )


class FrameTooLargeError(WireError):
    """One line is longer than the frame limit. The server closes the connection after saying so."""

    code = "FrameTooLarge"


class InternalError(WireError):
    """A fault of the server. What happened is in its log, not in the message."""

    code = "InternalError"
    exit_code = EXIT_INTERNAL


class UnavailableError(WireError):
    """The server cannot record what it does, so it does nothing. It will again, once its audit log can be written."""

    code = "Unavailable"
    exit_code = EXIT_UNREACHABLE


class ThrottledError(WireError):
    """More was asked for in a time than the caller may. Nothing was done; ask again after `retry_after` seconds."""

    code = "Throttled"
    exit_code = EXIT_TEMPFAIL

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class LimitExceededError(WireError):
    """The caller has used up what it may have, which the message names. To ask again later does not help."""

    code = "LimitExceeded"


class ConfigError(KmsError):
    """A flag, an environment variable or a combination of them cannot be used."""

    exit_code = EXIT_USAGE


class WrongPassphraseError(KmsError):
    """The passphrase does not open this keystore."""

    exit_code = EXIT_WRONG_PASSPHRASE


class InputError(KmsError):
    """An input is not what it should be: not a container, too large, not a regular file."""

    exit_code = EXIT_BAD_INPUT


class InputMissingError(InputError):
    """An input file does not exist."""

    exit_code = EXIT_NO_INPUT


class KeystoreError(KmsError):
    """The keystore cannot be used as it is: altered, cut short, or of an unknown format. Nothing was changed."""

    exit_code = EXIT_BAD_INPUT


class MemoryShortError(KmsError):
    """The system has not the memory that this takes. Nothing is wrong with the keystore, and nothing was changed."""

    exit_code = EXIT_SYSTEM


class AuditLogError(KmsError):
    """The audit log is not what it should be: altered, cut short, under another key, or newer than the keystore."""

    exit_code = EXIT_BAD_INPUT


class KeystoreLockedError(KmsError):
    """Another process holds the keystore, or the audit log."""

    exit_code = EXIT_TEMPFAIL


class SaveFailedError(KmsError):
    """A save failed before its rename: the old keystore is still the one in force."""

    exit_code = EXIT_IO


class SaveOutcomeUnknownError(KmsError):
    """A save failed at or after its rename: which keystore survives a power cut is not known."""

    exit_code = EXIT_INTERNAL


class KeystoreReplacedError(KmsError):
    """The keystore on disk is not the one that was saved here last, or its lock is gone. It is not saved over."""

    exit_code = EXIT_TEMPFAIL


class SecretFileError(KmsError):
    """A file of secrets is not private: wrong owner, mode or kind. The message names the command that mends it."""

    exit_code = EXIT_PERMISSION


class FileAccessError(KmsError):
    """Reading or writing a file failed."""

    exit_code = EXIT_IO


class ReaderGoneError(FileAccessError):
    """Whoever read the output has gone, as `head` does when it has what it wants."""

    exit_code = EXIT_BROKEN_PIPE


class ServerUnreachableError(KmsError):
    """No server answers at the address, or the connection broke."""

    exit_code = EXIT_UNREACHABLE


class UnknownServerError(KmsError):
    """What answers at the server's address is not known to be the server, so it was shown no token."""

    exit_code = EXIT_PERMISSION


class OutcomeUnknownError(KmsError):
    """A change of keys was asked for, and may have been made: the connection broke before its answer came, or the server
    could not make sure of it. Look what there is, with `describe_key_group`, before asking again."""

    exit_code = EXIT_INTERNAL


class ProtocolError(KmsError):
    """The peer answered something that is not this protocol."""

    exit_code = EXIT_INTERNAL


_BY_CODE: dict[str, type[WireError]] = {
    error.code: error
    for error in (
        AuthFailedError,
        UnauthorizedError,
        InvalidRequestError,
        DecryptionFailedError,
        FrameTooLargeError,
        InternalError,
        UnavailableError,
        ThrottledError,
        LimitExceededError,
    )
}


def from_wire(code: str, message: str, retry_after: float | None = None, *, is_outcome_known: bool = True) -> KmsError:
    """The typed error for an error reply; a `ProtocolError` for a code this client does not know.

    `retry_after` is after how many seconds to ask again, of a reply that says so; and `is_outcome_known` is False for one
    that says so.
    """
    if not is_outcome_known:
        return OutcomeUnknownError(message)
    if code == DecryptionFailedError.code:
        return DecryptionFailedError()
    if code == ThrottledError.code and retry_after is not None:
        return ThrottledError(message, retry_after)
    error = _BY_CODE.get(code)
    return error(message) if error is not None else ProtocolError(f"unknown error code from the server: {code}")
