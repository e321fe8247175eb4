"""A power cut at any instant of a save leaves the old keystore or the new one, and after the answer only the new one.

The system calls of real programs are recorded, and every state that the rules of `disk` allow after each of them is made
real and loaded. The same is done to programs that break one rule of a durable save, which must be noticed.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from kms.errors import KmsError
from kms.storage import formats
from kms_tests.faults import disk, keystores, program, strace
from kms_tests.faults.disk import LONG, SHORT, Disk, State, Thorough
from kms_tests.faults.keystores import MUTATIONS, NEW_PASSPHRASE
from kms_tests.faults.strace import Call
from kms_tests.integration.processes import PASSPHRASE, Machine

Judge = Callable[[Path, bool], str | None]
"""What is wrong with the directory after a power cut, or None; the flag says whether success had been answered."""


@pytest.fixture
def how(long: bool) -> Thorough:
    return LONG if long else SHORT


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory where many small states are made real; in memory, as nothing there has to last."""
    path = Path(tempfile.mkdtemp(prefix="kms-state-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@dataclass
class Verdict:
    """How many states were loaded, up to the first bad one, and what is wrong with that."""

    states: int = 0
    bad: str | None = None


def check(cut: Disk, calls: Sequence[Call], judge: Judge, how: Thorough, scratch: Path) -> Verdict:
    """Cut the power after each of `calls`, which a process made on the disk `cut`."""
    answered = False
    verdict = Verdict()
    for call in (None, *calls):
        now_answered = call is not None and _is_answer(call)
        changed = call is None or cut.apply(call)
        if not changed and (answered or not now_answered):
            continue
        answered = answered or now_answered
        for state in cut.states(how):
            verdict.states += 1
            place = scratch / "state"
            place.mkdir(mode=0o700)
            disk.write(state, place)
            if wrong := judge(place, answered):
                verdict.bad = f"after {call.name if call else 'nothing'}: {wrong}"
            shutil.rmtree(place)
            if verdict.bad:
                return verdict
    assert answered, "the recorded program never answered"
    return verdict


def _is_answer(call: Call) -> bool:
    """A reply on a socket, words on standard output, or the end of a program that succeeded."""
    if call.name == "exit":
        return call.result == 0
    if call.name == "write":
        return call.arguments[0].startswith("1<")
    return call.name == "sendto" and b'"status":"ok"' in call.text(1)


def _found(keystore: Path, passphrase: str) -> str | None:
    """What is wrong with the keystore there, and with what is beside it once it has been opened."""
    try:
        keystores.load(keystore, passphrase)
    except KmsError as error:
        return f"it does not load: {error}"
    left = [path.name for path in keystore.parent.iterdir() if ".tmp-" in path.name]
    return f"temp files survive: {left}" if left else None


def _old_or_new(
    name: str, old: bytes, new: bytes, *, passphrase: str = PASSPHRASE, new_passphrase: str = PASSPHRASE
) -> Judge:
    """The keystore `name` is exactly `old` or `new`; where `old` is of format 2, `new` has it kept beside it."""

    def judge(root: Path, answered: bool) -> str | None:
        keystore = root / name
        content = keystore.read_bytes() if keystore.exists() else None
        if content not in (old, new):
            return "it is neither the old nor the new one" if content is not None else "it is gone"
        if content == old and answered:
            return "it is the old one, and success had been answered"
        version = formats.version_of(old)
        kept = keystore.with_name(f"{keystore.name}.v{version}")
        if content == new and version < 4 and not (kept.exists() and kept.read_bytes() == old):
            return f"the format {version} file is not kept"
        return _found(keystore, passphrase if content == old else new_passphrase)

    return judge


def _record_server(machine: Machine, request: dict[str, object]) -> list[Call]:
    """What a real server calls to answer `request`."""
    server = machine.start(change=program.CHEAP)
    log = machine.root / "calls"
    with server.unix() as wire:
        wire.ask(type="Health", token=machine.api_token)
        with strace.attached(server.pid, log):
            assert wire.ask(token=machine.admin_token, **request)["status"] == "ok"
            # The answer may be here before strace has noted it; the next one is not.
            wire.ask(type="Health", token=machine.api_token)
    return strace.read(log)


def _record(machine: Machine, name: str, *arguments: str, mutant: str = "sound") -> list[Call]:
    """What a real program calls from its start to its end."""
    log = machine.root / "calls"
    environment = {**machine.environment, "MINIKMS_NEW_PASSPHRASE": NEW_PASSPHRASE, "PYTHONDONTWRITEBYTECODE": "1"}
    done = strace.run(program.command(name, *arguments, mutant=mutant), environment, log)
    assert done.returncode == 0, done.stderr
    return strace.read(log)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_power_cut_in_a_save_of_the_server_leaves_the_old_or_the_new_keystore(
    machine: Machine, name: str, how: Thorough, scratch: Path
) -> None:
    mutation = MUTATIONS[name]
    keystores.make(machine.keystore)
    old = machine.keystore.read_bytes()
    before = disk.read(machine.data)
    calls = _record_server(machine, dict(mutation.request))
    new = machine.keystore.read_bytes()
    verdict = check(Disk(machine.data, before), calls, _old_or_new("keystore.json", old, new), how, scratch)
    print(f"{name}: {verdict.states} states")
    assert verdict.bad is None


@pytest.mark.parametrize(("name", "version"), [("migrate", 2), ("migrate", 3), ("raise", 2)])
def test_a_power_cut_in_a_migration_also_to_higher_costs_leaves_the_old_or_the_new_keystore(
    machine: Machine, how: Thorough, scratch: Path, name: str, version: int
) -> None:
    keystores.make_earlier(machine.keystore, version)
    old = machine.keystore.read_bytes()
    before = disk.read(machine.data)
    calls = _record(machine, name, str(machine.keystore))
    new = machine.keystore.read_bytes()
    assert b'"formatVersion":4' in new
    verdict = check(Disk(machine.data, before), calls, _old_or_new("keystore.json", old, new), how, scratch)
    print(f"{name}: {verdict.states} states")
    assert verdict.bad is None


def _with_journal(machine: Machine, name: str, how: Thorough, scratch: Path, mutant: str = "sound") -> Verdict:
    """Two commits of one program, to a keystore that has a journal; it prints each generation once that is durable."""
    keystores.make(machine.keystore)
    _record(machine, "rotate", str(machine.keystore))
    first = keystores.load(machine.keystore)
    before = disk.read(machine.data)
    calls = _record(machine, name, str(machine.keystore), mutant=mutant)
    answers = 0
    total = Verdict()
    cut = Disk(machine.data, before)
    for call in (None, *calls):
        answers += call is not None and _is_answer(call) and call.name == "write"
        if call is not None and not cut.apply(call):
            continue
        for state in cut.states(how):
            total.states += 1
            place = scratch / "state"
            place.mkdir(mode=0o700)
            disk.write(state, place)
            total.bad = _at_least(place / "keystore.json", first.generation + answers)
            shutil.rmtree(place)
            if total.bad:
                total.bad = f"after {call.name if call else 'nothing'}: {total.bad}"
                return total
    assert answers == 2
    return total


def _at_least(keystore: Path, generation: int) -> str | None:
    try:
        found = keystores.load(keystore).generation
    except KmsError as error:
        return f"it does not load: {error}"
    left = [path.name for path in keystore.parent.iterdir() if ".tmp-" in path.name]
    if left:
        return f"temp files survive: {left}"
    return None if found in (generation, generation + 1) else f"it has generation {found}, and {generation} was answered"


@pytest.mark.parametrize("name", ["rotate", "destroy"])
def test_a_power_cut_in_a_commit_to_a_journal_or_in_a_fold_takes_nothing_back_that_was_answered(
    machine: Machine, how: Thorough, scratch: Path, name: str
) -> None:
    verdict = _with_journal(machine, name, how, scratch)
    print(f"{name}, with a journal: {verdict.states} states")
    assert verdict.bad is None


@pytest.mark.parametrize(
    ("name", "mutant", "symptom"),
    [
        ("rotate", "no fsync of the file", "was answered"),
        ("rotate", "append twice", "it does not load"),
        ("destroy", "rename before fsync", "it does not load"),
        ("destroy", "no fsync of the directory", "it does not load"),
        ("destroy", "forget the former journal", "it does not load"),
    ],
)
def test_a_journal_or_a_fold_that_breaks_a_rule_is_noticed(
    machine: Machine, scratch: Path, name: str, mutant: str, symptom: str
) -> None:
    verdict = _with_journal(machine, name, SHORT, scratch, mutant)
    assert verdict.bad is not None
    assert symptom in verdict.bad


def _change_passphrase(machine: Machine, how: Thorough, scratch: Path, mutant: str = "sound") -> Verdict:
    keystores.make(machine.keystore)
    old = machine.keystore.read_bytes()
    before = disk.read(machine.data)
    calls = _record(machine, "admin", "change-passphrase", mutant=mutant)
    new = machine.keystore.read_bytes()
    judge = _old_or_new("keystore.json", old, new, new_passphrase=NEW_PASSPHRASE)
    return check(Disk(machine.data, before), calls, judge, how, scratch)


def test_a_power_cut_in_a_change_of_passphrase_leaves_the_old_or_the_new_keystore(
    machine: Machine, how: Thorough, scratch: Path
) -> None:
    verdict = _change_passphrase(machine, how, scratch)
    print(f"change-passphrase: {verdict.states} states")
    assert verdict.bad is None


@pytest.mark.parametrize(
    ("mutant", "symptom"),
    [
        ("no fsync of the file", "neither the old nor the new"),
        ("no fsync of the directory", "the old one, and success had been answered"),
        ("rename before fsync", "neither the old nor the new"),
        ("write in place", "neither the old nor the new"),
    ],
)
def test_a_save_that_breaks_a_rule_is_noticed(machine: Machine, scratch: Path, mutant: str, symptom: str) -> None:
    verdict = _change_passphrase(machine, SHORT, scratch, mutant)
    assert verdict.bad is not None
    assert symptom in verdict.bad


def _judge_init(root: Path, data: Path, final: State) -> Judge:
    """After an answered init all is there; before that, what is there is whole or is not there."""
    relative = data.relative_to(root)
    whole = {name: final[f"{relative}/{name}"] for name in ("keystore.json", "api.token", "admin.token")}

    def judge(place: Path, answered: bool) -> str | None:
        for name, content in whole.items():
            path = place / relative / name
            if not path.exists():
                if answered:
                    return f"{name} is gone, and success had been answered"
            elif path.read_bytes() != content:
                return f"{name} is torn"
        there = {name for name in whole if (place / relative / name).exists()}
        return f"there is a keystore, but only {there}" if "keystore.json" in there and len(there) < len(whole) else None

    return judge


def _init(machine: Machine, how: Thorough, scratch: Path, mutant: str = "sound") -> Verdict:
    calls = _record(machine, "admin", "init", mutant=mutant)
    (machine.root / "calls").unlink()
    judge = _judge_init(machine.root, machine.data, disk.read(machine.root))
    return check(Disk(machine.root, {}), calls, judge, how, scratch)


def test_a_power_cut_in_the_first_run_leaves_nothing_that_is_torn(bare: Machine, how: Thorough, scratch: Path) -> None:
    verdict = _init(bare, how, scratch)
    print(f"init: {verdict.states} states")
    assert verdict.bad is None


def test_a_first_run_that_does_not_make_its_directory_durable_is_noticed(bare: Machine, scratch: Path) -> None:
    verdict = _init(bare, SHORT, scratch, "no fsync of the parent")
    assert verdict.bad is not None
    assert "is gone, and success had been answered" in verdict.bad


def _restart(machine: Machine, how: Thorough, scratch: Path, mutant: str = "sound") -> Verdict:
    """A process dies after each call of a save, another loads what is there, and then the power is cut."""
    keystores.make(machine.keystore)
    saved = Disk(machine.data, disk.read(machine.data))
    calls = _record(machine, "admin", "change-passphrase")
    new = machine.keystore.read_bytes()
    total = Verdict()
    for call in calls:
        if not saved.apply(call):
            continue
        for path in machine.data.iterdir():
            path.unlink()
        disk.write(saved.state(), machine.data)
        loaded = machine.keystore.read_bytes()
        machine.environment["MINIKMS_PASSPHRASE"] = passphrase = NEW_PASSPHRASE if loaded == new else PASSPHRASE
        again = _record(machine, "load", str(machine.keystore), mutant=mutant)

        def judge(root: Path, answered: bool, loaded: bytes = loaded, passphrase: str = passphrase) -> str | None:
            if not answered:
                return None
            if (root / "keystore.json").read_bytes() != loaded:
                return "what was loaded, and may have been used, is gone"
            return _found(root / "keystore.json", passphrase)

        one = check(copy.deepcopy(saved), again, judge, how, scratch)
        total.states += one.states
        if one.bad:
            total.bad = f"killed after {call.name}, {one.bad}"
            break
    return total


def test_a_power_cut_after_a_restart_takes_nothing_back_that_was_loaded(
    machine: Machine, how: Thorough, scratch: Path
) -> None:
    verdict = _restart(machine, how, scratch)
    print(f"restart: {verdict.states} states")
    assert verdict.bad is None


def test_a_restart_that_believes_what_is_not_durable_is_noticed(machine: Machine, scratch: Path) -> None:
    verdict = _restart(machine, SHORT, scratch, "no fsync at load")
    assert verdict.bad is not None
    assert "what was loaded, and may have been used, is gone" in verdict.bad


def test_a_power_cut_while_a_file_is_encrypted_leaves_the_old_or_the_new_output(
    machine: Machine, how: Thorough, scratch: Path
) -> None:
    server = machine.start()
    plain = machine.file("plain", os.urandom(1000))
    outputs = machine.root / "outputs"
    outputs.mkdir()
    sealed = outputs / "sealed"
    sealed.write_bytes(b"what was there before")
    before = disk.read(outputs)
    calls = _record(
        machine, "client", "--unix", str(server.socket), "encrypt-file", "--in", str(plain), "--out", str(sealed)
    )
    new = sealed.read_bytes()

    def judge(root: Path, answered: bool) -> str | None:
        content = (root / "sealed").read_bytes() if (root / "sealed").exists() else None
        right = (new,) if answered else (new, b"what was there before")
        return None if content in right else "it is not the whole output"

    verdict = check(Disk(outputs, before), calls, judge, how, scratch)
    print(f"encrypt-file: {verdict.states} states")
    assert verdict.bad is None
    back = machine.root / "back"
    assert server.client("decrypt-file", "--in", str(sealed), "--out", str(back)).status == 0
    assert back.read_bytes() == plain.read_bytes()
