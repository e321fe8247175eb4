"""The pages beside the code: what they list is what there is."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path

import pytest
import rich_click as click

from kms import errors, limits
from kms.cli import admin, client, server
from kms.client.environment import ALLOW_GROUP
from kms.core import ciphertext, mke2
from kms.core.ciphertext import Purpose
from kms.core.derive import sub_key
from kms.core.envelope import ChunkOpener, CommittingKey, EnvelopeKey
from kms.core.kek import Kek
from kms.core.secret import Secret
from kms.errors import WireError
from kms.server.config import ENVIRONMENT
from kms_tests.keks import earlier_header

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PROGRAMS: dict[str, click.Command] = {
    "kms-admin": admin.command,
    "kms-client": client.command,
    "kms-server": server.command,
}


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def commands_of(program: str) -> dict[str, click.Command]:
    """The program and each of its commands, by what a person types."""
    top = PROGRAMS[program]
    below = top.commands if isinstance(top, click.Group) else {}
    return {program: top, **{f"{program} {name}": command for name, command in below.items()}}


def options_of(command: click.Command) -> set[str]:
    """Its own; those of its program may stand behind it, too."""
    own = [one for one in command.params if one.expose_value or "--version" in one.opts]
    return {name for parameter in own for name in parameter.opts if name.startswith("--")}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_manual_page_has_each_option_of_each_command_and_no_other(program: str) -> None:
    shown: dict[str, set[str]] = {program: set()}
    current = program
    for line, below in itertools.pairwise(page(f"commands/{program}.rst").splitlines()):
        if below.startswith("~~~"):
            current = f"{program} {line}"
        elif found := re.match(r"``(--[a-z-]+)", line):
            shown.setdefault(current, set()).add(found[1])
    there = {name: options_of(command) for name, command in commands_of(program).items()}
    there[program] |= {"--help"}
    assert shown == {name: options for name, options in there.items() if options}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_manual_page_has_a_chapter_and_a_line_of_synopsis_for_each_command(program: str) -> None:
    text = page(f"commands/{program}.rst")
    names = [name.partition(" ")[2] for name in commands_of(program) if " " in name]
    assert sorted(re.findall(r"^([a-z-]+)\n~~~", text, re.MULTILINE)) == sorted(names)
    assert sorted(re.findall(rf"\*\*{program}\*\* ([a-z-]+)", text)) == sorted(names)


@pytest.mark.parametrize("program", ["kms-admin", "kms-client"])
def test_the_options_of_a_synopsis_are_those_of_the_command(program: str) -> None:
    for name, command in commands_of(program).items():
        if " " not in name:
            continue
        word = name.partition(" ")[2]
        (line,) = re.findall(rf"\*\*{program}\*\* {word}( .*|)$", page(f"commands/{program}.rst"), re.MULTILINE)
        shown = set(re.findall(r"--[a-z-]+", line))
        assert shown <= options_of(command), name
        required = {option for parameter in command.params if parameter.required for option in parameter.opts}
        assert {option for option in required if option.startswith("--")} <= shown, name


def test_the_settings_are_those_that_the_server_takes() -> None:
    table = page("configuration.rst").partition("Default\n")[2].partition("\n\n")[0]
    rows = [(re.findall(r"``(--[a-z-]+)", row), re.findall(r"``(MINIKMS_\w+)``", row)) for row in table.splitlines()]
    assert {flag for flags, _ in rows for flag in flags} == options_of(server.command) - {"--version"}
    variables = {flag: variable for flags, names in rows for flag in flags for variable in names}
    assert variables == {f"--{name.replace('_', '-')}": variable for name, variable in ENVIRONMENT.items()} | {
        "--allow-group-readable-secrets": ALLOW_GROUP
    }


@pytest.mark.parametrize(
    ("flag", "default"),
    [
        ("--tcp-port", limits.DEFAULT_TCP_PORT),
        ("--max-frame-bytes", limits.MAX_FRAME_BYTES),
        ("--idle-timeout-ms", int(limits.IDLE_TIMEOUT * 1000)),
        ("--max-connections", limits.MAX_CONNECTIONS),
    ],
)
def test_a_default_is_the_one_that_the_server_has(flag: str, default: int) -> None:
    assert re.search(rf"^``{flag} N`` +``MINIKMS_\w+`` +{default}\b", page("configuration.rst"), re.MULTILINE)
    manual = page("commands/kms-server.rst").partition(f"\n``{flag} N``\n")[2].partition("\n\n")[0]
    assert f"; by default {default}." in manual


def test_the_exit_statuses_are_those_of_the_code() -> None:
    listed = set(map(int, re.findall(r"^(\d+)$", page("commands/exit-status.inc"), re.MULTILINE)))
    assert listed == {value for name, value in vars(errors).items() if name.startswith("EXIT_")} | {130, 141}


def test_the_error_codes_are_those_of_the_code() -> None:
    listed = set(re.findall(r"^``(\w+)`` ", page("wire-protocol.rst").partition("Error codes\n")[2], re.MULTILINE))
    assert listed - {"errorCode"} == {error.code for error in WireError.__subclasses__()}


def test_the_worked_example_of_a_ciphertext_comes_out_as_it_is_shown() -> None:
    fields = example("Ciphertext 03")
    with Secret(bytearray(fields["kek"])) as kek, sub_key(kek, "mini-kms/v3/kek/xaes-256-gcm-kc") as key:
        with key.view() as view:
            assert fields["sub-key"] == view
        bound = ciphertext.bound(ciphertext.header(Purpose.ENCRYPT, ciphertext.kek_id("billing", 1)), fields["aad"])
        assert fields["bound"] == bound
        envelope = CommittingKey(key).seal_with_nonce(fields["nonce"], fields["plaintext"], bound)
        assert Kek(kek).open(ciphertext.parse(fields["ciphertext"]), fields["aad"]) == fields["plaintext"]
    assert fields["ciphertext"] == ciphertext.header(Purpose.ENCRYPT, ciphertext.kek_id("billing", 1)) + envelope


def test_the_worked_example_of_an_earlier_ciphertext_comes_out_as_it_is_shown() -> None:
    fields = example("Ciphertext 02")
    with Secret(bytearray(fields["kek"])) as secret:
        envelope = EnvelopeKey(secret).seal_with_nonce(fields["nonce"], fields["plaintext"], fields["aad"])
    assert fields["ciphertext"] == earlier_header(ciphertext.kek_id("billing", 1)) + envelope


def test_the_worked_example_of_a_file_comes_out_as_it_is_shown() -> None:
    fields = example("MKE2")
    header = mke2.read_header(io.BytesIO(fields["file"][4:]).read)
    with Secret(bytearray(fields["kek"])) as kek, Secret(bytearray(fields["data-key"])) as data_key:
        opened = Kek(kek).open(ciphertext.parse(header.recipients[0].wrapped), fields["aad"])
        with data_key.view() as view, mke2.opened(header, data_key, fields["aad"]) as chunk_key:
            assert opened == view
            with chunk_key.view() as shown:
                assert fields["chunk-key"] == shown
            plaintext = bytearray(len(fields["plaintext"]))
            chunk = memoryview(fields["file"])[len(header.encode()) :]
            ChunkOpener(chunk_key).open_into(chunk, memoryview(plaintext), is_last=True)
    assert header.salt == fields["salt"]
    assert plaintext == fields["plaintext"]


def example(title: str) -> dict[str, bytes]:
    """The fields of the worked example of this title, in docs/formats.rst."""
    block = (
        page("formats.rst")
        .partition(f"{title}, a worked example\n")[2]
        .partition(".. code:: text\n\n")[2]
        .partition("\n\n")[0]
    )
    fields = re.findall(r"^    (\S+) +(\S.*(?:\n     .*)*)", block, re.MULTILINE)
    return {name: bytes.fromhex(value) for name, value in fields}


def test_every_decision_is_in_the_index_under_its_own_title() -> None:
    rows = re.findall(r"^\| (\d+) \| \[(.+)\]\((.+)\) \|$", page("decisions/index.md"), re.MULTILINE)
    files = sorted((DOCS / "decisions").glob("0*.md"))
    assert [name for _, _, name in rows] == [file.name for file in files]
    for (number, title, _), file in zip(rows, files, strict=True):
        assert file.read_text(encoding="utf-8").startswith(f"# {number}. {title}\n")
        assert file.name.startswith(f"{int(number):04d}-")


def test_what_the_readme_links_to_is_there() -> None:
    text = (ROOT / "README.rst").read_text(encoding="utf-8")
    links = re.findall(r"<([^>]+)>`__", text) + re.findall(r"^\.\. image:: (\S+)", text, re.MULTILINE)
    here = [link for link in links if not link.startswith("https://")]
    assert len(here) > 20
    assert [link for link in here if not (ROOT / link).is_file()] == []


def test_each_example_is_on_the_page_of_examples() -> None:
    here = DOCS / "examples"
    programs = {str(path.relative_to(here)) for path in here.rglob("*") if path.suffix in (".py", ".sh")}
    text = page("examples/index.rst")
    assert programs == set(re.findall(r"literalinclude:: (\S+)", text)) == set(re.findall(r"`[^`<]+ <([^>`]+)>`__", text))
