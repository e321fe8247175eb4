"""No token, passphrase, key or plaintext in what the programs say, or in what others can see of their processes.

Every way a request, a start or a command can fail is gone through with canaries in the place of secrets. They are then
looked for, in every form, in the logs, on standard error, in command lines and in environments.
"""

from __future__ import annotations

import io
import logging
import secrets
import traceback
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, cast

import pytest

import kms
from kms.core.derive import KdfParameters
from kms.core.envelope import CommittingKey, EnvelopeKey
from kms.core.kek import Kek
from kms.core.policy import AllowAll, Plane
from kms.core.secret import Secret
from kms.errors import AuthFailedError, WireError
from kms.server.config import LOG_FORMATS
from kms.service.authentication import Authenticator
from kms.service.handlers import Handlers
from kms.service.pipeline import RequestPipeline
from kms.service.served import Peer
from kms.storage.file import initialise
from kms.storage.lock import KeystoreLock
from kms.wire import messages
from kms_tests.integration.processes import Machine, Outcome, Server, Wire, eventually
from kms_tests.secrets.canaries import forms, leaked, text
from kms_tests.secrets.memory import Launcher, true_keys

WIRE_CODES: Final = {
    "AuthFailed",
    "Unauthorized",
    "InvalidRequest",
    "DecryptionFailed",
    "FrameTooLarge",
    "InternalError",
    "Unavailable",
    "Throttled",
    "LimitExceeded",
}
LIMITS: Final = {"Throttled", "LimitExceeded"}
"""The codes for a principal of a file."""
PLAINTEXT: Final = text("plaintext")
API_TOKEN: Final = text("api-token")
ADMIN_TOKEN: Final = text("admin-token")
WRONG_TOKEN: Final = text("wrong-token")
LIMITED_TOKEN: Final = text("limited-token")
PASSPHRASE: Final = text("passphrase")
WRONG_PASSPHRASE: Final = text("wrong-passphrase")

NO_KEYS: Final = cast(Any, None)
"""In the place of a seam that is not used."""

WITH_A_BUG_AND_A_POLICY: Final = """
import sys
from kms.core.policy import AllowAll
from kms.service.handlers import Handlers
def rotate(self, request, caller):
    raise RuntimeError(f"{request.token} {request!r}")
async def disable(self, request, caller):
    try:
        raise KeyError(request.token)
    except KeyError as error:
        raise ValueError(vars(sys.modules["kms.wire.messages"]), request.token) from error
def health(self, request):
    raise ExceptionGroup(request.token, [RuntimeError(request.token)])
Handlers.rotate_key_group, Handlers.disable_version, Handlers.health = rotate, disable, health
AllowAll.allows = lambda self, principal, operation, group, aad: group != "forbidden"
from kms.cli.server import main
sys.exit(main())
"""
LOGS_TOO_MUCH: Final = """
import logging, sys
from kms.service import pipeline
decode = pipeline.decode_request
def chatty(line):
    logging.getLogger("kms").info("%s", line)
    return decode(line)
pipeline.decode_request = chatty
from kms.cli.server import main
sys.exit(main())
"""


@dataclass
class Watch:
    """What was seen of the programs, and what must not be in it."""

    canaries: dict[str, bytes]
    places: dict[str, bytes] = field(default_factory=dict)
    codes: set[str] = field(default_factory=set)

    def look_at(self, server: Server) -> None:
        process = Path("/proc") / str(server.pid)
        for name in ("cmdline", "environ", "comm", "status"):
            self.places[name] = (process / name).read_bytes()
        children = [(task / "children").read_text(encoding="ascii") for task in (process / "task").iterdir()]
        assert not any(children), "the server has a child, which has an environment of its own"
        self.places["the server's log"] = server.stderr.encode()

    def ask(self, wire: Wire, **request: Any) -> dict[str, Any]:
        """Ask; of a refusal the reply is a place too, since it may not quote what it refuses."""
        reply = wire.ask(**request)
        self.heard(reply)
        return reply

    def heard(self, reply: Mapping[str, Any]) -> None:
        if reply["status"] == "error":
            self.codes.add(reply["errorCode"])
            self.places[f"reply {len(self.places)}"] = repr(reply).encode()

    def assert_nothing_leaked(self) -> None:
        assert leaked(self.canaries, self.places) == set()


