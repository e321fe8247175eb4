"""What `./scripts/dev package` has made in dist/: is all in it, and does it work for who has nothing else?"""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

from kms_tests.integration.processes import ROOT

SHARED = {
    "share/man/man1/kms-admin.1",
    "share/man/man1/kms-client.1",
    "share/man/man1/kms-server.1",
    "share/mini-kms/grafana.json",
    "share/mini-kms/systemd/mini-kms.service",
    "share/mini-kms/systemd/tcp.conf",
    "share/mini-kms/systemd/team.conf",
}


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What `command` prints; it has to succeed."""
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def only(pattern: str) -> Path:
    (path,) = (ROOT / "dist").glob(pattern)
    return path


@pytest.fixture(scope="module")
def wheel() -> list[str]:
    """The names of what is in the wheel."""
    with zipfile.ZipFile(only("*.whl")) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def metadata() -> Message:
    with zipfile.ZipFile(only("*.whl")) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the wheel and what it needs, and knows nothing of this checkout."""
    place = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", place)
    run(place / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", only("*.whl"))
    return place


def tracked() -> set[str]:
    return set(run("git", "ls-files").splitlines())


def test_the_wheel_has_the_package_and_what_its_users_need_and_nothing_else(wheel: list[str]) -> None:
    package = {name for name in wheel if name.startswith("kms/")}
    shared = {name.partition(".data/data/")[2] for name in wheel if ".data/data/" in name}
    assert package == {name for name in tracked() if name.startswith("kms/")}
    assert shared == SHARED
    assert all(".dist-info/" in name for name in wheel if name not in package and ".data/data/" not in name)


def test_the_sdist_has_every_file_of_the_repository() -> None:
    with tarfile.open(only("*.tar.gz")) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert tracked() - names == set()
    assert names - tracked() == {"PKG-INFO"}


def test_on_the_index_the_readme_links_to_nothing_that_is_only_in_the_repository(metadata: Message) -> None:
    text = str(metadata.get_payload())
    assert text.startswith("mini-kms\n====")
    targets = re.findall(r"<([^>]+)>`__|\.\. image:: (\S+)", text)
    assert len(targets) > 20
    assert [target for link in targets for target in link if target and not target.startswith("https://")] == []


def test_the_metadata_says_where_the_project_is(metadata: Message) -> None:
    urls = dict(value.split(", ", 1) for value in metadata.get_all("Project-URL", []))
    assert set(urls) == {"Source", "Documentation", "Changelog", "Issues", "Security"}
    for url in urls.values():
        if "/blob/main/" in url:
            assert (ROOT / url.partition("/blob/main/")[2]).is_file(), url
    assert metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.parametrize("program", ["kms-admin", "kms-client", "kms-server"])
def test_an_installed_program_runs_and_has_its_manual_page_beside_it(installed: Path, program: str) -> None:
    assert re.fullmatch(rf"{program} \d+\.\d+\.\d+\n", run(installed / "bin" / program, "--version", cwd=installed))
    assert (installed / "share" / "man" / "man1" / f"{program}.1").is_file()


def test_an_installed_library_is_typed_and_comes_from_where_it_was_installed(installed: Path) -> None:
    program = "import kms, pathlib; print(pathlib.Path(kms.__file__).with_name('py.typed'))"
    path = Path(run(installed / "bin" / "python", "-I", "-c", program, cwd=installed).strip())
    assert path.is_file()
    assert path.is_relative_to(installed)
