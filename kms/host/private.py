"""Private files and directories: only their owner may read them, from the first instant they exist.

A secret is read only from a regular file, reached without following a symlink at its end, owned by this user or by
root, and readable by nobody else. What fails that is refused with the command that mends it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
from pathlib import Path
from typing import Final

from kms.errors import FileAccessError, InputMissingError, SecretFileError
from kms.host.durable import sync_names

_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_ALLOW: Final = "give --allow-group-readable-secrets"
_OWN_DIRECTORY: Final = "choose one of your own, which is made when it is missing"


def make_private_directory(path: Path) -> None:
    """Make `path` (and its missing parents) with mode 0700, or check that what is there is ours and private.

    The parents too, whatever the umask: whoever may write to one could put another directory in the place of ours.
    Their names are durable when this returns: what is saved in a directory whose own name a power cut takes is lost too.
    Raises `SecretFileError` when another user owns it or may enter it.
    """
    try:
        if not _make_directory(path):
            # Whoever made it may have been killed before its name was durable. A parent that this user may not read is
            # not one that it made a directory in.
            with contextlib.suppress(PermissionError):
                sync_names(path.parent)
        state = path.stat()
    except OSError as error:
        raise FileAccessError(f"cannot make the directory {path}: {error.strerror}") from error
    if state.st_uid not in (os.geteuid(), 0):
        raise SecretFileError(f"the directory {path} belongs to another user; {_OWN_DIRECTORY}")
    if stat.S_IMODE(state.st_mode) & _OTHERS:
        # Of /tmp and its like a chmod would take everybody's.
        is_shared = state.st_uid != os.geteuid() or state.st_mode & (stat.S_ISVTX | stat.S_IWOTH)
        remedy = _OWN_DIRECTORY if is_shared else f"if it is yours alone, run: chmod 700 {path}"
        raise SecretFileError(f"other users may enter the directory {path}; {remedy}")


def _make_directory(path: Path) -> bool:
    """Make `path` and its missing parents, durably; whether it was not there before."""
    if path.is_dir():
        return False
    _make_directory(path.parent)
    try:
        path.mkdir(0o700)
    except FileExistsError:
        if not path.is_dir():
            raise
        return False
    sync_names(path.parent)
    return True


def check_shared_directory(path: Path, gid: int) -> None:
    """Check that the group `gid` may enter the directory `path`, and that nobody but its owner may write to it.

    Raises `SecretFileError` with the command that mends it, `FileAccessError` when it cannot be looked at.
    """
    # Not made when it is missing: whom else its parents let in is for a person to say.
    remedy = f"put the socket into a directory of its own, made with: install -d -m 0710 -g {gid} PATH"
    try:
        state = path.stat()
    except FileNotFoundError:
        raise FileAccessError(f"there is no directory {path}; {remedy}") from None
    except OSError as error:
        raise FileAccessError(f"cannot look at the directory {path}: {error.strerror}") from error
    if state.st_uid not in (os.geteuid(), 0):
        raise SecretFileError(f"the directory {path} belongs to another user; {remedy}")
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SecretFileError(f"other users may write to the directory {path}; {remedy}")
    if not (state.st_mode & stat.S_IXOTH or (state.st_mode & stat.S_IXGRP and state.st_gid == gid)):
        raise SecretFileError(f"the group {gid} may not enter the directory {path}; {remedy}")


def open_private(path: Path, flags: int = os.O_RDONLY, *, allow_group: bool | None = None) -> int:
    """A descriptor of a private regular file that is there, to read it unless `flags` say otherwise.

    Checked on the descriptor, not on the path, so that the file cannot be exchanged in between. `allow_group` takes it as
    containers get their secrets: by way of a symbolic link, and readable by a group that this process is in. False says
    that a person could have allowed it.

    Raises `InputMissingError`, `SecretFileError` for one that is not private, `FileAccessError`.
    """
    follow = 0 if allow_group else os.O_NOFOLLOW
    try:
        # O_NONBLOCK: opening a FIFO must not hang before its kind is known.
        descriptor = os.open(path, flags | follow | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise InputMissingError(f"there is no file {path}") from None
    except PermissionError:
        raise SecretFileError(f"cannot read {path}: permission denied; {_as_owner(path)}") from None
    except OSError as error:
        if not allow_group and path.is_symlink():
            alternative = "" if allow_group is None else f", or {_ALLOW}"
            raise SecretFileError(f"{path} is a symbolic link; name the file itself{alternative}") from None
        raise FileAccessError(f"cannot read {path}: {error.strerror}") from error
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise SecretFileError(f"{path} is not a regular file; name one that holds the secret")
        _check_owner(path, state)
        open_to = stat.S_IMODE(state.st_mode) & _OTHERS & ~_credential_bits(state)
        if open_to & ~(_own_group_bits(state) if allow_group else 0):
            could_be_allowed = allow_group is False and open_to == _own_group_bits(state)
            alternative = f" (or, as it is a group of your own, {_ALLOW})" if could_be_allowed else ""
            raise SecretFileError(f"other users may read {path}; run: chmod 600 {path}{alternative}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _credential_bits(state: os.stat_result) -> int:
    # systemd hands a credential to a service's user by an ACL on a file of root:root, and an ACL's mask shows as the
    # group's permission. The group itself is root's, so nobody is let in who could not read the file anyway.
    is_roots = state.st_uid == 0 and state.st_gid == 0
    return stat.S_IRGRP if is_roots and os.geteuid() != 0 else 0


def _own_group_bits(state: os.stat_result) -> int:
    return stat.S_IRGRP if state.st_gid in {os.getegid(), *os.getgroups()} else 0


def _check_owner(path: Path, state: os.stat_result) -> None:
    if state.st_uid not in (os.geteuid(), 0):
        raise SecretFileError(f"{path} belongs to another user; {_as_owner(path)}")


def _as_owner(path: Path) -> str:
    """What to do about a file that may not be read, or is another user's: it is that user's, and stays so."""
    try:
        owner = path.stat().st_uid
        if owner == os.geteuid():
            return f"run: chmod 600 {path}"
    except OSError:
        return "run this as its owner"
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f"'#{owner}'"
    return f"run this as its owner: sudo -u {name} ..."
