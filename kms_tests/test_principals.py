"""The file of principals: what it may say, and that everything else is refused with its place and without its value."""

from __future__ import annotations

import contextlib
import datetime
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms import limits
from kms.core.policy import OF_SERVER, Operation
from kms.errors import ConfigError, InputMissingError, SecretFileError
from kms.service.principals import Principals, load, parse

DIGEST = sha256(b"one").hexdigest()
OTHER = sha256(b"two").hexdigest()
PATH = Path("/etc/mini-kms/principals.toml")
EXAMPLE = f"""
[shared]
api_token = true
admin_token = false

[principals.billing]
token_sha256 = ["{DIGEST}", {{ digest = "{OTHER.upper()}", expires = 2027-01-01T00:00:00Z }}]
uids = [1001]
gids = [100]

[[principals.billing.allow]]
groups = ["billing", "billing-*"]
operations = ["Encrypt", "Decrypt", "GenerateDataKey"]
aad_prefix = "aW52b2ljZS8="

[[principals.billing.allow]]
groups = ["billing"]
operations = ["RotateKeyGroup"]

[[principals.billing.deny]]
groups = ["billing-secret"]
operations = ["*"]

[principals.nobody-yet]
"""

RULE = 'groups = ["a"]\noperations = ["Encrypt"]\n'
CANARY = "the-token-itself-canary"


def read(text: str) -> Principals:
    return parse(text.encode(), PATH)


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        read(text)
    message = str(refused.value)
    assert message.startswith(f"{PATH}: ")
    assert message.isprintable(), "it is one line"
    return message.removeprefix(f"{PATH}: ")


def test_the_example_is_read_as_it_is_meant() -> None:
    principals = read(EXAMPLE)
    assert (principals.api_token, principals.admin_token) == (True, False)
    assert list(principals.members) == ["billing", "nobody-yet"]
    billing = principals.members["billing"]
    assert [token.digest for token in billing.tokens] == [sha256(b"one").digest(), sha256(b"two").digest()]
    assert [token.expires for token in billing.tokens] == [None, 1798761600.0]
    assert (billing.uids, billing.gids) == ((1001,), (100,))
    assert billing.grants.allows(Operation.ENCRYPT, "billing-2026", b"invoice/1")
    assert not billing.grants.allows(Operation.ENCRYPT, "billing-2026", b"")
    assert billing.grants.allows(Operation.ROTATE_KEY_GROUP, "billing", b"")
    assert not billing.grants.allows(Operation.ENCRYPT, "billing-secret", b"invoice/1")
    assert billing.grants.explain(Operation.ENCRYPT, "billing-secret", b"").rule == "principals.billing.deny[0]"
    assert principals.members["nobody-yet"].tokens == ()


@pytest.mark.parametrize("text", ["", "\n \n", "# all gone\n", "[shared]\n", "[principals]\n", "[shared]\n[principals]\n"])
def test_a_file_that_has_lost_its_content_is_an_error(text: str) -> None:
    assert "it has no principal, and does not say whether the shared tokens are on" in refusal(text)


@pytest.mark.parametrize("name", ["api_token", "admin_token"])
@pytest.mark.parametrize("is_on", [True, False])
def test_a_file_may_say_that_there_are_no_principals(name: str, is_on: bool) -> None:
    principals = read(f"[shared]\n{name} = {str(is_on).lower()}")
    on = {"api_token": True, "admin_token": True} | {name: is_on}
    assert (principals.api_token, principals.admin_token, dict(principals.members)) == (*on.values(), {})


def test_an_expiry_counts_from_its_own_offset() -> None:
    text = f'[principals.a]\ntoken_sha256 = [{{ digest = "{DIGEST}", expires = 2027-01-01T00:00:00+02:00 }}]\n'
    expected = datetime.datetime(2026, 12, 31, 22, tzinfo=datetime.UTC).timestamp()
    assert read(text).members["a"].tokens[0].expires == expected


