"""Each row of the configuration table: flag over environment over default."""

from __future__ import annotations

import grp
import sys
from pathlib import Path
from typing import Any

import pytest

from kms.errors import ConfigError
from kms.host.paths import data_directory
from kms.server.config import Places, log_format, resolve

HOME = {"HOME": "/home/nobody"}
DATA = Path("/home/nobody/.mini-kms")


@pytest.mark.parametrize(
    ("flag", "variable", "field", "default"),
    [
        ("tcp_port", "MINIKMS_TCP_PORT", "tcp_port", 9123),
        ("max_frame_bytes", "MINIKMS_MAX_FRAME_BYTES", "max_frame_bytes", 1048576),
        ("idle_timeout_ms", "MINIKMS_IDLE_TIMEOUT_MS", "idle_timeout", 30.0),
        ("max_connections", "MINIKMS_MAX_CONNECTIONS", "max_connections", 256),
    ],
)
def test_a_number_row_takes_flag_over_environment_over_default(
    flag: str, variable: str, field: str, default: float
) -> None:
    scale = 1000 if flag == "idle_timeout_ms" else 1
    assert getattr(resolve({}, HOME), field) == default
    assert getattr(resolve({}, {**HOME, variable: "2000"}), field) == 2000 / scale
    assert getattr(resolve({flag: 3000}, {**HOME, variable: "2000"}), field) == 3000 / scale


@pytest.mark.parametrize(
    ("flag", "variable", "default"),
    [
        ("unix_socket", "MINIKMS_UNIX_SOCKET", DATA / "kms.sock"),
        ("keystore", "MINIKMS_KEYSTORE", DATA / "keystore.json"),
        ("token_file", "MINIKMS_API_TOKEN_FILE", None),
        ("admin_token_file", "MINIKMS_ADMIN_TOKEN_FILE", None),
        ("passphrase_file", "MINIKMS_PASSPHRASE_FILE", None),
    ],
)
def test_a_path_row_takes_flag_over_environment_over_default(flag: str, variable: str, default: Path | None) -> None:
    assert getattr(Places({}, HOME), flag) == default
    assert getattr(Places({}, {**HOME, variable: "/env"}), flag) == Path("/env")
    assert getattr(Places({flag: "/flag"}, {**HOME, variable: "/env"}), flag) == Path("/flag")


def test_the_file_of_principals_is_in_the_data_directory_and_has_to_exist_only_when_it_is_always_kept() -> None:
    config = resolve({}, HOME)
    assert (config.principals, config.principals_named) == (DATA / "principals.toml", False)
    config = resolve({}, {**HOME, "MINIKMS_PRINCIPALS": "/env"})
    assert (config.principals, config.principals_named) == (Path("/env"), True)
    config = resolve({"principals": "/flag"}, {**HOME, "MINIKMS_PRINCIPALS": "/env"})
    assert (config.principals, config.principals_named) == (Path("/flag"), True)


def test_the_audit_log_is_in_the_data_directory_unless_it_is_always_kept() -> None:
    config = resolve({}, HOME)
    assert (config.audit.path, config.audit.is_always_kept) == (DATA / "audit.log", False)
    config = resolve({}, {**HOME, "MINIKMS_AUDIT_LOG": "/env"})
    assert (config.audit.path, config.audit.is_always_kept) == (Path("/env"), True)
    config = resolve({"audit_log": "/flag"}, {**HOME, "MINIKMS_AUDIT_LOG": "/env"})
    assert (config.audit.path, config.audit.is_always_kept) == (Path("/flag"), True)


def test_metrics_are_off_until_they_have_a_port() -> None:
    config = resolve({}, HOME)
    assert (config.metrics_port, config.metrics_groups) == (None, False)
    assert resolve({}, {**HOME, "MINIKMS_METRICS_PORT": "2000"}).metrics_port == 2000
    config = resolve({"metrics_port": "0", "metrics_groups": True}, {**HOME, "MINIKMS_METRICS_PORT": "2000"})
    assert (config.metrics_port, config.metrics_groups) == (0, True)
    with pytest.raises(ConfigError, match="without --metrics-port"):
        resolve({"metrics_groups": True}, HOME)


@pytest.mark.parametrize("missing", ["prometheus_client", "h11"])
def test_metrics_without_what_they_need_are_refused_with_the_way_to_install_it(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"pip install 'mini-kms\[metrics\]'"):
        resolve({"metrics_port": 0}, HOME)
    assert resolve({}, HOME).metrics_port is None


def test_the_group_of_the_Unix_socket_is_always_kept_and_has_to_exist() -> None:
    groups = grp.getgrall()[:2]
    assert resolve({}, HOME).unix_socket_gid is None
    environ = {**HOME, "MINIKMS_UNIX_SOCKET_GROUP": groups[0].gr_name}
    assert resolve({}, environ).unix_socket_gid == groups[0].gr_gid
    assert resolve({"unix_socket_group": groups[-1].gr_name}, environ).unix_socket_gid == groups[-1].gr_gid
    assert resolve({"no_unix": True}, environ).unix_socket_gid is None
    for name in ("no-such-group", "a\0b", "\ud800"):
        with pytest.raises(ConfigError, match="--unix-socket-group: there is no group"):
            resolve({"unix_socket_group": name}, HOME)


