"""What a contributor runs: `./scripts/dev SESSION`, or `nox -s SESSION` with a nox of one's own."""

from __future__ import annotations

import hashlib
import os
import secrets
import shlex
import shutil
import subprocess
from itertools import chain
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml("pyproject.toml")
DEVELOPMENT = Path(".dev")
SOCKET_PATH_BYTES = 107
UNIT_TESTS = ("pytest", "--ignore-glob=kms_tests/*/*")
"""What lies in the directories under kms_tests/ drives real programs or takes long, and has sessions of its own."""
INTEGRATION_TESTS = ("pytest", "kms_tests/integration", "kms_tests/transcripts")
FUZZ_VERSIONS = ("3.13", "3.12", "3.11")
"""Where atheris has wheels; elsewhere it takes a clang with libFuzzer to build."""

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "typing", "tests", "integration"]
nox.options.error_on_missing_interpreters = True


def supported_versions() -> list[str]:
    """The Python versions of pyproject's classifiers, "3.11" and so on."""
    prefix = "Programming Language :: Python :: "
    return [name.removeprefix(prefix) for name in PROJECT["project"]["classifiers"] if name.startswith(f"{prefix}3.")]


def find_interpreter(version: str) -> str | None:
    """The path of a Python of this version that runs.

    Being on PATH proves nothing: pyenv leaves a shim there for every version it has, and a shim of one that is not
    selected only prints an error. Such a version is looked for among pyenv's own as well.
    """
    directories = os.environ.get("PATH", os.defpath).split(os.pathsep)
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    directories += [str(path) for path in sorted(pyenv.glob(f"versions/{version}.*/bin"), reverse=True)]
    for directory in directories:
        path = shutil.which(f"python{version}", path=directory)
        if path is not None and _runs(path, version):
            return path
    return None


