"""The two listeners: loopback only, private from the first instant."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

import pytest

from kms.errors import ConfigError, FileAccessError, SecretFileError
from kms.host.private import check_shared_directory
from kms.server.listeners import UnixListener, open_tcp


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "kms.sock"


async def test_TCP_listens_on_127_0_0_1_only_and_port_0_is_any_free_one() -> None:
    listener, port = open_tcp(0)
    with listener.socket:
        assert listener.socket.getsockname() == ("127.0.0.1", port)
        assert port > 0


async def test_a_TCP_port_in_use_is_refused_with_a_remedy() -> None:
    listener, port = open_tcp(0)
    with listener.socket, pytest.raises(ConfigError, match="choose another --tcp-port"):
        open_tcp(port)


async def test_the_socket_is_0600_in_a_directory_of_0700(path: Path) -> None:
    unix = UnixListener(path)
    with unix.listener.socket:
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_the_socket_is_0600_from_the_instant_it_exists(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[int] = []
    bind = socket.socket.bind

    def observed(sock: socket.socket, address: str) -> None:
        masks.append(os.umask(0o177))
        bind(sock, address)

    monkeypatch.setattr(socket.socket, "bind", observed)
    before = os.umask(0o022)
    try:
        unix = UnixListener(path)
        unix.listener.socket.close()
        assert masks == [0o177]
        assert os.umask(0o022) == 0o022, "the umask is put back"
    finally:
        os.umask(before)


@pytest.fixture
def shared(path: Path) -> Path:
    """A socket's path in a directory that our own group may enter."""
    path.parent.mkdir()
    path.parent.chmod(0o710)
    os.chown(path.parent, -1, os.getegid())
    return path


async def test_for_a_group_the_socket_is_0660_and_that_groups(shared: Path) -> None:
    unix = UnixListener(shared, os.getegid())
    with unix.listener.socket:
        state = shared.lstat()
        assert (stat.S_IMODE(state.st_mode), state.st_gid) == (0o660, os.getegid())
        assert stat.S_IMODE(shared.with_name("kms.sock.lock").stat().st_mode) == 0o600
    unix.remove()
    assert not shared.exists()


async def test_for_a_group_the_socket_is_opened_to_it_before_it_listens_and_after_it_has_its_group(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, int]] = []
    listen = socket.socket.listen
    shared.parent.chmod(0o711)
    other = os.getegid() + 1

    def observed_chown(path: Path, uid: int, gid: int) -> None:
        assert (path, uid, gid) == (shared, -1, other)
        steps.append(("chown", stat.S_IMODE(shared.lstat().st_mode)))

    def observed_listen(sock: socket.socket, backlog: int) -> None:
        steps.append(("listen", stat.S_IMODE(shared.lstat().st_mode)))
        listen(sock, backlog)

    monkeypatch.setattr(os, "chown", observed_chown)
    monkeypatch.setattr(socket.socket, "listen", observed_listen)
    UnixListener(shared, other).listener.socket.close()
    assert steps == [("chown", 0o600), ("listen", 0o660)]


@pytest.mark.parametrize(
    ("mode", "complaint"),
    [
        (0o700, "the group .* may not enter"),
        (0o770, "other users may write"),
        (0o712, "other users may write"),
        (0o777, "other users may write"),
    ],
)
async def test_a_directory_that_the_group_may_not_enter_or_others_may_write_to_is_refused(
    shared: Path, mode: int, complaint: str
) -> None:
    shared.parent.chmod(mode)
    with pytest.raises(SecretFileError, match=f"{complaint} .*{shared.parent}; .*install -d -m 0710 -g {os.getegid()}"):
        UnixListener(shared, os.getegid())


async def test_a_directory_of_another_group_has_to_let_everybody_in(shared: Path) -> None:
    gid = os.getegid() + 1
    with pytest.raises(SecretFileError, match=f"the group {gid} may not enter"):
        check_shared_directory(shared.parent, gid)
    shared.parent.chmod(0o711)
    check_shared_directory(shared.parent, gid)


async def test_a_shared_directory_of_another_user_is_refused(shared: Path, foreign_uid: int) -> None:
    if shared.parent.stat().st_uid == 0:
        os.chown(shared.parent, foreign_uid + 1, -1)
    with pytest.raises(SecretFileError, match="belongs to another user"):
        UnixListener(shared, os.getegid())