def base64(value: str) -> str:
    return b64encode(value.encode()).decode()


@pytest.fixture(scope="module")
def canary_template() -> Iterator[Machine]:
    """A data directory whose every secret is a canary, to be copied."""
    machine = Machine()
    try:
        made = machine.admin("init", environment={"MINIKMS_PASSPHRASE": PASSPHRASE})
        assert made.status == 0, made.stderr
        (machine.data / "api.token").write_text(API_TOKEN, encoding="ascii")
        (machine.data / "admin.token").write_text(ADMIN_TOKEN, encoding="ascii")
        yield machine
    finally:
        machine.dispose()


def copy_of(template: Machine) -> Machine:
    machine = Machine(template.data)
    machine.environment["MINIKMS_PASSPHRASE"] = PASSPHRASE
    return machine


@pytest.fixture
def secret_machine(canary_template: Machine) -> Iterator[Machine]:
    """A machine whose every secret is a canary."""
    machine = copy_of(canary_template)
    yield machine
    machine.dispose()


@pytest.fixture
def watch(canary_template: Machine) -> Watch:
    words = (PLAINTEXT, API_TOKEN, ADMIN_TOKEN, WRONG_TOKEN, LIMITED_TOKEN, PASSPHRASE, WRONG_PASSPHRASE)
    return Watch({word: word.encode() for word in words} | true_keys(canary_template.keystore, PASSPHRASE))


def go_through_every_refusal(watch: Watch, server: Server) -> None:
    """Requests that fail in every way there is, each with canaries wherever a secret can stand."""
    plain, admin = base64(PLAINTEXT), {"token": ADMIN_TOKEN, "keyId": "default"}
    with server.tcp() as wire:
        for request in (
            {"type": "Encrypt", "token": WRONG_TOKEN, "plaintext": plain},
            {"type": "RotateKeyGroup", "token": API_TOKEN, "keyId": "default"},
            {"type": "Encrypt", "token": ADMIN_TOKEN, "plaintext": plain},
            {"type": "Encrypt", "plaintext": plain},
            {"type": "Encrypt", "token": [API_TOKEN], "plaintext": plain},
            {"type": "Encrypt", "token": API_TOKEN, "plaintext": PLAINTEXT},
            {"type": "Encrypt", "token": API_TOKEN, "plaintext": [plain]},
            {"type": "Encrypt", "token": API_TOKEN, "plaintext": plain, "aad": "%"},
            {"type": "Encrypt", "token": API_TOKEN, "plaintext": plain, "keyId": 5},
            {"type": "Encrypt", "token": API_TOKEN, "plaintext": plain, "keyId": "absent"},
            {"type": "Encrypt", "token": API_TOKEN, "plaintext": plain, "keyId": "forbidden"},
            {"type": PLAINTEXT, "token": API_TOKEN},
            {"type": None, "token": API_TOKEN, "plaintext": plain},
            {"token": API_TOKEN, "plaintext": plain},
            {"type": "Decrypt", "token": API_TOKEN, "ciphertext": plain},
            {"type": "Decrypt", "token": API_TOKEN, "ciphertext": PLAINTEXT},
            {"type": "ReEncrypt", "token": API_TOKEN, "ciphertext": plain, "keyId": "default"},
            {"type": "DestroyVersion", **admin, "version": 1},
            {"type": "DestroyVersion", **admin, "version": PLAINTEXT},
            {"type": "DestroyVersion", **admin, "version": 99},
            {"type": "CreateKeyGroup", **admin},
            {"type": "RotateKeyGroup", "token": ADMIN_TOKEN, "keyId": " "},
            # The bugs, where there are any.
            {"type": "RotateKeyGroup", **admin},
            {"type": "DisableVersion", **admin, "version": 1},
            {"type": "Health", "token": API_TOKEN},
        ):
            watch.ask(wire, **request)
        for line in (PLAINTEXT.encode(), b'{"type":"Encrypt","token":"' + API_TOKEN.encode(), b"\xff" + PLAINTEXT.encode()):
            wire.sock.sendall(line + b"\n")
            watch.heard(wire.reply())
    with server.unix() as wire:
        sealed = wire.ask(type="Encrypt", token=API_TOKEN, plaintext=plain)["ciphertext"]
        assert wire.ask(type="Decrypt", token=API_TOKEN, ciphertext=sealed)["plaintext"] == plain
        watch.ask(wire, type="Decrypt", token=API_TOKEN, ciphertext=sealed, aad="AAAA")
        data_key = wire.ask(type="GenerateDataKey", token=API_TOKEN)["plaintextDataKey"]
        watch.canaries["data key"] = b64decode(data_key)
        wire.sock.sendall(b'{"token":"' + API_TOKEN.encode() + b'","plaintext":"' + base64(PLAINTEXT * 30000).encode())
        watch.heard(wire.reply())


