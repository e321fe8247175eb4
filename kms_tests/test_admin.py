"""`kms-admin`: the control plane against a client that needs no server, and the offline commands for real."""

from __future__ import annotations

import json
import os
import re
import time
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kms.cli import prompt, retiring, setup
from kms.cli.admin import main
from kms.client import blocking
from kms.core import derive
from kms.core.derive import KdfParameters
from kms.core.secret import Secret
from kms.core.usage import Operations, Refusals, TimedDisable, VersionUsage
from kms.errors import SaveFailedError, SaveOutcomeUnknownError, UnauthorizedError
from kms.storage import file
from kms.storage.audit_log import AuditLog
from kms.storage.lock import KeystoreLock
from kms.wire.messages import KeyGroupView, VersionState, VersionView
from kms_tests.audit_logs import operation

GROUP = KeyGroupView("billing", 1, [VersionView(1, VersionState.ACTIVE, 1700000000)])
UNUSED = VersionUsage(since_epoch_sec=1700000000, operations=Operations())


class FakeAdmin:
    """Keeps what it was asked; answers with `GROUP` or words."""

    asked: list[tuple[Any, ...]]

    def __enter__(self) -> FakeAdmin:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __init__(self) -> None:
        self.asked = []
        self.described = KeyGroupView("billing", 4, [VersionView(3, VersionState.DISABLED, 1700000000, UNUSED)])

    def iter_key_groups(self, *, usage: bool) -> list[KeyGroupView]:
        self.asked.append(("list", usage))
        return [GROUP]

    def describe_key_group(self, key_id: str) -> KeyGroupView:
        self.asked.append(("describe", key_id))
        return self.described

    def create_key_group(self, key_id: str) -> KeyGroupView:
        self.asked.append(("create", key_id))
        return GROUP

    def rotate_key_group(self, key_id: str) -> KeyGroupView:
        self.asked.append(("rotate", key_id))
        return GROUP

    def disable_version(self, key_id: str, version: int, *, for_seconds: int | None) -> str:
        self.asked.append(
            ("disable", key_id, version) if for_seconds is None else ("disable", key_id, version, for_seconds)
        )
        return f"{key_id} v{version} disabled"

    def enable_version(self, key_id: str, version: int) -> str:
        self.asked.append(("enable", key_id, version))
        return f"{key_id} v{version} enabled"

    def destroy_version(self, key_id: str, version: int) -> str:
        self.asked.append(("destroy", key_id, version))
        return f"{key_id} v{version} destroyed"


