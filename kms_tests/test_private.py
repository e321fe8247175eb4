"""Private files and directories."""

from __future__ import annotations

import os
import pwd
import socket
import stat
from pathlib import Path

import pytest

from kms.errors import FileAccessError, InputMissingError, SecretFileError
from kms.host.private import make_private_directory, open_private


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def _file(data: Path, content: bytes, mode: int = 0o600) -> Path:
    path = data / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_a_directory_is_made_with_mode_0700(tmp_path: Path) -> None:
    make_private_directory(tmp_path / "a" / "b")
    assert _mode(tmp_path / "a" / "b") == 0o700


def test_missing_parents_are_made_with_mode_0700_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private_directory(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    assert _mode(tmp_path / "a") == _mode(tmp_path / "a" / "b") == 0o700


def test_a_directory_is_made_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private_directory(tmp_path / "a")
    finally:
        os.umask(before)
    assert _mode(tmp_path / "a") == 0o700


def test_a_directory_that_is_private_is_accepted(data: Path) -> None:
    make_private_directory(data)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, list[str]]]:
    """The directories that were made durable, each with the names it had then."""
    synced: list[tuple[Path, list[str]]] = []

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path, sorted(entry.name for entry in path.iterdir())))

    monkeypatch.setattr(os, "fsync", fsync)
    return synced


def test_each_directory_that_is_made_has_a_durable_name(tmp_path: Path, synced: list[tuple[Path, list[str]]]) -> None:
    make_private_directory(tmp_path / "a" / "b")
    assert synced == [(tmp_path, ["a"]), (tmp_path / "a", ["b"])]


def test_a_directory_that_was_there_has_a_durable_name_too(data: Path, synced: list[tuple[Path, list[str]]]) -> None:
    make_private_directory(data)
    assert synced == [(data.parent, [data.name])]


def test_a_directory_whose_name_cannot_be_made_durable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FileAccessError, match=r"cannot make the directory .*: Input/output error"):
        make_private_directory(tmp_path / "a")


def test_a_parent_that_may_not_be_read_does_not_matter_to_a_directory_that_was_there(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    make_private_directory(data)


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o755, 0o770])
def test_a_directory_others_may_enter_is_refused_with_what_mends_it(data: Path, mode: int) -> None:
    data.chmod(mode)
    with pytest.raises(SecretFileError, match=f"run: chmod 700 {data}"):
        make_private_directory(data)
    assert _mode(data) == mode


def _refusal(directory: Path) -> str:
    with pytest.raises(SecretFileError) as refused:
        make_private_directory(directory)
    return str(refused.value)


@pytest.mark.parametrize("mode", [0o1777, 0o1770, 0o777, 0o757])
def test_nobody_is_told_to_close_a_directory_that_is_shared(data: Path, mode: int) -> None:
    data.chmod(mode)
    assert "choose one of your own" in _refusal(data)
    assert "chmod" not in _refusal(data)


def test_a_directory_of_another_user_is_refused(data: Path, foreign_uid: int) -> None:
    if os.getuid() == 0:
        os.chown(data, foreign_uid + 1, -1)
    assert "belongs to another user; choose one of your own" in _refusal(data)


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes a directory of root's")
def test_nobody_is_told_to_close_a_directory_of_root(data: Path, foreign_uid: int) -> None:
    assert foreign_uid != 0
    data.chmod(0o755)
    assert "choose one of your own" in _refusal(data)
    assert "chmod" not in _refusal(data)


def test_a_file_in_the_place_of_the_directory_is_refused(data: Path) -> None:
    with pytest.raises(FileAccessError, match="cannot make the directory"):
        make_private_directory(_file(data, b""))


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_private_file_opens(data: Path, mode: int) -> None:
    descriptor = open_private(_file(data, b"x", mode))
    try:
        assert os.read(descriptor, 9) == b"x"
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("mode", [0o601, 0o604, 0o640, 0o644, 0o620])
def test_a_file_open_to_others_is_refused_with_what_mends_it(data: Path, mode: int) -> None:
    path = _file(data, b"x", mode)
    with pytest.raises(SecretFileError, match=f"run: chmod 600 {path}"):
        open_private(path)