def go_through_the_limits(watch: Watch, server: Server) -> None:
    """What a principal is told that may make no key group, and ask one thing in a quarter of an hour."""
    with server.tcp() as wire:
        for _ in range(2):
            watch.ask(wire, type="CreateKeyGroup", token=LIMITED_TOKEN, keyId="made")


LIMITED: Final = f"""
[principals.limited]
token_sha256 = ["{sha256(LIMITED_TOKEN.encode()).hexdigest()}"]
[[principals.limited.allow]]
groups = ["*"]
operations = ["CreateKeyGroup"]
[principals.limited.limits]
requests_per_second = 0.001
groups = 0
"""


def go_through_what_is_not_on_record(watch: Watch, server: Server) -> None:
    """The audit log of all that went before, and requests once it cannot be written."""
    log = server.machine.data / "audit.log"
    watch.places["the audit log"] = log.read_bytes()
    assert b'"operation":"ReEncrypt"' in watch.places["the audit log"]
    log.unlink()
    eventually("it is noticed", lambda: "cannot be written: its file was removed" in server.stderr)
    with server.unix() as wire:
        watch.ask(wire, type="Encrypt", token=API_TOKEN, plaintext=base64(PLAINTEXT))
        watch.ask(wire, type="RotateKeyGroup", token=ADMIN_TOKEN, keyId="default")


every_format = pytest.mark.parametrize("log_format", LOG_FORMATS)


@every_format
def test_a_server_says_no_secret_whatever_it_is_asked(secret_machine: Machine, watch: Watch, log_format: str) -> None:
    log, principals = secret_machine.data / "audit.log", secret_machine.data / "principals.toml"
    principals.touch(0o600)
    principals.write_text(LIMITED, encoding="ascii")
    server = secret_machine.start("--log-format", log_format, "--audit-log", str(log))
    go_through_every_refusal(watch, server)
    go_through_the_limits(watch, server)
    go_through_what_is_not_on_record(watch, server)
    watch.look_at(server)
    assert watch.codes == WIRE_CODES - {"Unauthorized", "InternalError"}
    watch.assert_nothing_leaked()


@every_format
def test_a_server_with_bugs_and_a_strict_policy_says_no_secret_either(
    secret_machine: Machine, watch: Watch, log_format: str
) -> None:
    launcher = Launcher(secret_machine, WITH_A_BUG_AND_A_POLICY)
    log = secret_machine.data / "audit.log"
    with launcher.start("--tcp-port=0", f"--log-format={log_format}", f"--audit-log={log}") as process:
        server = launcher.server(process)
        go_through_every_refusal(watch, server)
        go_through_what_is_not_on_record(watch, server)
        # The launcher's own text stands in the command line; it has no canary.
        watch.look_at(server)
    assert watch.codes == WIRE_CODES - LIMITS
    for kind in ("RuntimeError", "ValueError"):
        assert kind in server.stderr, "the log does not tell what broke"
    watch.assert_nothing_leaked()