@pytest.mark.parametrize(("field", "name"), [("token_file", "api.token"), ("admin_token_file", "admin.token")])
def test_a_token_file_in_the_data_directory_is_the_default_if_it_exists(tmp_path: Path, field: str, name: str) -> None:
    places = Places({}, {"XDG_DATA_HOME": str(tmp_path)})
    assert getattr(places, field) is None
    (tmp_path / "mini-kms").mkdir()
    (tmp_path / "mini-kms" / name).touch()
    assert getattr(places, field) == tmp_path / "mini-kms" / name
    assert getattr(Places({field: "-"}, HOME), field) == Path("/dev/stdin")
    assert getattr(Places({field: "./-"}, HOME), field) == Path("-")


def test_a_systemd_credential_is_the_default_passphrase_file_if_it_exists(tmp_path: Path) -> None:
    places = Places({}, {**HOME, "CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert places.passphrase_file is None
    (tmp_path / "passphrase").touch()
    assert places.passphrase_file == tmp_path / "passphrase"


def test_the_data_directory_is_under_XDG_DATA_HOME_if_set_else_in_the_home() -> None:
    assert data_directory({"XDG_DATA_HOME": "/x", **HOME}) == Path("/x/mini-kms")
    assert data_directory(HOME) == DATA
    assert data_directory({}).name == ".mini-kms"


def test_a_relative_XDG_DATA_HOME_or_HOME_is_ignored() -> None:
    assert data_directory({"XDG_DATA_HOME": "here", **HOME}) == DATA
    assert data_directory({"HOME": "here"}).is_absolute()


def test_the_data_directory_is_looked_for_only_by_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_cls: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(nobody))
    names = ("unix_socket", "keystore", "principals", "audit_log")
    assert resolve({name: f"/x/{name}" for name in names}, {}).keystore == Path("/x/keystore")
    for name in names:
        with pytest.raises(ConfigError, match="set XDG_DATA_HOME to a directory, or name each file"):
            resolve({other: f"/x/{other}" for other in names if other != name}, {})


def test_no_tcp_and_no_unix_turn_a_listener_off_and_both_off_is_an_error() -> None:
    assert resolve({"no_tcp": True}, HOME).tcp_port is None
    assert resolve({"no_unix": True}, HOME).unix_socket is None
    with pytest.raises(ConfigError, match="no way in"):
        resolve({"no_tcp": True, "no_unix": True}, HOME)


@pytest.mark.parametrize(
    ("flags", "environ"),
    [
        ({"tcp_port": 65536}, {}),
        ({"tcp_port": -1}, {}),
        ({}, {"MINIKMS_TCP_PORT": "http"}),
        ({"max_frame_bytes": 10}, {}),
        ({"max_connections": 0}, {}),
        ({"idle_timeout_ms": 0}, {}),
        ({"metrics_port": 65536}, {}),
        ({}, {"MINIKMS_METRICS_PORT": "http"}),
    ],
)
def test_a_value_out_of_its_range_is_refused_and_names_where_it_came_from(
    flags: dict[str, Any], environ: dict[str, str]
) -> None:
    origin = next(iter(environ), None) or "--" + next(iter(flags)).replace("_", "-")
    with pytest.raises(ConfigError, match=origin):
        resolve(flags, {**HOME, **environ})


def test_a_log_is_for_people_unless_it_is_asked_for_as_json() -> None:
    assert log_format({}, HOME) == "human"
    assert log_format({}, {"MINIKMS_LOG_FORMAT": "json"}) == "json"
    assert log_format({"log_format": "human"}, {"MINIKMS_LOG_FORMAT": "json"}) == "human"
    with pytest.raises(ConfigError, match=r"^--log-format: give human or json$"):
        log_format({"log_format": "JSON"}, {})
    with pytest.raises(ConfigError, match="MINIKMS_LOG_FORMAT: "):
        log_format({}, {"MINIKMS_LOG_FORMAT": "xml"})


def test_an_empty_variable_counts_as_not_set() -> None:
    assert resolve({}, {**HOME, "MINIKMS_TCP_PORT": ""}).tcp_port == 9123


@pytest.mark.parametrize("variable", ["XDG_DATA_HOME", "HOME", "CREDENTIALS_DIRECTORY"])
def test_a_directory_where_nothing_can_be_looked_for_is_an_error_of_the_configuration(variable: str) -> None:
    places = Places({}, {**HOME, variable: "/" + "x" * 300})
    with pytest.raises(ConfigError, match="cannot look for /x"):
        assert places.passphrase_file if variable == "CREDENTIALS_DIRECTORY" else places.token_file


def test_no_principals_and_a_file_of_them_exclude_each_other(tmp_path: Path) -> None:
    environ = {"XDG_DATA_HOME": str(tmp_path)}
    assert resolve({"no_principals": True}, environ).no_principals
    (tmp_path / "mini-kms").mkdir()
    (tmp_path / "mini-kms" / "principals.toml").touch()
    with pytest.raises(ConfigError, match="--no-principals: there is a file"):
        resolve({"no_principals": True}, environ)