def test_a_refused_file_is_closed(data: Path) -> None:
    path = _file(data, b"x", 0o644)
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(SecretFileError):
            open_private(path)
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_a_file_of_another_user_is_refused(data: Path, foreign_uid: int) -> None:
    path = _file(data, b"x")
    if os.getuid() == 0:
        os.chown(path, foreign_uid + 1, -1)
    # Not `chown`: after that, who needs the file could not read it any more.
    with pytest.raises(SecretFileError, match="belongs to another user; run this as its owner"):
        open_private(path)
    if os.getuid() == 0:
        os.chown(path, pwd.getpwnam("daemon").pw_uid, -1)
        with pytest.raises(SecretFileError, match="run this as its owner: sudo -u daemon"):
            open_private(path)


def test_a_secret_is_taken_as_containers_mount_it_only_where_that_is_allowed(data: Path) -> None:
    path = _file(data, b"x", 0o440)
    link = data / "link"
    link.symlink_to(path)
    for named in (path, link):
        with pytest.raises(SecretFileError, match="--allow-group-readable-secrets"):
            open_private(named, allow_group=False)
        # Of a keystore nobody can allow it, and so nobody is told to.
        with pytest.raises(SecretFileError, match=r"^((?!--allow).)*$"):
            open_private(named)
        os.close(open_private(named, allow_group=True))
    for mode in (0o444, 0o460, 0o450):
        path.chmod(mode)
        with pytest.raises(SecretFileError, match="other users may read"):
            open_private(link, allow_group=True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files to a group it is not in")
def test_a_secret_that_another_group_may_read_is_never_taken(data: Path) -> None:
    path = _file(data, b"x", 0o640)
    os.chown(path, -1, 54321)
    with pytest.raises(SecretFileError, match=r"chmod 600 \S+$"):
        open_private(path, allow_group=False)
    with pytest.raises(SecretFileError, match=r"chmod 600 \S+$"):
        open_private(path, allow_group=True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes a file of root's")
def test_a_file_of_root_is_accepted(data: Path, foreign_uid: int) -> None:
    assert foreign_uid != 0
    os.close(open_private(_file(data, b"x")))


def test_a_missing_file_is_named(data: Path) -> None:
    with pytest.raises(InputMissingError, match=f"there is no file {data / 'absent'}"):
        open_private(data / "absent")


def test_a_symbolic_link_is_not_followed(data: Path) -> None:
    (data / "link").symlink_to(_file(data, b"x"))
    with pytest.raises(SecretFileError, match="symbolic link"):
        open_private(data / "link")


def test_a_fifo_is_refused_and_does_not_hang(data: Path) -> None:
    os.mkfifo(data / "fifo", 0o600)
    with pytest.raises(SecretFileError, match="not a regular file"):
        open_private(data / "fifo")


def test_a_directory_is_no_secret_file(data: Path) -> None:
    with pytest.raises(SecretFileError, match="not a regular file"):
        open_private(data)


def test_a_socket_is_no_secret_file(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(FileAccessError, match="cannot read"):
            open_private(Path("socket"))


def test_a_file_this_user_may_not_read_is_refused_with_what_mends_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SecretFileError, match="permission denied; run this as its owner"):
        open_private(data / "secret")


def _as_seen(monkeypatch: pytest.MonkeyPatch, *, mode: int, owner: int, group: int, euid: int) -> None:
    fstat = os.fstat

    def seen(descriptor: int) -> os.stat_result:
        fields = list(fstat(descriptor))
        fields[0], fields[4], fields[5] = stat.S_IFREG | mode, owner, group
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", seen)
    monkeypatch.setattr(os, "geteuid", lambda: euid)


def test_a_systemd_credential_is_readable_although_its_acl_shows_as_a_group_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "passphrase"
    path.write_bytes(b"secret\n")
    _as_seen(monkeypatch, mode=0o440, owner=0, group=0, euid=1000)
    os.close(open_private(path))


@pytest.mark.parametrize(
    ("mode", "owner", "group", "euid"),
    [(0o440, 1000, 0, 1000), (0o440, 0, 1000, 1000), (0o444, 0, 0, 1000), (0o460, 0, 0, 1000), (0o440, 0, 0, 0)],
)
def test_a_group_permission_is_refused_anywhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, owner: int, group: int, euid: int
) -> None:
    path = tmp_path / "passphrase"
    path.write_bytes(b"secret\n")
    _as_seen(monkeypatch, mode=mode, owner=owner, group=group, euid=euid)
    with pytest.raises(SecretFileError, match="chmod 600"):
        open_private(path)