def test_a_server_that_logs_its_requests_is_caught(secret_machine: Machine, watch: Watch) -> None:
    launcher = Launcher(secret_machine, LOGS_TOO_MUCH)
    with launcher.start("--tcp-port=0") as process:
        server = launcher.server(process)
        go_through_every_refusal(watch, server)
        watch.look_at(server)
    found = leaked(watch.canaries, watch.places)
    assert {name for name, _ in found} >= {PLAINTEXT, API_TOKEN, ADMIN_TOKEN, WRONG_TOKEN}
    assert {where for _, where in found} == {"the server's log"}


def test_secrets_in_the_environment_are_not_there_once_it_has_started(secret_machine: Machine, watch: Watch) -> None:
    server = secret_machine.start(environment={"MINIKMS_API_TOKEN": API_TOKEN, "MINIKMS_ADMIN_TOKEN": ADMIN_TOKEN})
    watch.look_at(server)
    assert b"XDG_DATA_HOME" in watch.places["environ"], "this is not the environment"
    watch.assert_nothing_leaked()


Failure = tuple[str, list[str], dict[str, str | None]]
"""A program, its arguments, and what is different in its environment."""

FAILING_COMMANDS: Final[dict[str, Failure]] = {
    "server: wrong passphrase": ("server", [], {"MINIKMS_PASSPHRASE": WRONG_PASSPHRASE}),
    "server: no passphrase": ("server", [], {"MINIKMS_PASSPHRASE": None}),
    "server: passphrase too long": ("server", [], {"MINIKMS_PASSPHRASE": PASSPHRASE * 200}),
    "server: the same token twice": ("server", [], {"MINIKMS_API_TOKEN": API_TOKEN, "MINIKMS_ADMIN_TOKEN": API_TOKEN}),
    "server: no number": ("server", ["--max-connections=x"], {}),
    "server: number out of bounds": ("server", [], {"MINIKMS_IDLE_TIMEOUT_MS": "0"}),
    "server: no way in": ("server", ["--no-tcp", "--no-unix"], {}),
    "server: unknown flag": ("server", ["--no-such-flag"], {}),
    "server: passphrase file is missing": ("server", ["--passphrase-file=/absent"], {"MINIKMS_PASSPHRASE": None}),
    "server: passphrase file is open": ("server", ["--passphrase-file=open"], {"MINIKMS_PASSPHRASE": None}),
    "server: socket's path too long": ("server", [f"--unix-socket=/{'x' * 200}"], {}),
    "admin: wrong passphrase": (
        "admin",
        ["change-passphrase"],
        {"MINIKMS_PASSPHRASE": WRONG_PASSPHRASE, "MINIKMS_NEW_PASSPHRASE": PASSPHRASE},
    ),
    "admin: new passphrase is missing": ("admin", ["change-passphrase"], {"MINIKMS_NEW_PASSPHRASE": None}),
    "admin: init twice": ("admin", ["init"], {}),
    "admin: wrong token": ("admin", ["list-keys"], {"MINIKMS_ADMIN_TOKEN": WRONG_TOKEN}),
    "admin: the other token": ("admin", ["rotate-key", "--key=default"], {"MINIKMS_ADMIN_TOKEN": API_TOKEN}),
    "admin: refused": ("admin", ["destroy-version", "--key=default", "--version=1", "--yes"], {}),
    "admin: unknown command": ("admin", ["no-such-command"], {"MINIKMS_ADMIN_TOKEN": ADMIN_TOKEN}),
    "client: wrong token": ("client", ["health"], {"MINIKMS_API_TOKEN": WRONG_TOKEN}),
    "client: token that is no header": ("client", ["health"], {"MINIKMS_API_TOKEN": WRONG_TOKEN + "\x7f\xff"}),
    "client: no such group": ("client", ["encrypt", "--in=plain", "--key=absent"], {}),
    "client: not a ciphertext": ("client", ["decrypt", "--in=plain"], {}),
    "client: not a container": ("client", ["decrypt-file", "--in=plain", "--out=out"], {}),
    "client: an altered container": ("client", ["decrypt-file", "--in=altered", "--out=out"], {}),
    "client: output is a directory": ("client", ["decrypt-file", "--in=container", "--out=/"], {}),
    "client: unreachable": ("client", ["--tcp=127.0.0.1:1", "encrypt", "--in=plain"], {}),
    "client: not loopback": ("client", ["--tcp=192.0.2.1:1", "health"], {}),
    "client: unquoted text": ("client", ["encrypt", "--text", "a", *PLAINTEXT.split("-"), PLAINTEXT], {}),
}