async def test_a_shared_directory_is_not_made(path: Path) -> None:
    with pytest.raises(FileAccessError, match=r"there is no directory .*; .*made with: install -d"):
        UnixListener(path, os.getegid())
    with pytest.raises(FileAccessError, match="cannot look at the directory"):
        check_shared_directory(Path("/" + "x" * 300), os.getegid())


async def test_a_group_that_this_user_is_not_in_cannot_be_given_the_socket(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, uid: int, gid: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    shared.parent.chmod(0o711)
    with pytest.raises(ConfigError, match=r"--unix-socket-group: .* add this user to the group"):
        UnixListener(shared, os.getegid() + 1)
    assert not shared.exists()
    UnixListener(shared, os.getegid()).listener.socket.close()


def leave_stale(path: Path) -> None:
    """What a server that was killed leaves: a socket file that nobody listens on, and nobody's lock."""
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


async def test_a_stale_file_of_a_dead_server_is_removed(path: Path) -> None:
    leave_stale(path)
    unix = UnixListener(path)
    with unix.listener.socket, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


async def test_of_two_servers_that_find_one_stale_file_the_slower_does_not_remove_the_fasters(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_stale(path)
    unlink = Path.unlink
    refusals: list[str] = []

    def meanwhile(stale: Path) -> None:
        # The faster has found the file stale; before it acts, another server starts.
        monkeypatch.setattr(Path, "unlink", unlink)
        with pytest.raises(ConfigError) as refused:
            UnixListener(path)
        refusals.append(str(refused.value))
        stale.unlink()

    monkeypatch.setattr(Path, "unlink", meanwhile)
    unix = UnixListener(path)
    with unix.listener.socket, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert refusals == [f"another server, process {os.getpid()}, has {path}; stop it, or choose another --unix-socket"]


async def test_a_server_that_ended_or_failed_to_start_leaves_its_place_to_the_next(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_text("in the way")
    for _ in range(2):
        with pytest.raises(ConfigError, match="not a socket"):
            UnixListener(path)
    path.unlink()
    for _ in range(2):
        unix = UnixListener(path)
        unix.listener.socket.close()
        unix.remove()
    assert stat.S_IMODE(path.with_name("kms.sock.lock").stat().st_mode) == 0o600


async def test_a_lock_file_that_cannot_be_taken_is_an_error_with_its_reason(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.with_name("kms.sock.lock").symlink_to("elsewhere")
    with pytest.raises(FileAccessError, match=r"cannot lock .*kms\.sock\.lock"):
        UnixListener(path)


async def test_a_live_servers_socket_is_never_removed(path: Path) -> None:
    unix = UnixListener(path)
    with unix.listener.socket:
        with pytest.raises(ConfigError, match=f"another server, process {os.getpid()}, has"):
            UnixListener(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


async def test_the_socket_of_a_server_that_holds_no_lock_is_never_removed_either(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ConfigError, match="another server is listening"):
            UnixListener(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


async def test_what_is_not_a_socket_is_never_removed(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        UnixListener(path)
    assert path.read_text() == "precious"


async def test_a_directory_others_may_enter_is_refused(path: Path) -> None:
    path.parent.mkdir(mode=0o755)
    with pytest.raises(SecretFileError, match="chmod 700"):
        UnixListener(path)


async def test_a_socket_that_cannot_be_made_is_an_error_with_its_reason(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(sock: socket.socket, address: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(FileAccessError, match="Permission denied"):
        UnixListener(path)


@pytest.mark.parametrize("another", [False, True])
async def test_remove_takes_only_its_own_file_away(path: Path, another: bool) -> None:
    unix = UnixListener(path)
    unix.listener.socket.close()
    path.unlink()
    if another:
        path.write_text("another's")
    unix.remove()
    assert path.exists() == another


async def test_a_path_too_long_for_a_socket_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--unix-socket.*107"):
        UnixListener(tmp_path / ("x" * 100) / "kms.sock")
    assert not list(tmp_path.iterdir())


async def test_a_stuck_server_with_a_full_backlog_is_still_a_server(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as stuck, contextlib.ExitStack() as clients:
        stuck.bind(str(path))
        stuck.listen(0)
        for _ in range(3):
            client = clients.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                client.connect(str(path))
        with pytest.raises(ConfigError, match="another server"):
            UnixListener(path)