def test_a_star_is_every_operation_of_both_planes() -> None:
    grants = read('[[principals.a.allow]]\ngroups = ["x"]\noperations = ["*"]\n').members["a"].grants
    assert all(grants.allows(one, "x", b"") for one in Operation if one not in {Operation.HEALTH, *OF_SERVER})
    everywhere = read('[[principals.a.allow]]\ngroups = ["*"]\noperations = ["*"]\n').members["a"].grants
    assert all(everywhere.allows(one, None, b"") for one in OF_SERVER)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("shred = 1", 'unknown key "shred"'),
        ("[shared]\napi = true", 'shared: unknown key "api"'),
        ("[shared]\napi_token = 1", "shared.api_token: expected bool, got int"),
        ("[principals.billing]\ntokens = []", 'principals.billing: unknown key "tokens"'),
        ('[[principals.billing.allow]]\ngroup = ["a"]', 'principals.billing.allow[0]: unknown key "group"'),
        (f"[[principals.a.allow]]\n{RULE}[[principals.a.allow]]\n{RULE}x = 1", 'principals.a.allow[1]: unknown key "x"'),
        (f'[[principals.a.deny]]\n{RULE}aad_prefix = "YQ=="', 'principals.a.deny[0]: unknown key "aad_prefix"'),
        (
            f'[principals.a]\ntoken_sha256 = [{{ digest = "{DIGEST}", until = 1 }}]',
            'principals.a.token_sha256[0]: unknown key "until"',
        ),
        ('[[principals.a.allow]]\ngroups = ["a"]', "principals.a.allow[0]: operations is missing"),
        ("principals = 1", "principals: expected table, got int"),
        ("[principals]\na = 1", "principals.a: expected table, got int"),
        ("[principals.a]\nallow = {}", "principals.a.allow: expected array, got table"),
        ('[principals.a]\nuids = ["root"]', "principals.a.uids[0]: expected int, got str"),
        ("[principals.a]\nuids = [true]", "principals.a.uids[0]: expected int, got bool"),
        ("[principals.a]\nuids = [1, -1]", "principals.a.uids[1]: expected int >= 0"),
        ("[principals.a]\ngids = [4294967295]", "principals.a.gids[0]: expected int <= 4294967294"),
        ("[principals.a]\nuids = [65534]", "principals.a.uids[0]: 65534 is everyone whom"),
        ("[principals.a]\ngids = [1, 65534]", "principals.a.gids[1]: 65534 is everyone whom"),
        ('"line\\nend" = 1', 'unknown key "line\\nend"'),
        ('["' + "x" * 1000 + '"]', f'unknown key "{"x" * 64}..."'),
        ('[principals.""]', 'principals."": a principal\'s name has 1 to 64'),
        ('[principals."a b"]', 'principals."a b": a principal\'s name has'),
        ("[principals.api]", 'principals."api": api is what the log calls the shared API token'),
        ("[principals.admin]", 'principals."admin": admin is what the log calls the shared admin token'),
        ('[[principals.a.allow]]\ngroups = []\noperations = ["Encrypt"]', "allow[0].groups: expected array of length >= 1"),
        ('[[principals.a.allow]]\ngroups = [""]\noperations = ["Encrypt"]', "allow[0].groups[0]: has 1 to 255 bytes"),
        ('[[principals.a.allow]]\ngroups = ["a"]\noperations = []', "allow[0].operations: expected array of length >= 1"),
        ('[[principals.a.deny]]\ngroups = ["a"]\noperations = ["*", "Ping"]', "deny[0].operations[1]: not an operation"),
        ('[[principals.a.deny]]\ngroups = ["a"]\noperations = ["encrypt"]', "deny[0].operations[0]: not an operation"),
        ('[[principals.a.allow]]\ngroups = ["a"]\noperations = ["Health"]', "operations[0]: Health needs no grant"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text: str, complaint: str) -> None:
    assert complaint in refusal(text)


