"""The systemd unit: well-formed, closed, and not so closed that the server could not work.

systemd itself does not run where the tests do. So the unit is checked by systemd's own tools, and the server is run in
what of it can be had without: its environment, credential, notify socket, limits and umask, no capability and no new
privileges. The system calls it then makes are recorded, and held against the unit's filter.
"""

from __future__ import annotations

import grp
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from kms import errors
from kms_tests.integration.processes import DEADLINE, PASSPHRASE, ROOT, Machine, Server, after, eventually, program
from kms_tests.secrets.test_births import stop, tell

UNIT: Final = ROOT / "scripts" / "systemd" / "mini-kms.service"
DROP_IN: Final = ROOT / "scripts" / "systemd" / "tcp.conf"
TEAM: Final = ROOT / "scripts" / "systemd" / "team.conf"
SERVER: Final = "/opt/mini-kms/bin/kms-server"
MOST_EXPOSED: Final = 2.0
REMEDIABLE: Final = {
    errors.EXIT_OK,
    errors.EXIT_REFUSED,
    errors.EXIT_UNREACHABLE,
    errors.EXIT_SYSTEM,
    errors.EXIT_IO,
}
"""Exit statuses that a restart may mend, or that the server never ends with."""


def settings(unit: Path = UNIT) -> dict[str, list[str]]:
    """The unit's settings, each with its values in their order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """A copy of the unit, its server a program that exists."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text(encoding="utf-8").replace(SERVER, sys.executable), encoding="utf-8")
    return copy


@pytest.fixture(params=[(), (DROP_IN,), (TEAM,), (DROP_IN, TEAM)], ids=["alone", "with TCP", "for a team", "with both"])
def either_unit(request: pytest.FixtureRequest, unit: Path) -> Path:
    for drop_in in request.param:
        directory = unit.with_name(f"{unit.name}.d")
        directory.mkdir(exist_ok=True)
        content = drop_in.read_text(encoding="utf-8").replace(SERVER, sys.executable)
        (directory / drop_in.name).write_text(content, encoding="utf-8")
    return unit


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments], capture_output=True, text=True, timeout=DEADLINE, check=False
    )


def complaints(unit: Path) -> str:
    checked = analyze("verify", str(unit))
    return checked.stderr + ("" if checked.returncode == 0 else f"status {checked.returncode}")


def exposure(unit: Path) -> tuple[bool, str]:
    """Whether the unit is closed enough, and systemd's last line on it."""
    checked = analyze("security", "--offline=true", f"--threshold={int(MOST_EXPOSED * 10)}", str(unit))
    assert "exposure level" in checked.stdout, checked.stderr
    return checked.returncode == 0, checked.stdout.splitlines()[-1]


def test_systemd_has_no_complaint(either_unit: Path) -> None:
    assert complaints(either_unit) == ""


def test_systemd_does_complain_about_a_setting_it_does_not_know(unit: Path) -> None:
    unit.write_text(unit.read_text(encoding="utf-8").replace("NoNewPrivileges", "NoNewPrivilege"), encoding="utf-8")
    assert "NoNewPrivilege" in complaints(unit)


def test_the_exposure_is_at_most_2(either_unit: Path) -> None:
    closed, line = exposure(either_unit)
    print(line)
    assert closed, line


def test_an_open_unit_is_found_to_be_exposed(unit: Path) -> None:
    lines = unit.read_text(encoding="utf-8").splitlines(keepends=True)
    open_lines = [line for line in lines if not line.startswith(("SystemCall", "Capability", "Private", "Protect"))]
    unit.write_text("".join(open_lines), encoding="utf-8")
    assert not exposure(unit)[0]


def test_what_a_restart_cannot_mend_is_not_restarted() -> None:
    all_statuses = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    (prevented,) = settings()["RestartPreventExitStatus"]
    # A reader that goes away is one of --help: nobody reads what a service prints.
    assert {int(status) for status in prevented.split()} == all_statuses - REMEDIABLE - {errors.EXIT_BROKEN_PIPE}


def test_each_setting_has_its_reason() -> None:
    """A comment stands above each group of settings; a group ends at a blank line or the next comment."""
    previous = ""
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        if line.startswith("[") or not line:
            previous = ""
            continue
        boilerplate = line.startswith(("Description=", "WantedBy="))
        assert line.startswith("#") or previous or boilerplate, f"no reason is given for {line}"
        previous = line


