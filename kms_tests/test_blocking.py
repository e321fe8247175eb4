"""The blocking client against a server that does what each test needs."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kms.client.blocking import KmsClient
from kms.client.protocol import DataKey
from kms.core.secret import Secret
from kms.errors import (
    AuthFailedError,
    ConfigError,
    DecryptionFailedError,
    FrameTooLargeError,
    OutcomeUnknownError,
    ProtocolError,
    ServerUnreachableError,
    ThrottledError,
)
from kms.limits import THROTTLE_PATIENCE

OK = b'{"status":"ok","detail":"ok"}\n'
TOO_LARGE = b'{"status":"error","errorCode":"FrameTooLarge","message":"too large"}\n'


def answer(line: bytes | bytearray) -> bytes:
    """A server whose encryption is reversal."""
    request = json.loads(line)
    group = {"keyId": request.get("keyId", "g"), "activeVersion": 1, "versions": []}
    reply: dict[str, Any]
    if request["token"] != "token":
        reply = {"status": "error", "errorCode": "AuthFailed", "message": "invalid API token"}
    elif request["type"] in ("Encrypt", "Decrypt", "ReEncrypt"):
        given = b64decode(request.get("plaintext") or request.get("ciphertext") or "")
        if given == b"bad":
            reply = {"status": "error", "errorCode": "DecryptionFailed", "message": "decryption failed"}
        else:
            name = "plaintext" if request["type"] == "Decrypt" else "ciphertext"
            reply = {"status": "ok", name: b64encode(given[::-1]).decode()}
    elif request["type"] == "GenerateDataKey":
        reply = {"status": "ok", "plaintextDataKey": "cA==", "wrappedDataKey": "dw=="}
    elif request["type"] == "ListKeyGroups":
        reply = {"status": "ok", "keyGroups": [group] * (2 if request["usage"] else 1)}
    elif request["type"] in ("CreateKeyGroup", "RotateKeyGroup", "DescribeKeyGroup"):
        reply = {"status": "ok", "keyGroup": group}
    else:
        reply = {"status": "ok", "detail": f"{request['type']} {request.get('version')}"}
        if request.get("forSeconds"):
            reply["untilEpochSec"] = request["forSeconds"]
    return json.dumps(reply).encode() + b"\n"


THROTTLED = b'{"status":"error","errorCode":"Throttled","message":"too often","retryAfterMs":5000}\n'


def page(line: bytes | bytearray) -> bytes:
    """The answer to a request for a page of the five groups from a to e."""
    request = json.loads(line)
    begin = int(request.get("nextToken") or 0)
    end = begin + request["limit"]
    groups = [{"keyId": name, "activeVersion": 1, "versions": []} for name in "abcde"[begin:end]]
    reply = {"status": "ok", "keyGroups": groups} | ({"nextToken": str(end)} if end < 5 else {})
    return json.dumps(reply).encode() + b"\n"


def serve_lines(link: socket.socket) -> None:
    with link.makefile("rb") as lines:
        for line in lines:
            link.sendall(answer(line))


@contextmanager
def connected(
    serve: Callable[[socket.socket], None] = serve_lines, *, token: str = "token", timeout: float = 10.0
) -> Iterator[KmsClient]:
    near, far = socket.socketpair()

    def run() -> None:
        with far:
            serve(far)

    thread = threading.Thread(target=run)
    thread.start()
    with KmsClient(near, "test", token=token, timeout=timeout) as client:
        yield client
    thread.join(10)
    assert not thread.is_alive()


def test_each_operation_answers_with_its_result() -> None:
    with connected() as client:
        assert client.health() == "Health None"
        assert client.generate_data_key("g") == DataKey(b"p", b"w")
        assert client.encrypt(b"abc", key_id="g", aad=b"x") == b"cba"
        assert client.decrypt(b"cba") == b"abc"
        assert client.reencrypt(b"abc", "g") == b"cba"
        assert client.encrypt_many([b"ab", b"cd"]) == [b"ba", b"dc"]
        assert client.decrypt_many(iter([b"ab", b"cd"])) == [b"ba", b"dc"]
        assert client.encrypt_many([]) == []
        assert client.create_key_group("g").key_id == "g"
        assert client.rotate_key_group("g").active_version == 1
        assert [group.active_version for group in client.list_key_groups()] == [1]
        assert len(client.list_key_groups(usage=True)) == 2
        assert client.describe_key_group("g").active_version == 1
        assert client.disable_version("g", 3) == "DisableVersion 3"
        assert client.disable_version("g", 3, for_seconds=60) == "DisableVersion 3"
        assert client.enable_version("g", 3) == "EnableVersion 3"
        assert client.destroy_version("g", 3) == "DestroyVersion 3"


def test_key_groups_are_asked_for_in_pages_as_they_are_needed() -> None:
    asked: list[bytes] = []

    def serve(link: socket.socket) -> None:
        with link.makefile("rb") as lines:
            for line in lines:
                asked.append(line)
                link.sendall(page(line) if b"ListKeyGroups" in line else answer(line))

    with connected(serve) as client:
        groups = client.iter_key_groups(page_size=2)
        assert asked == []
        assert [next(groups).key_id, next(groups).key_id] == ["a", "b"]
        assert len(asked) == 1
        assert client.health() == "Health None"
        assert [group.key_id for group in groups] == ["c", "d", "e"]
        assert len(asked) == 4


def test_a_server_that_knows_no_pages_sends_all_at_once() -> None:
    with connected() as client:
        assert len(list(client.iter_key_groups(usage=True, page_size=1))) == 2


@pytest.mark.parametrize("groups", ["[]", '[{"keyId":"a","activeVersion":1,"versions":[]}]'])
def test_a_list_without_end_is_a_protocol_error(groups: str) -> None:
    def serve(link: socket.socket) -> None:
        with link.makefile("rb") as lines:
            for _ in lines:
                link.sendall(b'{"status":"ok","keyGroups":%b,"nextToken":"again"}\n' % groups.encode())

    with connected(serve) as client, pytest.raises(ProtocolError, match="does not come to an end"):
        list(client.iter_key_groups())


def test_a_throttled_call_is_sent_again_when_the_server_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("kms.client.blocking.time.sleep", slept.append)
    asked: list[bytes] = []

    def serve(link: socket.socket) -> None:
        with link.makefile("rb") as lines:
            for line in lines:
                asked.append(line)
                link.sendall(THROTTLED if len(asked) < 3 else answer(line))

    with connected(serve) as client:
        assert client.health() == "Health None"
    assert slept == [5.0, 5.0]


def test_a_call_that_is_throttled_for_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("kms.client.blocking.time.sleep", slept.append)

    def serve(link: socket.socket) -> None:
        with link.makefile("rb") as lines:
            for _ in lines:
                link.sendall(THROTTLED)

    for timeout, most in ((60.0, THROTTLE_PATIENCE), (7.0, 7.0)):
        with connected(serve, timeout=timeout) as client, pytest.raises(ThrottledError, match="too often"):
            client.health()
        assert most - 5 < sum(slept) <= most
        slept.clear()


def test_a_refusal_is_raised_and_the_connection_stays() -> None:
    with connected(token="wrong") as client:
        for _ in range(2):
            with pytest.raises(AuthFailedError, match="invalid API token"):
                client.health()


def test_an_error_in_one_of_many_is_raised_after_the_others_are_drained() -> None:
    with connected() as client:
        with pytest.raises(DecryptionFailedError):
            client.decrypt_many([b"x", b"bad", *([b"y"] * 500)])
        assert client.decrypt(b"ab") == b"ba"


def gone(link: socket.socket) -> None:
    """A server that ends the connection once it has a request."""
    link.recv(1000)


def quiet(link: socket.socket) -> None:
    """A server that never answers."""
    while link.recv(1000):
        pass


CHANGES: list[Callable[[KmsClient], object]] = [
    lambda client: client.create_key_group("g"),
    lambda client: client.rotate_key_group("g"),
    lambda client: client.disable_version("g", 1),
    lambda client: client.disable_version("g", 1, for_seconds=5),
    lambda client: client.enable_version("g", 1),
    lambda client: client.destroy_version("g", 1),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("serve", [gone, quiet])
def test_the_outcome_of_a_change_is_unknown_when_its_reply_does_not_come(
    change: Callable[[KmsClient], object], serve: Callable[[socket.socket], None]
) -> None:
    with connected(serve, timeout=0.05) as client, pytest.raises(OutcomeUnknownError, match="look before asking again"):
        change(client)


def test_that_of_a_request_which_changes_nothing_is_that_the_server_is_gone() -> None:
    asks: list[Callable[[KmsClient], object]] = [
        lambda client: client.encrypt(b"x"),
        lambda client: client.list_key_groups(),
    ]
    for ask in asks:
        with connected(gone) as client, pytest.raises(ServerUnreachableError, match="connect again"):
            ask(client)


def test_that_of_a_change_which_was_never_sent_is_known() -> None:
    with connected(lambda _: None) as client:
        while not has_ended(client):
            time.sleep(0.001)
        with pytest.raises(ServerUnreachableError, match="the server closed it"):
            client.rotate_key_group("g")


def has_ended(client: KmsClient) -> bool:
    assert client._links._new is not None
    try:
        return client._links._new.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False


def test_a_server_that_says_so_is_not_sure_of_the_outcome_and_the_connection_stays() -> None:
    unsure = b'{"status":"error","errorCode":"Unavailable","message":"not on record yet","outcome":"unknown"}\n'

    def serve(link: socket.socket) -> None:
        with link.makefile("rb") as lines:
            for line in lines:
                link.sendall(unsure if b"Rotate" in line else answer(line))

    with connected(serve) as client:
        with pytest.raises(OutcomeUnknownError, match="not on record yet"):
            client.rotate_key_group("g")
        assert client.health() == "Health None"


def test_a_wrong_type_among_many_is_raised_after_what_is_under_way_and_the_client_stays() -> None:
    with connected() as client:
        with pytest.raises(TypeError, match="plaintext has to be bytes, not str"):
            client.encrypt_many([b"x", b"y", "text"])  # type: ignore[list-item]
        assert client.decrypt(b"ab") == b"ba"


def test_many_requests_do_not_deadlock_with_a_server_that_reads_slowly_and_answers_before_it_reads_on() -> None:
    def slow(link: socket.socket) -> None:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with link.makefile("rb", buffering=4096) as lines:
            for number, line in enumerate(lines):
                if number % 50 == 0:
                    time.sleep(0.01)
                link.sendall(answer(line))

    plaintexts = [bytes([number % 256]) * 30_000 for number in range(200)]
    with connected(slow) as client:
        assert client.encrypt_many(plaintexts) == plaintexts


def test_frame_too_large_is_raised_although_the_server_closes_before_it_has_read_all() -> None:
    def refuse(link: socket.socket) -> None:
        link.recv(1000)
        link.sendall(TOO_LARGE)

    with connected(refuse) as client:
        with pytest.raises(FrameTooLargeError):
            client.encrypt(bytes(5_000_000))
        with pytest.raises(ServerUnreachableError, match="closed"):
            client.health()


@pytest.mark.parametrize("begun", [b"", OK[:-1]])
def test_a_connection_that_ends_without_a_whole_reply_is_unreachable_and_closes_the_client(begun: bytes) -> None:
    def end(link: socket.socket) -> None:
        link.recv(1000)
        link.sendall(begun)

    with connected(end) as client:
        with pytest.raises(ServerUnreachableError, match="is kms-server running"):
            client.health()
        with pytest.raises(ServerUnreachableError, match="is closed"):
            client.health()


def test_a_connection_that_is_reset_is_unreachable() -> None:
    def reset(link: socket.socket) -> None:
        link.recv(1)

    with connected(reset) as client, pytest.raises(ServerUnreachableError, match="broke"):
        client.health()


def test_a_silent_server_times_out_and_closes_the_client() -> None:
    def silent(link: socket.socket) -> None:
        while link.recv(1000):
            pass

    with connected(silent, timeout=0.05) as client:
        with pytest.raises(ServerUnreachableError, match=r"did not answer for 0\.05 s"):
            client.health()
        with pytest.raises(ServerUnreachableError, match="is closed"):
            client.health()


def test_a_reply_that_is_none_closes_the_client() -> None:
    def babble(link: socket.socket) -> None:
        link.recv(1000)
        link.sendall(b"220 smtp ready\r\n")

    with connected(babble) as client:
        with pytest.raises(ProtocolError):
            client.health()
        with pytest.raises(ServerUnreachableError):
            client.health()


def test_an_interrupt_in_the_middle_closes_the_client() -> None:
    def interrupted() -> Iterator[bytes]:
        yield b"x"
        raise KeyboardInterrupt

    with connected() as client:
        with pytest.raises(KeyboardInterrupt):
            client.encrypt_many(interrupted())
        with pytest.raises(ServerUnreachableError):
            client.health()


def test_it_connects_over_tcp_and_unix_sockets(tmp_path: Path) -> None:
    def accept(listener: socket.socket) -> None:
        link, _ = listener.accept()
        with link:
            serve_lines(link)

    path = tmp_path / "s"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        unix.listen()
        threads = [threading.Thread(target=accept, args=(listener,)) for listener in (tcp, unix)]
        for thread in threads:
            thread.start()
        with KmsClient.connect_tcp("127.0.0.1", tcp.getsockname()[1], token=b"token") as client:
            assert client.encrypt(b"ab") == b"ba"
        with KmsClient.connect_unix(path, token=Secret(bytearray(b"token"))) as client:
            assert client.encrypt(b"ab") == b"ba"
            assert "token" not in repr(client)
            assert str(path) in repr(client)
        for thread in threads:
            thread.join(10)


def test_no_server_is_unreachable_with_a_remedy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ServerUnreachableError, match=rf"127\.0\.0\.1:{port}: Connection refused; is kms-server running"):
        KmsClient.connect_tcp(port=port, token="t")
    with pytest.raises(ServerUnreachableError, match=r"there is no socket .*; start kms-server, or say where it is"):
        KmsClient.connect_unix(tmp_path / "none", token="t")
    with pytest.raises(ServerUnreachableError, match="too long"):
        KmsClient.connect_unix(tmp_path / ("x" * 200), token="t")


def test_a_bad_token_leaves_no_open_socket(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        with pytest.raises(ConfigError):
            KmsClient.connect_tcp(port=tcp.getsockname()[1], token=b"\xff", server_user="any")
        with pytest.raises(ConfigError):
            KmsClient.connect_unix(tmp_path / "s", token=b"\xff")


def test_the_blocking_client_does_not_import_trio() -> None:
    program = "import sys, kms; kms.KmsClient; import kms.client.files; sys.exit('trio' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