def _runs(path: str, version: str) -> bool:
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        answer = subprocess.run([path, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and answer.stdout.strip() == version


INTERPRETERS = {version: find_interpreter(version) for version in supported_versions()}


def install(session: nox.Session, group: str) -> None:
    """This package, editable, and a dependency group of pyproject."""
    session.install("-e", ".", *nox.project.dependency_groups(PROJECT, group))


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """The unit tests, on every supported Python that is installed here."""
    present = [version for version, path in INTERPRETERS.items() if path is not None]
    absent = [version for version, path in INTERPRETERS.items() if path is None]
    if absent:
        session.warn(f"not installed here, so not tested: Python {', '.join(absent)}")
    if not present:
        session.error("no supported Python was found, so nothing was tested")
    session.log(f"testing on Python {', '.join(present)}")
    for version in present:
        session.notify(f"tests-{version}", session.posargs)


def _unit_tests(session: nox.Session) -> None:
    """The unit tests on this one Python."""
    install(session, "test")
    session.run(*UNIT_TESTS, *session.posargs)


for _version, _path in INTERPRETERS.items():
    if _path is not None:
        nox.session(name=f"tests-{_version}", python=_path)(_unit_tests)


@nox.session
def integration(session: nox.Session) -> None:
    """The tests that drive the real programs."""
    install(session, "integration")
    session.run(*INTEGRATION_TESTS, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: its rules, and its format."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def typing(session: nox.Session) -> None:
    """mypy, strict."""
    install(session, "typing")
    session.install("nox")
    session.run("mypy")


@nox.session
def coverage(session: nox.Session) -> None:
    """How much of the package the unit and integration tests reach, subprocesses included."""
    install(session, "coverage")
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", *UNIT_TESTS, *session.posargs)
    session.run("coverage", "run", "-m", *INTEGRATION_TESTS, *session.posargs)
    session.run("coverage", "combine")
    session.run("coverage", "report", "--fail-under=95")


@nox.session
def minimums(session: nox.Session) -> None:
    """The unit tests with the lowest versions that pyproject allows."""
    project = PROJECT["project"]
    requirements = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    floors = [requirement.replace(">=", "==") for requirement in requirements]
    # Not in the session's temp directory: that becomes TMPDIR, and may be too deep for the tests' Unix sockets.
    constraints = Path(session.virtualenv.location, "minimums.txt")
    constraints.write_text("\n".join(floors) + "\n", encoding="utf-8")
    session.install("-e", ".", "-c", str(constraints), *nox.project.dependency_groups(PROJECT, "test"))
    session.run(*UNIT_TESTS, *session.posargs)


@nox.session(reuse_venv=True)
def serve(session: nox.Session) -> None:
    """A server to try things with; its passphrase, tokens and keystore are made in .dev/ on the first run."""
    _install_unless_installed(session)
    os.chdir(ROOT)
    directory = DEVELOPMENT.absolute()
    socket = directory / "kms.sock"
    # A setting or a secret of the user's own is not to get in here.
    places = dict.fromkeys(name for name in os.environ if name.startswith("MINIKMS_")) | {
        "MINIKMS_KEYSTORE": str(directory / "keystore.json"),
        "MINIKMS_API_TOKEN_FILE": str(directory / "api.token"),
        "MINIKMS_ADMIN_TOKEN_FILE": str(directory / "admin.token"),
        "MINIKMS_PASSPHRASE_FILE": str(directory / "passphrase"),
        # A checkout may lie deeper than the path of a Unix socket may be long; then the programs find it from here alone.
        "MINIKMS_UNIX_SOCKET": str(socket if len(os.fsencode(socket)) <= SOCKET_PATH_BYTES else DEVELOPMENT / "kms.sock"),
        "MINIKMS_TCP_PORT": "9123",
        # What else has its place in the data directory, such as a file of principals, is not to come from the real one.
        "XDG_DATA_HOME": str(directory),
    }
    _make_private(DEVELOPMENT, DEVELOPMENT / "passphrase")
    if not (DEVELOPMENT / "keystore.json").exists():
        session.run("kms-admin", "init", env=places, silent=True)
    programs = Path(session.bin).absolute()
    (DEVELOPMENT / "env").write_text(_environment(programs, places), encoding="utf-8")
    print(_LINES_TO_PASTE, flush=True)
    # Longer than the server's own 5 seconds of grace: nox would kill it 0.3 seconds after a Ctrl-C.
    session.run("kms-server", *session.posargs, env=places, interrupt_timeout=8)


def _install_unless_installed(session: nox.Session) -> None:
    """Install the package in place, unless that was done with this pyproject.toml: pip takes seconds to find that out."""
    mark = Path(session.virtualenv.location, "installed.sha256")
    wanted = hashlib.sha256(Path("pyproject.toml").read_bytes()).hexdigest()
    if mark.exists() and mark.read_text(encoding="ascii") == wanted and Path(session.bin, "kms-server").exists():
        return
    session.install("-e", ".")
    mark.write_text(wanted, encoding="ascii")


def _make_private(directory: Path, passphrase: Path) -> None:
    for private in (directory, directory / "mini-kms"):
        private.mkdir(mode=0o700, exist_ok=True)
        private.chmod(0o700)
    if not passphrase.exists():
        descriptor = os.open(passphrase, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")


def _environment(programs: Path, places: dict[str, str | None]) -> str:
    """What `. .dev/env` does in a shell: the server's programs come first, and find it, its tokens and its files."""
    data = DEVELOPMENT.absolute() / "mini-kms"
    found = places | {"MINIKMS_PRINCIPALS": str(data / "principals.toml"), "MINIKMS_AUDIT_LOG": str(data / "audit.log")}
    lines = [
        # Values that would win over these files.
        "unset MINIKMS_API_TOKEN MINIKMS_ADMIN_TOKEN MINIKMS_PASSPHRASE",
        f"export PATH={shlex.quote(str(programs))}:$PATH",
        *[f"export {name}={shlex.quote(path)}" for name, path in found.items() if path and name.startswith("MINIKMS_")],
    ]
    return "\n".join((*lines, ""))


_LINES_TO_PASTE = """
In a second terminal, in this directory:  . .dev/env
Then the programs find this server:       kms-client health
Who may do what, once you want to say it: .dev/mini-kms/principals.toml (docs/team.rst)
Flags of kms-server stand behind --:      ./scripts/dev serve -- --no-principals
Ctrl-C here stops it.
"""


@nox.session
def faults(session: nox.Session) -> None:
    """Faults at every step of a save, and every state a power cut may leave; needs strace, and root to attach it."""
    install(session, "test")
    session.run("pytest", "kms_tests/faults", *session.posargs)


@nox.session(name="secrets")
def secrets_session(session: nox.Session) -> None:
    """Where secrets could leak: memory, logs, files for an instant, timing; and the systemd unit. Needs root."""
    install(session, "test")
    session.run("pytest", "kms_tests/secrets", *session.posargs)


@nox.session
def load(session: nox.Session) -> None:
    """Load and abuse of a real server, and the figures; `-- --long` takes a quarter of an hour."""
    install(session, "test")
    session.run("pytest", "-rP", "kms_tests/load", *session.posargs)


@nox.session(python=next((INTERPRETERS[version] for version in FUZZ_VERSIONS if INTERPRETERS.get(version)), None))
def fuzz(session: nox.Session) -> None:
    """The parsers under hypothesis and a coverage-guided fuzzer; hours of it with `-- --long`."""
    try:
        install(session, "fuzz")
    except nox.command.CommandFailed:
        session.error(f"atheris could not be installed here; it has wheels for Python {', '.join(FUZZ_VERSIONS)}")
    session.run("pytest", "kms_tests/fuzz", *session.posargs)


@nox.session
def vectors(session: nox.Session) -> None:
    """Known answers of NIST and the RFCs, and the formats against an independent reader and writer."""
    install(session, "vectors")
    session.run("pytest", "kms_tests/vectors", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """These pages as HTML, in build/docs; and the manual pages, which have to be committed in docs/man as they come out."""
    install(session, "docs")
    built = Path("build", "docs")
    # Sphinx reads no page again that has not changed, and so would not warn of it a second time.
    shutil.rmtree(built, ignore_errors=True)
    # Each reads the pages for itself: of shared ones the manual pages would have the HTML's quotation marks.
    for builder in ("html", "man"):
        session.run(
            "sphinx-build", "-W", "--keep-going", "-q", "-b", builder, "docs", str(built / builder), *session.posargs
        )
    session.log(f"open {built / 'html' / 'index.html'}")
    _renew_man_pages(session, built / "man", Path("docs", "man"))


def _renew_man_pages(session: nox.Session, built: Path, committed: Path) -> None:
    new = {path.name: path.read_bytes() for path in built.glob("*.1")}
    old = {path.name: path.read_bytes() for path in committed.glob("*.1")}
    if new == old:
        return
    committed.mkdir(exist_ok=True)
    for name in old.keys() - new.keys():
        (committed / name).unlink()
    for name, content in new.items():
        (committed / name).write_bytes(content)
    session.error(f"{committed} was not as the pages say; now it is: commit it")


@nox.session
def package(session: nox.Session) -> None:
    """Wheel and sdist, made into dist/, looked through and tried."""
    install(session, "package")
    shutil.rmtree("dist", ignore_errors=True)
    # The wheel is made from the sdist, so that shows whether the sdist has all it takes.
    session.run("python", "-m", "build", "--outdir", "dist")
    session.run("twine", "check", "--strict", *[str(path) for path in sorted(Path("dist").iterdir())])
    session.run("pytest", "kms_tests/package", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmark, of a few minutes; `-- --help` says what it takes, `-- --short` only shows that it works."""
    install(session, "bench")
    session.run("python", "-m", "scripts.bench", *session.posargs)