@pytest.fixture(autouse=True)
def home(data: Path, tiny: KdfParameters, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data directory that the commands will make."""
    for name in [name for name in os.environ if name.startswith("MINIKMS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(data))
    monkeypatch.setattr(prompt, "TERMINAL", str(data / "no-tty"))
    monkeypatch.setattr(derive, "KdfParameters", lambda: tiny)
    return data / "mini-kms"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeAdmin:
    fake = FakeAdmin()
    connect = SimpleNamespace(connect_unix=lambda *_, **__: fake, connect_tcp=lambda *_, **__: fake)
    monkeypatch.setattr(blocking, "KmsClient", connect)
    monkeypatch.setenv("MINIKMS_ADMIN_TOKEN", "admin")
    return fake


def opens(keystore: Path, passphrase: bytes) -> bool:
    with KeystoreLock(keystore) as lock:
        store, keyring = file.load(lock, Secret(bytearray(passphrase)))
        store.wipe()
        return "default" in keyring.groups


def test_list_keys(fake: FakeAdmin, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["list-keys"]) == 0
    assert capsys.readouterr().out == "billing\tv1\tACTIVE\t2023-11-14T22:13:20Z\n"
    monkeypatch.setenv("MINIKMS_ADMIN_TOKEN", "admin")
    assert main(["--json", "list-keys"]) == 0
    assert json.loads(capsys.readouterr().out)["keyGroups"][0]["keyId"] == "billing"


@pytest.mark.parametrize(("command", "word"), [("create-key", "created"), ("rotate-key", "rotated")])
def test_create_and_rotate(
    command: str, word: str, fake: FakeAdmin, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([command, "--key", "billing"]) == 0
    assert capsys.readouterr().out == f"billing {word}; version 1 is active\n"
    monkeypatch.setenv("MINIKMS_ADMIN_TOKEN", "admin")
    assert main(["--json", command, "--key", "billing"]) == 0
    assert json.loads(capsys.readouterr().out)["keyGroup"]["activeVersion"] == 1


@pytest.mark.parametrize(
    ("verb", "done", "more"), [("disable", "disabled", []), ("enable", "enabled", []), ("destroy", "destroyed", ["--yes"])]
)
def test_version_commands(
    verb: str, done: str, more: list[str], fake: FakeAdmin, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--json", f"{verb}-version", "--key", "billing", "--version", "3", *more]) == 0
    assert fake.asked == [(verb, "billing", 3)]
    assert json.loads(capsys.readouterr().out) == {"detail": f"billing v3 {done}"}


def test_destroy_version_asks_first(
    fake: FakeAdmin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions: list[str] = []
    monkeypatch.setattr(prompt, "confirm", lambda question, _remedy: questions.append(question))
    assert main(["destroy-version", "--key", "billing", "--version", "3"]) == 0
    assert "never be undone" in questions[0]
    assert "lost for good" in questions[0]
    assert capsys.readouterr().out == "billing v3 destroyed\n"


def test_destroy_version_without_terminal_and_yes_does_nothing(fake: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["destroy-version", "--key", "billing", "--version", "3"]) == 64
    assert "--yes" in capsys.readouterr().err
    assert fake.asked == [("describe", "billing")]


def test_destroy_version_of_one_that_was_just_used_wants_the_name_of_its_group(
    fake: FakeAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[str] = []
    monkeypatch.setattr(prompt, "confirm_by_name", lambda _question, name, _what, _remedy: wanted.append(name))
    fake.described.versions[0].usage = VersionUsage(
        since_epoch_sec=0, operations=Operations(encrypt=1), last_used_epoch_sec=int(time.time()), last_used_by="nightly"
    )
    assert main(["destroy-version", "--key", "billing", "--version", "3"]) == 0
    assert wanted == ["billing"]


def test_destroy_version_with_yes_asks_neither_a_person_nor_how_it_was_used(fake: FakeAdmin) -> None:
    assert main(["destroy-version", "--key", "billing", "--version", "3", "--yes"]) == 0
    assert fake.asked == [("destroy", "billing", 3)]


def test_list_keys_asks_for_usage_only_when_told(fake: FakeAdmin, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["list-keys"]) == 0
    monkeypatch.setenv("MINIKMS_ADMIN_TOKEN", "admin")
    assert main(["list-keys", "--usage"]) == 0
    assert fake.asked == [("list", False), ("list", True)]


def test_describe_key(fake: FakeAdmin, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["describe-key", "--key", "billing"]) == 0
    assert "version 3 is DISABLED" in capsys.readouterr().out
    monkeypatch.setenv("MINIKMS_ADMIN_TOKEN", "admin")
    assert main(["--json", "describe-key", "--key", "billing"]) == 0
    assert json.loads(capsys.readouterr().out)["keyGroup"]["versions"][0]["usage"] == {
        "sinceEpochSec": 1700000000,
        "operations": {},
    }


@pytest.fixture
def over(fake: FakeAdmin) -> TimedDisable:
    """A timed disable of version 3, which has ended."""
    trial = TimedDisable("admin", 100, 160, {"nightly": Refusals(2, 130)}, 160)
    usage = VersionUsage(since_epoch_sec=0, operations=Operations(), timed_disable=trial)
    fake.described.versions[0] = VersionView(3, VersionState.ENABLED, 0, usage)
    return trial


def test_disable_version_for_a_time_waits_and_tells_who_was_refused(
    fake: FakeAdmin, over: TimedDisable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disable = ["disable-version", "--key", "billing", "--version", "3", "--for", "1m"]
    assert main(disable) == 0
    assert fake.asked[0] == ("disable", "billing", 3, 60)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "billing v3 is ENABLED; refused while it was disabled:"
    assert second.startswith("  nightly: 2 requests, last ")
    monkeypatch.setenv("MINIKMS_ADMIN_TOKEN", "admin")
    assert main(["--json", *disable]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["keyId"], told["version"], told["status"]) == ("billing", 3, "ENABLED")
    assert told["timedDisable"]["refused"] == {"nightly": {"requests": 2, "lastEpochSec": 130}}


def test_disable_version_need_not_wait(fake: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["disable-version", "--key", "billing", "--version", "3", "--for", "2h", "--no-wait"]) == 0
    assert fake.asked == [("disable", "billing", 3, 7200)]
    assert capsys.readouterr().out == "billing v3 disabled for 2 hours\n"


def test_disable_version_with_no_wait_and_no_time_disables_nothing(
    fake: FakeAdmin, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["disable-version", "--key", "billing", "--version", "3", "--no-wait"]) == 64
    assert fake.asked == []
    assert "--no-wait goes with --for" in capsys.readouterr().err


def test_who_stops_waiting_is_told_when_it_ends(
    fake: FakeAdmin, over: TimedDisable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(retiring, "wait_until_enabled", interrupted)
    assert main(["disable-version", "--key", "billing", "--version", "3", "--for", "1m"]) == 130
    assert "stopped waiting; the server enables billing v3 " in capsys.readouterr().err


def test_who_stops_waiting_at_once_is_told_too(
    fake: FakeAdmin, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_key: str) -> KeyGroupView:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake, "describe_key_group", interrupted)
    assert main(["disable-version", "--key", "billing", "--version", "3", "--for", "1m"]) == 130
    assert "stopped waiting; the server enables billing v3 by itself" in capsys.readouterr().err


def test_who_may_not_see_who_is_refused_is_told_so_and_does_not_wait(
    fake: FakeAdmin, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_key: str) -> KeyGroupView:
        raise UnauthorizedError("no")

    monkeypatch.setattr(fake, "describe_key_group", refused)
    assert main(["disable-version", "--key", "billing", "--version", "3", "--for", "1m"]) == 0
    assert capsys.readouterr().out == (
        "billing v3 disabled for 1 minute; you may not see who is refused meanwhile, the server's log will tell\n"
    )


def test_a_version_is_a_positive_number() -> None:
    assert main(["enable-version", "--key", "billing", "--version", "0"]) == 64


def test_init_makes_directory_tokens_and_keystore(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    assert main(["init"]) == 0
    seen = capsys.readouterr()
    assert "Next: start kms-server" in seen.out
    tokens = [(home / name).read_text() for name in ("api.token", "admin.token")]
    assert tokens[0] != tokens[1]
    for token in tokens:
        assert len(token) == 44
        assert token.strip() not in seen.out
    assert home.stat().st_mode & 0o777 == 0o700
    for name in ("api.token", "admin.token", "keystore.json"):
        assert (home / name).stat().st_mode & 0o777 == 0o600
    assert opens(home / "keystore.json", b"hunter2 hunter")


def test_init_takes_paths_and_answers_in_json(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = data / "passphrase"
    secret.write_text("hunter2 hunter\n")
    secret.chmod(0o600)
    paths = {"keystore": data / "k" / "ks.json", "tokenFile": data / "t" / "api", "adminTokenFile": data / "t" / "admin"}
    options = ["--keystore", paths["keystore"], "--token-file", paths["tokenFile"], "--admin-token-file"]
    assert main(["--json", "init", *map(str, options), str(paths["adminTokenFile"]), "--passphrase-file", str(secret)]) == 0
    assert json.loads(capsys.readouterr().out) == {name: str(path) for name, path in paths.items()}
    assert all(path.exists() for path in paths.values())
    assert not home.exists()


def test_init_refuses_when_anything_exists_and_leaves_nothing_new(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.mkdir(mode=0o700)
    (home / "admin.token").write_text("old")
    assert main(["init"]) == 64
    assert "admin.token exists already" in capsys.readouterr().err
    assert [path.name for path in home.iterdir()] == ["admin.token"]
    assert (home / "admin.token").read_text() == "old"


def test_init_needs_three_different_files(home: Path) -> None:
    assert main(["init", "--token-file", str(home / "x"), "--admin-token-file", str(home / "x")]) == 64
    assert not home.exists()


def test_init_without_a_passphrase_leaves_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 64
    assert "MINIKMS_PASSPHRASE" in capsys.readouterr().err
    assert not home.exists()


@pytest.mark.parametrize(("failure", "status", "kept"), [(SaveFailedError, 74, False), (SaveOutcomeUnknownError, 70, True)])
def test_init_takes_its_tokens_back_when_the_save_fails(
    failure: type[Exception], status: int, kept: bool, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure("the disk is full")

    monkeypatch.setattr(file, "initialise", fail)
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    assert main(["init"]) == status
    assert (home / "api.token").exists() is kept


def test_init_shows_no_token_before_it_is_whole_and_durable(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    real_fsync = os.fsync
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert main(["init"]) == 0
    assert [name.rpartition("-")[0] for name in synced if "token" in name] == [".api.token.tmp", ".admin.token.tmp"]


def test_init_removes_what_a_killed_init_has_left(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    home.mkdir(mode=0o700)
    (home / ".api.token.tmp-0011").write_text("half a tok")
    assert main(["init"]) == 0
    assert not list(home.glob(".*"))


def test_init_touches_no_token_that_came_while_it_waited_for_the_passphrase(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    real_obtain = prompt.obtain_new_passphrase

    def obtain(*arguments: Any, **keywords: Any) -> Secret:
        home.mkdir(mode=0o700)
        (home / "admin.token").write_text("of another init")
        return real_obtain(*arguments, **keywords)

    monkeypatch.setattr(setup, "obtain_new_passphrase", obtain)
    assert main(["init"]) == 64
    assert "admin.token exists already" in capsys.readouterr().err
    assert (home / "admin.token").read_text() == "of another init"
    assert not (home / "api.token").exists()


def test_init_reports_a_token_that_cannot_be_written(
    data: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    (data / "file").touch()
    (data / "link").symlink_to(data / "file")
    assert main(["init", "--admin-token-file", str(data / "link" / "admin")]) == 74
    assert "cannot make" in capsys.readouterr().err
    assert not (home / "api.token").exists()


def test_change_passphrase(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    assert main(["init"]) == 0
    capsys.readouterr()
    new = home / "new"
    new.write_text("hunter3 hunter")
    new.chmod(0o600)
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    keystore = home / "keystore.json"
    assert main(["change-passphrase", "--keystore", str(keystore), "--new-passphrase-file", str(new)]) == 0
    assert capsys.readouterr().out == "passphrase changed\n"
    assert opens(keystore, b"hunter3 hunter")
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    monkeypatch.setenv("MINIKMS_NEW_PASSPHRASE", "hunter4 hunter")
    assert main(["change-passphrase"]) == 2
    seen = capsys.readouterr()
    assert "hunter" not in seen.err
    with KeystoreLock(keystore):
        assert main(["change-passphrase"]) == 75


def test_change_passphrase_needs_a_keystore(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["change-passphrase"]) == 66
    assert "kms-admin init" in capsys.readouterr().err
    assert not home.exists()


@pytest.mark.parametrize("command", ["", "init", "destroy-version", "change-passphrase", "verify-audit"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert f"kms-admin {command}".rstrip() in capsys.readouterr().out.partition("Examples:")[2]


def test_new_token_prints_the_token_alone_and_beside_it_the_line_for_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-token", "billing"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}\n", out)
    assert err == f'token_sha256 = ["{sha256(out.strip().encode()).hexdigest()}"]\n'
    assert main(["new-token", "billing"]) == 0
    assert capsys.readouterr().out != out


def test_new_token_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "new-token", "billing"]) == 0
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert made == {
        "principal": "billing",
        "token": made["token"],
        "tokenSha256": sha256(made["token"].encode()).hexdigest(),
    }
    assert err == ""


@pytest.mark.parametrize("name", ["api", "a b", "", "x" * 65])
def test_new_token_for_a_name_that_no_principal_may_have_makes_none(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-token", name]) == 64
    assert capsys.readouterr().out == ""


@pytest.fixture
def principals(home: Path) -> Path:
    home.mkdir(mode=0o700)
    path = home / "principals.toml"
    path.write_text("""
        [[principals.billing.allow]]
        groups = ["billing-*"]
        operations = ["Encrypt"]
        aad_prefix = "aW52b2ljZS8="
        [[principals.billing.allow]]
        groups = ["billing-*"]
        operations = ["Decrypt"]
        [[principals.billing.deny]]
        groups = ["billing-secret"]
        operations = ["*"]
    """)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("operation", "key", "aad", "status", "line"),
    [
        ("Decrypt", "billing-1", "", 0, "allowed: principals.billing.allow[1] allows it"),
        ("Encrypt", "billing-1", "invoice/7", 0, "allowed: principals.billing.allow[0] allows it"),
        (
            "Encrypt",
            "billing-1",
            "x",
            1,
            "refused: no rule allows it; principals.billing.allow[0] would, for an AAD that begins with its aad_prefix",
        ),
        ("Decrypt", "billing-secret", "", 1, "refused: principals.billing.deny[0] denies it"),
        ("RotateKeyGroup", "billing-1", "", 1, "refused: no rule allows it"),
        ("Health", "billing-1", "", 0, "allowed: Health needs no grant"),
    ],
)
def test_explain_names_the_rule_that_decides(
    principals: Path, operation: str, key: str, aad: str, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    question = ["explain", "--principal", "billing", "--operation", operation, "--key", key, "--aad", aad]
    assert main(question) == status
    assert capsys.readouterr() == (line + "\n", "")
    assert main(["--json", *question]) == status
    told = json.loads(capsys.readouterr().out)
    assert f"{'allowed' if told['allowed'] else 'refused'}: {told['reason']}" == line
    assert told["rule"] is None or told["rule"] in line


def test_explain_takes_the_file_it_is_told_and_knows_only_who_is_in_it(
    principals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = ["explain", "--principal", "billing", "--operation", "Decrypt", "--key", "billing-1"]
    other = principals.with_name("other.toml")
    assert main([*question, "--principals", str(other)]) == 66
    other.write_text("[principals.payroll]")
    other.chmod(0o600)
    assert main([*question, "--principals", str(other)]) == 64
    assert "has no principal of this name; it has payroll" in capsys.readouterr().err
    other.write_text("[principals.payroll]\ntokens = 1")
    assert main([*question, "--principals", str(other)]) == 64
    assert 'principals.payroll: unknown key "tokens"' in capsys.readouterr().err


@pytest.mark.parametrize("operation", ["Ping", "encryp", "*"])
def test_explain_knows_the_operations_of_the_wire(principals: Path, operation: str) -> None:
    assert main(["explain", "--principal", "billing", "--operation", operation, "--key", "a"]) == 64


@pytest.mark.parametrize("operation", ["Health", "status", "RELOAD"])
def test_explain_needs_a_key_group_only_for_what_is_on_one(
    principals: Path, operation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "--principal", "billing", "--operation", operation]) == (0 if operation == "Health" else 1)
    assert main(["explain", "--principal", "billing", "--operation", "Decrypt"]) == 64
    assert "name the key group" in capsys.readouterr().err


def test_explain_says_what_it_means_that_there_is_no_file_of_principals(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "a", "--principal", "billing", "--operation", "Encrypt"]) == 66
    assert "without which a shared token may do everything on its plane; name another with" in capsys.readouterr().err


@pytest.fixture
def audited(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """The log of an install whose passphrase is `hunter2`; each command that needs it has it in its environment."""
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    assert main(["init"]) == 0
    capsys.readouterr()
    with KeystoreLock(home / "keystore.json") as lock:
        keystore, keyring = file.load(lock, Secret(bytearray(b"hunter2 hunter")))
        with AuditLog(home / "audit.log", keystore.audit_keys, generation=keyring.generation, clock=lambda: 0.5) as log:
            log.write([operation(1), operation(2)])
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    return home / "audit.log"


def test_verify_audit_says_what_it_has_verified(audited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify-audit"]) == 0
    assert capsys.readouterr() == (
        f"{audited}: records 1 to 4, 1970-01-01T00:00:00.500000Z to 1970-01-01T00:00:00.500000Z\nauthentic: 4 records\n",
        "",
    )


def test_verify_audit_in_json(audited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "verify-audit", str(audited)]) == 0
    time = "1970-01-01T00:00:00.500000Z"
    assert json.loads(capsys.readouterr().out) == {
        "authentic": True,
        "files": [{"file": str(audited), "records": 4, "first": 1, "last": 4, "begins": time, "ends": time}],
        "findings": [],
        "findingCount": 0,
        "notes": [],
        "refusalsCounted": 0,
        "principalsPutInForce": 0,
    }


def test_verify_audit_says_where_something_is_wrong(audited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audited.write_bytes(audited.read_bytes().replace(b'"request":2', b'"request":3') + b"{")
    assert main(["verify-audit"]) == 65
    note, found, verdict = capsys.readouterr().out.splitlines()[1:]
    assert note == (
        f"note: {audited}, line 5: the last line is torn: 1 bytes of a record that a crash cut short, or is being written"
    )
    assert found == f"FOUND: {audited}, line 3: record 3 was altered, or one before it"
    assert verdict == "NOT AUTHENTIC: 1 found; 3 records are"


def test_verify_audit_takes_rotated_files_and_says_which_are_missing(
    audited: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = audited.with_name("audit.log.1")
    audited.rename(old)
    with KeystoreLock(audited.with_name("keystore.json")) as lock:
        keystore, _ = file.load(lock, Secret(bytearray(b"hunter2 hunter")))
        AuditLog(audited, keystore.audit_keys, generation=1).close()
    assert main(["verify-audit", str(old), str(audited)]) == 0
    assert "records 1 to 4" in capsys.readouterr().out
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    assert main(["verify-audit"]) == 0
    assert "records 1 to 4 are not here: to verify them too, give the older files first" in capsys.readouterr().out
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    assert main(["verify-audit", str(old)]) == 0
    assert "whether it was cut short at its end cannot be told" in capsys.readouterr().out


def test_verify_audit_of_many_findings_shows_some_and_counts_all(audited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audited.write_bytes(audited.read_bytes() + audited.read_bytes().splitlines(keepends=True)[1] * 50)
    assert main(["verify-audit"]) == 65
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 20 + 2
    assert lines[-2:] == ["and 30 more", "NOT AUTHENTIC: 50 found; 4 records are"]


def test_verify_audit_needs_a_log_a_keystore_and_its_passphrase(
    audited: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter3 hunter")
    assert main(["verify-audit"]) == 2
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    assert main(["verify-audit", str(home / "none.log")]) == 66
    assert main(["verify-audit", "--keystore", str(home / "none.json")]) == 66
    assert capsys.readouterr().err.count("\n") == 3


def test_change_passphrase_hands_the_audit_log_over(
    audited: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIKMS_NEW_PASSPHRASE", "hunter3 hunter")
    assert main(["change-passphrase"]) == 0
    assert b'"event":"ChangePassphrase"' in audited.read_bytes()
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter3 hunter")
    assert main(["verify-audit"]) == 0
    assert "authentic: 5 records" in capsys.readouterr().out


def test_change_passphrase_changes_nothing_when_the_audit_log_is_of_another_keystore(
    audited: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    audited.write_bytes(audited.read_bytes().replace(b'"Stop"', b'"Halt"'))
    monkeypatch.setenv("MINIKMS_NEW_PASSPHRASE", "hunter3 hunter")
    assert main(["change-passphrase"]) == 65
    assert "move audit.log and audit.log.head away together" in capsys.readouterr().err
    assert opens(home / "keystore.json", b"hunter2 hunter")


def test_change_passphrase_begins_no_audit_log(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    assert main(["init"]) == 0
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    monkeypatch.setenv("MINIKMS_NEW_PASSPHRASE", "hunter3 hunter")
    assert main(["change-passphrase"]) == 0
    assert not (home / "audit.log").exists()


@pytest.mark.parametrize(
    "arguments",
    [["rotate-key", "billing"], ["rotate-key", "--key", "billing"], ["rotate-key", "billing", "--key", "billing"]],
)
def test_a_key_group_is_an_argument_or_an_option(arguments: list[str], fake: FakeAdmin) -> None:
    assert main(arguments) == 0
    assert fake.asked == [("rotate", "billing")]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "name the key group"),
        (["a", "--key", "b"], "two key groups are given; give one"),
        ([""], "the name of a key group is not blank"),
        (["--key", " "], "the name of a key group is not blank"),
    ],
)
@pytest.mark.parametrize("command", ["create-key", "rotate-key", "describe-key", "enable-version", "destroy-version"])
def test_a_key_group_is_named_once_and_not_blank(
    command: str, arguments: list[str], complaint: str, fake: FakeAdmin, capsys: pytest.CaptureFixture[str]
) -> None:
    version = ["--version", "1"] if command.endswith("version") else []
    assert main([command, *arguments, *version]) == 64
    assert complaint in capsys.readouterr().err
    assert fake.asked == []


@pytest.mark.parametrize(("version", "number"), [("3", 3), ("v3", 3), ("V3", 3), ("9223372036854775807", (1 << 63) - 1)])
def test_a_version_is_written_as_it_is_printed_too(version: str, number: int, fake: FakeAdmin) -> None:
    assert main(["enable-version", "billing", "--version", version]) == 0
    assert fake.asked == [("enable", "billing", number)]


@pytest.mark.parametrize("version", ["", "v", "0", "-1", "1.0", "v 1", "9223372036854775808", "1" * 5000, "\u0663"])
def test_what_is_no_version_is_refused(version: str, fake: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["enable-version", "billing", "--version", version]) == 64
    assert "give a version such as 3 or v3" in capsys.readouterr().err
    assert fake.asked == []


def test_a_new_token_goes_into_a_new_private_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    umask = os.umask(0)
    try:
        assert main(["new-token", "billing", "--out", str(data / "token")]) == 0
    finally:
        os.umask(umask)
    token = (data / "token").read_bytes()
    assert (data / "token").stat().st_mode & 0o777 == 0o600
    printed = capsys.readouterr()
    assert printed.out == f'token_sha256 = ["{sha256(token.rstrip()).hexdigest()}"]\n'
    assert token.decode().strip() not in printed.out + printed.err
    assert main(["new-token", "billing", "--out", str(data / "token")]) == 64
    assert (data / "token").read_bytes() == token


def test_the_old_passphrase_is_checked_before_a_new_one_is_asked_for(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2 hunter")
    assert main(["init"]) == 0
    asked: list[str] = []
    monkeypatch.setattr(prompt, "_typed", lambda name, _remedy: asked.append(name))
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "wrong")
    assert main(["change-passphrase"]) == 2
    assert asked == []


def test_what_was_made_with_a_line_end_by_an_earlier_release_opens_and_is_renewed(
    home: Path, tiny: KdfParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir(mode=0o700)
    with KeystoreLock(home / "keystore.json") as lock:
        file.initialise(lock, Secret(bytearray(b"pw\n")), now=1, parameters=tiny)
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "pw\n")
    monkeypatch.setenv("MINIKMS_NEW_PASSPHRASE", "a better one\n")
    assert main(["change-passphrase"]) == 0
    assert opens(home / "keystore.json", b"a better one")


def test_init_takes_a_short_passphrase_only_when_told_so(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2")
    assert main(["init"]) == 65
    assert "only 7 characters" in capsys.readouterr().err
    assert not home.exists()
    monkeypatch.setenv("MINIKMS_PASSPHRASE", "hunter2\n")
    assert main(["init", "--allow-weak"]) == 0
    assert "the passphrase is weak" in capsys.readouterr().err
    assert opens(home / "keystore.json", b"hunter2")