@pytest.mark.parametrize("operations", ['["*"]', '["Encrypt", "RotateKeyGroup"]', '["ListKeyGroups"]'])
def test_an_aad_prefix_stands_only_beside_operations_that_have_an_aad(operations: str) -> None:
    text = f'[[principals.a.allow]]\ngroups = ["a"]\noperations = {operations}\naad_prefix = "YQ=="'
    assert refusal(text).startswith("principals.a.allow[0].aad_prefix: only beside operations with an AAD: Decrypt")


@pytest.mark.parametrize("prefix", ["", "YQ", "YR==", "YQ==\\n", "?", "\u00e9", "YWE=YQ==", "QUFB" * 400])
def test_an_aad_prefix_is_canonical_base64_and_neither_empty_nor_huge(prefix: str) -> None:
    text = f'[[principals.a.allow]]\n{RULE}aad_prefix = "{prefix}"'
    assert refusal(text).startswith("principals.a.allow[0].aad_prefix: not canonical base64")


@pytest.mark.parametrize(
    ("expires", "complaint"),
    [
        ("2027-01-01T00:00:00", "expected datetime with a timezone component"),
        ("2027-01-01", "got date"),
        ("00:00:00", "got time"),
        ('"2027-01-01T00:00:00Z"', "got str"),
        ("1798761600", "got int"),
    ],
)
def test_an_expiry_has_a_date_a_time_and_an_offset(expires: str, complaint: str) -> None:
    text = f'[principals.a]\ntoken_sha256 = [{{ digest = "{DIGEST}", expires = {expires} }}]'
    message = refusal(text)
    assert message.startswith("principals.a.token_sha256[0].expires: ")
    assert complaint in message


@pytest.mark.parametrize(
    ("first", "second", "complaint"),
    [
        (f'token_sha256 = ["{DIGEST}"]', f'token_sha256 = ["{OTHER}", "{DIGEST.upper()}"]', "b.token_sha256[1]"),
        ("uids = [1, 2]", "uids = [3, 2]", "b.uids[1]"),
        ("gids = [1, 2]", "gids = [2]", "b.gids[0]"),
    ],
)
def test_no_two_principals_claim_the_same_token_uid_or_gid(first: str, second: str, complaint: str) -> None:
    message = refusal(f"[principals.a]\n{first}\n[principals.b]\n{second}")
    assert message.startswith(f"principals.{complaint}: the same as principals.a.")


def test_one_principal_claims_nothing_twice_and_a_uid_is_no_gid() -> None:
    assert "a.uids[1]: the same as principals.a.uids[0]" in refusal("[principals.a]\nuids = [1, 1]")
    assert read("[principals.a]\nuids = [1]\n[principals.b]\ngids = [1]").members.keys() == {"a", "b"}


@pytest.mark.parametrize(
    "text",
    [
        f'[principals.a]\ntoken_sha256 = ["{CANARY}"]',
        f'[principals.a]\ntoken_sha256 = [{{ digest = "{CANARY}" }}]',
        f'[principals.a]\ntoken_sha256 = "{CANARY}"',
        f'[principals.a]\nuids = ["{CANARY}"]',
        f'[[principals.a.allow]]\ngroups = ["a"]\noperations = ["{CANARY}"]',
        f'[[principals.a.allow]]\n{RULE}aad_prefix = "{CANARY}"',
        f"[principals.a]\ntoken_sha256 = [{CANARY}]",
        f'[principals.a]\ntoken_sha256 = ["{CANARY}',
        f'[principals.a]\ntoken_sha256 = ["{CANARY}\x00"]',
    ],
)
def test_a_token_in_the_place_of_a_digest_or_elsewhere_is_not_shown(text: str) -> None:
    assert CANARY not in refusal(text)


def test_the_digest_of_the_empty_token_is_nobodys() -> None:
    text = f'[principals.a]\ntoken_sha256 = ["{sha256(b"").hexdigest()}"]'
    assert refusal(text) == "principals.a.token_sha256[0]: the digest of an empty token, which everybody has"