def test_the_page_explains_the_settings_that_close_the_service() -> None:
    page = (ROOT / "docs" / "systemd.rst").read_text(encoding="utf-8")
    assert str(UNIT.relative_to(ROOT)) in page
    assert str(DROP_IN.relative_to(ROOT)) in page
    assert str(TEAM.relative_to(ROOT)) in page
    told = set(re.findall(r"\w+", page))
    plumbing = {"Description", "ExecStart", "WantedBy", "Environment", "NotifyAccess", "Group"}
    unnamed = [name for name in settings() if name not in told | plumbing]
    assert not unnamed, f"the page does not say why the unit has {', '.join(unnamed)}"


def allowed_calls(filters: list[str]) -> set[str]:
    """The system calls that SystemCallFilter lets pass: names are added, or after `~` taken away, line by line."""
    allowed: set[str] = set()
    for line in filters:
        named = {call for name in line.removeprefix("~").split() for call in expanded(name)}
        allowed = allowed - named if line.startswith("~") else allowed | named
    # Always let through, see systemd.exec(5).
    return allowed | {"execve", "exit", "exit_group", "getrlimit", "rt_sigreturn", "sigreturn"}


def expanded(name: str) -> Iterator[str]:
    """The calls of a set such as @basic-io, as systemd knows them; any other name is that of a call."""
    if not name.startswith("@"):
        yield name
        return
    listed = analyze("syscall-filter", name)
    assert listed.returncode == 0, listed.stderr
    for line in listed.stdout.splitlines()[1:]:
        if line.strip() and not line.strip().startswith("#"):
            yield from expanded(line.strip())


def as_the_unit_would(unit: dict[str, list[str]]) -> str:
    """A prologue that does to a process what of the unit a process can do to itself."""
    assert unit["CapabilityBoundingSet"] == unit["AmbientCapabilities"] == [""]
    assert unit["NoNewPrivileges"] == ["yes"]
    assert unit["LimitMEMLOCK"] == ["infinity"]
    return f"""
import ctypes, os, resource
prctl = ctypes.CDLL(None).prctl
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, CAP_IPC_LOCK = 24, 38, 14
kept = None
try:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
except ValueError:
    # A container's root may not raise it; this capability lifts the same limit.
    kept = CAP_IPC_LOCK
resource.setrlimit(resource.RLIMIT_CORE, ({unit["LimitCORE"][0]}, {unit["LimitCORE"][0]}))
resource.setrlimit(resource.RLIMIT_NOFILE, ({unit["LimitNOFILE"][0]}, {unit["LimitNOFILE"][0]}))
os.umask({int(unit["UMask"][0], 8)})
for capability in range(64):
    if capability != kept and prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
        break
assert capability > 30
assert prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
"""