@pytest.fixture(scope="module")
def offline(canary_template: Machine) -> Iterator[Machine]:
    """Where no server runs, nor comes to: each command fails, and leaves all as it was."""
    machine = copy_of(canary_template)
    machine.file("open", PASSPHRASE.encode()).chmod(0o644)
    yield machine
    machine.dispose()


@pytest.fixture(scope="module")
def online(canary_template: Machine) -> Iterator[Server]:
    """A server, and beside it files for a client to fail on."""
    machine = copy_of(canary_template)
    server = machine.start()
    plain, container = machine.file("plain", PLAINTEXT.encode()), machine.root / "container"
    made = server.client("encrypt-file", "--in", str(plain), "--out", str(container))
    assert made.status == 0, made.stderr
    machine.file("altered", container.read_bytes()[:-1] + b"\0")
    yield server
    machine.dispose()


def fail(failure: Failure, offline: Machine, online: Server) -> Outcome:
    program, arguments, environment = failure
    if program == "server":
        return offline.refused_start(*arguments, environment=environment)
    if arguments[0] in ("init", "change-passphrase"):
        return offline.run(program, *arguments, environment=environment)
    place = [] if arguments[0].startswith("--tcp") else ["--unix", str(online.socket)]
    return online.machine.run(program, *place, *arguments, environment=environment)


@pytest.mark.parametrize("failure", FAILING_COMMANDS.values(), ids=FAILING_COMMANDS)
def test_a_command_that_fails_says_no_secret(watch: Watch, offline: Machine, online: Server, failure: Failure) -> None:
    outcome = fail(failure, offline, online)
    assert outcome.status != 0
    assert "Traceback" not in outcome.stderr
    watch.places |= {"standard error": outcome.stderr.encode(), "standard output": outcome.stdout}
    watch.assert_nothing_leaked()


def test_a_server_on_an_altered_keystore_says_no_secret(secret_machine: Machine, watch: Watch) -> None:
    content = secret_machine.keystore.read_text(encoding="utf-8")
    secret_machine.keystore.write_text(content.replace('"ACTIVE"', '"ENABLED"', 1), encoding="utf-8")
    outcome = secret_machine.refused_start()
    assert outcome.status == 65
    watch.places["standard error"] = outcome.stderr.encode()
    watch.assert_nothing_leaked()


def secret_objects(directory: Path) -> Iterator[tuple[str, object]]:
    """One of each kind of object that holds a secret, with the canaries in it."""
    word = PLAINTEXT.encode()
    yield "Secret", Secret(bytearray(word))
    yield "EnvelopeKey", EnvelopeKey(Secret(bytearray(KEY)))
    yield "Kek", Kek(Secret(bytearray(KEY)))
    yield "CommittingKey", CommittingKey(Secret(bytearray(KEY)))
    yield "DataKey", kms.DataKey(word, b"wrapped")
    yield "Encrypt", messages.Encrypt(plaintext=word, token=API_TOKEN, aad=word)
    yield "Decrypt", messages.Decrypt(ciphertext=word, token=API_TOKEN)
    yield "CreateKeyGroup", messages.CreateKeyGroup(key_id="billing", token=ADMIN_TOKEN)
    yield "DataKeyReply", messages.DataKeyReply(word, b"wrapped")
    yield "PlaintextReply", messages.PlaintextReply(word)
    authenticator = Authenticator(Secret(bytearray(API_TOKEN.encode())), Secret(bytearray(ADMIN_TOKEN.encode())))
    yield "Authenticator", authenticator
    handlers = Handlers(NO_KEYS, NO_KEYS, NO_KEYS, random=lambda _: KEY)
    yield "Handlers", handlers
    yield "RequestPipeline", RequestPipeline(handlers, authenticator, AllowAll())
    parameters = KdfParameters(memory_kib=8, iterations=1, parallelism=1)
    passphrase = Secret(bytearray(PASSPHRASE.encode()))
    with KeystoreLock(directory / "keystore.json") as lock:
        store, ring = initialise(lock, passphrase, now=1, parameters=parameters, random=lambda _: Secret(bytearray(KEY)))
        yield "KeystoreLock", lock
    yield "Keystore", store
    yield "Keyring", ring