@pytest.mark.parametrize("digest", ["", "ab", DIGEST[:-1], DIGEST + "0", DIGEST + "\\n", "g" * 64, "\uff11" * 64])
def test_a_digest_is_64_hexadecimal_digits(digest: str) -> None:
    text = f'[principals.a]\ntoken_sha256 = ["{digest}"]'
    assert refusal(text).startswith("principals.a.token_sha256[0]: not a SHA-256 digest")


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"a = = 1", "not TOML, at line 1, column 5"),
        (b'a = "', "not TOML, at end of document"),
        (b"\xff", "not TOML"),
        (b"a = " + b"[" * 5000, "not TOML"),
        (b"a = " + b"9" * 5000, "not TOML"),
        (b"#" * limits.MAX_PRINCIPALS_BYTES + b"\n", f"more than {limits.MAX_PRINCIPALS_BYTES} bytes"),
    ],
)
def test_what_is_not_TOML_or_too_long_is_refused(raw: bytes, complaint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(raw, PATH)
    assert str(refused.value) == f"{PATH}: {complaint}"


def _tokens(count: int) -> str:
    return f"[principals.a]\ntoken_sha256 = {[f'{number:064x}' for number in range(count)]}"


def _ids(kind: str) -> list[str]:
    return [f"[principals.a]\n{kind} = {list(range(count))}" for count in _around(limits.MAX_IDS_PER_PRINCIPAL)]


def _around(bound: int) -> tuple[int, int]:
    return bound, bound + 1


@pytest.mark.parametrize(
    ("most", "more"),
    [
        [_tokens(count) for count in _around(limits.MAX_TOKENS_PER_PRINCIPAL)],
        _ids("uids"),
        _ids("gids"),
        [f"[[principals.a.allow]]\n{RULE}" * count for count in _around(limits.MAX_RULES_PER_PRINCIPAL)],
        [f"[[principals.a.deny]]\n{RULE}" * count for count in _around(limits.MAX_RULES_PER_PRINCIPAL)],
        [
            f'[[principals.a.allow]]\ngroups = {["g"] * count}\noperations = ["Encrypt"]'
            for count in _around(limits.MAX_GLOBS_PER_RULE)
        ],
        [
            f'[[principals.a.allow]]\ngroups = ["{"g" * count}"]\noperations = ["Encrypt"]'
            for count in _around(limits.MAX_GROUP_NAME_BYTES)
        ],
        ["".join(f"[principals.p{one}]\n" for one in range(count)) for count in _around(limits.MAX_PRINCIPALS)],
    ],
    ids=["tokens", "uids", "gids", "allow rules", "deny rules", "globs", "a glob's length", "principals"],
)
def test_every_number_has_a_bound(most: str, more: str) -> None:
    read(most)
    assert "principals" in refusal(more)


def spoiled(start: int, length: int, other: bytes) -> bytes:
    """The example with a part of it replaced."""
    raw = EXAMPLE.encode()
    return raw[:start] + other + raw[start + length :]


PARTS = st.sampled_from(
    [b"", b'"', b"]", b"[[", b"\n", b"=", b"0", b"-1", b"1e400", b"{", b"true", b"nan", b"\xff", b'"\\ud800"']
)


@given(
    st.binary(max_size=200)
    | st.builds(spoiled, st.integers(0, len(EXAMPLE)), st.integers(0, 80), PARTS | st.binary(max_size=8))
)
def test_no_file_whatever_ends_otherwise_than_in_principals_or_a_ConfigError(raw: bytes) -> None:
    with contextlib.suppress(ConfigError):
        parse(raw, PATH)


def test_the_file_has_to_be_private_as_a_secret_is(tmp_path: Path) -> None:
    path = tmp_path / "principals.toml"
    with pytest.raises(InputMissingError):
        load(path)
    path.write_text(EXAMPLE)
    path.chmod(0o644)
    with pytest.raises(SecretFileError, match="chmod 600"):
        load(path)
    path.chmod(0o600)
    assert load(path).members.keys() == {"billing", "nobody-yet"}