class Service:
    """The server as the unit starts it, under strace, with a service manager that listens to it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.trace = machine.root / "strace"
        self.log = machine.root / "service.stderr"
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(machine.root / "notify"))
        self.manager.settimeout(DEADLINE)
        credentials = machine.root / "credentials"
        credentials.mkdir(mode=0o500)
        (credentials / "passphrase").write_text(f"{PASSPHRASE}\n", encoding="ascii")
        (credentials / "passphrase").chmod(0o400)
        self._environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "NOTIFY_SOCKET": str(machine.root / "notify"),
            "CREDENTIALS_DIRECTORY": str(credentials),
            # The unit's, but for where it points to.
            **dict(value.split("=") for value in settings()["Environment"]),
            "XDG_DATA_HOME": str(machine.root),
        }

    def start(self, *flags: str) -> tuple[subprocess.Popen[bytes], Server]:
        strace = shutil.which("strace")
        assert strace is not None
        command = [strace, "-f", "-o", str(self.trace), "--", *program("server"), *flags]
        with self.log.open("wb") as stderr:
            process = subprocess.Popen(
                after(as_the_unit_would(settings()), command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=self._environment,
                cwd="/",
                start_new_session=True,
            )
        return process, Server(process, self.machine, self.log)

    def calls(self) -> set[str]:
        return set(re.findall(r"^\d+ +(?:<\.\.\. )?(\w+)[ (]", self.trace.read_text("utf-8", "replace"), re.MULTILINE))


def served(service: Service, *flags: str) -> None:
    """A whole life: start, READY, requests on every way in, a save, SIGHUP, SIGTERM, STOPPING, status 0."""
    process, server = service.start(*flags)
    try:
        eventually("it is ready or has ended", lambda: "ready on" in server.stderr or process.poll() is not None)
        server.wait_until_ready()
        assert service.manager.recv(100) == b"READY=1"
        assert "memory is locked" in server.stderr
        for wire in [server.unix(), *([server.tcp()] if server.port else [])]:
            with wire:
                token = server.machine.api_token
                ciphertext = wire.ask(type="Encrypt", token=token, plaintext="aGVsbG8=")["ciphertext"]
                assert wire.ask(type="Decrypt", token=token, ciphertext=ciphertext)["plaintext"] == "aGVsbG8="
                rotated = wire.ask(type="RotateKeyGroup", token=server.machine.admin_token, keyId="default")
                assert rotated["status"] == "ok"
        if "--metrics-port" in flags:
            found = re.search(r"metrics on (\S+)", server.stderr)
            assert found is not None
            with urllib.request.urlopen(found[1], timeout=DEADLINE) as answer:
                assert b"process_open_fds " in answer.read()
        (reload,) = settings()["ExecReload"]
        assert reload == "/bin/kill -HUP $MAINPID"
        tell(server, signal.SIGHUP)
        eventually("it has reloaded", lambda: "reloaded: " in server.stderr)
        stop(process, server)
        assert service.manager.recv(100) == b"STOPPING=1"
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        service.manager.close()


@pytest.mark.parametrize(
    ("unit_file", "more"),
    [(UNIT, ()), (DROP_IN, ()), (DROP_IN, ("--metrics-port", "0"))],
    ids=["without TCP", "with TCP", "with metrics"],
)
def test_the_server_works_as_the_unit_runs_it(machine: Machine, unit_file: Path, more: tuple[str, ...]) -> None:
    program_path, *flags = settings(unit_file)["ExecStart"][-1].split()
    assert program_path == SERVER
    places = {"/run/mini-kms/kms.sock": str(machine.socket), "9123": "0"}
    service = Service(machine)
    served(service, *(places.get(flag, flag) for flag in flags), *more)
    calls = service.calls()
    assert {"mlockall", "fsync", "sendto"} <= calls, "the record is not that of a server at work"
    assert calls - allowed_calls(settings()["SystemCallFilter"]) == set()


def test_the_server_works_for_a_team_as_the_unit_runs_it(machine: Machine) -> None:
    """Without a call to chown, which the filter has not: the group is the service's own."""
    (group,) = settings()["Group"]
    assert settings(TEAM)["Environment"] == [f"MINIKMS_UNIX_SOCKET_GROUP={group}"]
    directory = machine.root / "run"
    directory.mkdir()
    directory.chmod(int(settings(TEAM)["RuntimeDirectoryMode"][0], 8))
    file = machine.data / "principals.toml"
    file.write_text(f"[principals.me]\nuids = [{os.getuid()}]\n", encoding="utf-8")
    file.chmod(0o600)
    service = Service(machine)
    own_group = grp.getgrgid(os.getgid()).gr_name
    served(service, "--no-tcp", "--unix-socket", str(directory / "kms.sock"), "--unix-socket-group", own_group)
    assert "reloaded: principals from" in service.log.read_text(encoding="utf-8")
    calls = service.calls()
    assert {"mlockall", "fsync", "sendto"} <= calls, "the record is not that of a server at work"
    assert calls - allowed_calls(settings()["SystemCallFilter"]) == set()


def test_init_and_changing_the_passphrase_take_theirs_from_credentials(bare: Machine) -> None:
    credentials = bare.root / "credentials"
    credentials.mkdir(mode=0o700)
    for name, word in (("passphrase", "the first of the two"), ("new", "the second of the two")):
        (credentials / name).write_text(word, encoding="ascii")
        (credentials / name).chmod(0o400)
    bare.environment["CREDENTIALS_DIRECTORY"] = str(credentials)
    del bare.environment["MINIKMS_PASSPHRASE"]
    for arguments in (["init"], ["change-passphrase", "--new-passphrase-file", str(credentials / "new")]):
        outcome = bare.admin(*arguments)
        assert outcome.status == 0, outcome.stderr
    assert bare.refused_start().status == errors.EXIT_WRONG_PASSPHRASE
    (credentials / "new").rename(credentials / "passphrase")
    assert bare.start().stop() == 0


def test_the_server_never_has_memory_that_can_be_written_and_run(machine: Machine) -> None:
    """What MemoryDenyWriteExecute refuses."""
    service = Service(machine)
    served(service, "--no-tcp", "--unix-socket", str(machine.socket))
    trace = service.trace.read_text("utf-8", "replace")
    assert "PROT_READ|PROT_EXEC" in trace
    assert not re.search(r"PROT_WRITE\|PROT_EXEC", trace)
    assert not re.search(r"mprotect\([^)]*PROT_EXEC", trace)


def test_the_filter_is_read_as_systemd_reads_it() -> None:
    allowed = allowed_calls(["@system-service", "~@privileged @resources", "prlimit64"])
    assert {"openat", "prlimit64", "mlockall", "fsync"} <= allowed
    assert not {"chown", "setrlimit", "mount", "ptrace", "setuid", "reboot"} & allowed