KEY: Final = secrets.token_bytes(32)
IN_PROCESS: Final = {word: word.encode() for word in (PLAINTEXT, API_TOKEN, ADMIN_TOKEN, WRONG_TOKEN, PASSPHRASE)} | {
    "KEK": KEY
}


def test_no_repr_tells_a_secret(data: Path) -> None:
    places = {name: (repr(one) + str(one) + f"{one!a}").encode() for name, one in secret_objects(data)}
    assert all(places.values())
    assert leaked(IN_PROCESS, places) == set()


def test_the_traceback_of_a_refusal_tells_no_secret() -> None:
    told: dict[str, bytes] = {}
    lines = [
        f'{{"type":"Encrypt","token":"{API_TOKEN}","plaintext":"{PLAINTEXT}"}}',
        f'{{"type":"{PLAINTEXT}","token":"{API_TOKEN}"}}',
        f'{{"type":"DestroyVersion","token":"{ADMIN_TOKEN}","keyId":"k","version":"{PLAINTEXT}"}}',
        PLAINTEXT,
        f'{{"token":"{API_TOKEN}',
    ]
    for number, line in enumerate(lines):
        with pytest.raises(messages.UndecodableRequestError) as caught:
            messages.decode_request(line.encode())
        told[f"line {number}"] = "".join(traceback.format_exception(caught.value)).encode()
        told[f"reason {number}"] = "".join(traceback.format_exception(caught.value.reason)).encode()
    authenticator = Authenticator(Secret(bytearray(API_TOKEN.encode())), Secret(bytearray(ADMIN_TOKEN.encode())))
    with pytest.raises(AuthFailedError) as refused:
        authenticator.authenticate(Plane.DATA, WRONG_TOKEN, Peer(1, "unix"))
    told["authentication"] = "".join(traceback.format_exception(refused.value)).encode()
    assert leaked(IN_PROCESS, told) == set()


def test_each_form_of_a_canary_is_found_wherever_it_stands() -> None:
    secret = secrets.token_bytes(20)
    for before in range(4):
        whole = secrets.token_bytes(before) + secret + secrets.token_bytes(5)
        for encoded in (whole, whole.hex().encode(), whole.hex().upper().encode(), b64encode(whole)):
            assert leaked({"it": secret}, {"here": encoded}) == {("it", "here")}, before
    assert leaked({"it": secret}, {"here": secrets.token_bytes(1000)}) == set()
    assert len(set(forms(secret))) >= 6


def test_the_codes_gone_through_are_all_there_are() -> None:
    def codes(kind: type[WireError]) -> Iterator[str]:
        for child in kind.__subclasses__():
            yield child.code
            yield from codes(child)

    assert set(codes(WireError)) == WIRE_CODES


def test_a_bug_is_logged_without_its_text() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("kms").addHandler(handler)
    try:

        class Broken(Handlers):
            def health(self, request: messages.Health) -> messages.Reply:
                raise RuntimeError(API_TOKEN)

        authenticator = Authenticator(Secret(bytearray(API_TOKEN.encode())), Secret(bytearray(ADMIN_TOKEN.encode())))
        pipeline = RequestPipeline(Broken(NO_KEYS, NO_KEYS, NO_KEYS, random=bytes), authenticator, AllowAll())
        reply = pipeline.session(Peer(1, "unix")).serve(f'{{"type":"Health","token":"{API_TOKEN}"}}'.encode())
    finally:
        logging.getLogger("kms").removeHandler(handler)
    assert "RuntimeError" in stream.getvalue()
    assert isinstance(reply, bytes)
    assert leaked(IN_PROCESS, {"log": stream.getvalue().encode(), "reply": reply}) == set()
