"""The authorization seam, and each rule of the policy that has grants."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.core.policy import (
    OF_SERVER,
    AllowAll,
    GrantPolicy,
    Grants,
    KeyAuthorizationPolicy,
    Operation,
    Plane,
    Principal,
    Rule,
)
from kms.limits import MAX_DECISIONS_KEPT, MAX_GROUP_NAME_BYTES


@pytest.mark.parametrize("operation", Operation)
@pytest.mark.parametrize("group", [None, "default"])
def test_a_team_that_trusts_its_tokens_is_allowed_everything(operation: Operation, group: str | None) -> None:
    policy: KeyAuthorizationPolicy = AllowAll()
    assert policy.allows(Principal("api"), operation, group, b"")


def test_the_operations_are_the_ones_of_the_wire() -> None:
    assert {operation.value for operation in Operation} == {
        "Health",
        "GenerateDataKey",
        "GenerateDataKeyWithoutPlaintext",
        "GenerateRandom",
        "Encrypt",
        "Decrypt",
        "ReEncrypt",
        "CreateKeyGroup",
        "RotateKeyGroup",
        "ListKeyGroups",
        "DescribeKeyGroup",
        "DisableVersion",
        "EnableVersion",
        "Status",
        "Reload",
        "DestroyVersion",
    }


def test_there_are_two_planes() -> None:
    assert {plane.value for plane in Plane} == {"data", "control"}


def test_a_principal_is_a_value_that_does_not_change() -> None:
    principal = Principal("api")
    assert principal == Principal("api")
    with pytest.raises(AttributeError):
        principal.name = "admin"  # type: ignore[misc] # that it cannot be done is the test


NAMES = [
    "billing",
    "billing-2026",
    "billing-secret",
    "Billing",
    "b",
    "payroll",
    "caf\u00e9",
    "cafe\u0301",
    "a[b]",
    "new\nline",
]
GLOBS = [
    "*",
    "billing",
    "billing-*",
    "b*",
    "?",
    "[ab]*",
    "[!b]*",
    "a[[]b]",
    "*-*",
    "caf\u00e9",
    "[",
    "new?line",
    "x&&y[a--b]",
]
GRANTABLE = [operation for operation in Operation if operation is not Operation.HEALTH]


def rule(place: str, groups: str, *operations: Operation, aad_prefix: bytes = b"") -> Rule:
    return Rule(place, tuple(groups.split()), frozenset(operations or GRANTABLE), aad_prefix)


def test_what_nothing_grants_is_refused() -> None:
    nothing = Grants([])
    for operation in GRANTABLE:
        assert not nothing.allows(operation, "billing", b"")
    assert not nothing.allows(Operation.LIST_KEY_GROUPS, None, b"")


@pytest.mark.parametrize("granted", GRANTABLE)
def test_no_grant_implies_another(granted: Operation) -> None:
    grants = Grants([rule("allow[0]", "billing", granted)])
    on_billing = [operation for operation in GRANTABLE if grants.allows(operation, "billing", b"")]
    assert on_billing == ([] if granted in OF_SERVER else [granted])
    assert grants.allows(Operation.LIST_KEY_GROUPS, None, b"") == (granted is Operation.LIST_KEY_GROUPS)


@pytest.mark.parametrize("operation", sorted(OF_SERVER))
def test_what_is_about_the_server_is_granted_with_every_key_group_alone(operation: Operation) -> None:
    def allows(*globs: str, deny: tuple[Rule, ...] = ()) -> bool:
        return Grants([Rule("allow[0]", globs, frozenset(Operation))], deny).allows(operation, None, b"")

    assert allows("*")
    assert allows("billing", "*")
    assert not allows("billing", "**", "?*")
    assert allows("*", deny=(rule("deny[0]", "billing"),))
    assert not allows("*", deny=(rule("deny[0]", "*", operation),))
    assert not Grants([Rule("allow[0]", ("*",), frozenset({operation}), b"x")]).allows(operation, None, b"")


def test_deny_wins_over_every_allow() -> None:
    grants = Grants(
        [rule("allow[0]", "billing-*"), rule("allow[1]", "billing-secret", Operation.ENCRYPT)],
        [rule("deny[0]", "billing-secret", Operation.ENCRYPT)],
    )
    assert grants.allows(Operation.ENCRYPT, "billing-2026", b"")
    assert not grants.allows(Operation.ENCRYPT, "billing-secret", b"")
    assert grants.allows(Operation.DECRYPT, "billing-secret", b""), "only what it names is denied"


@pytest.mark.parametrize(
    ("glob", "matched"),
    [
        ("billing", ["billing"]),
        ("billing-*", ["billing-2026", "billing-secret"]),
        ("[bB]illing", ["billing", "Billing"]),
        ("?", ["b"]),
        ("caf\u00e9", ["caf\u00e9"]),
        ("a[[]b]", ["a[b]"]),
        ("new*", ["new\nline"]),
        ("*", NAMES),
    ],
)
def test_a_glob_is_compared_with_the_whole_name_as_it_is(glob: str, matched: list[str]) -> None:
    grants = Grants([Rule("allow[0]", (glob,), frozenset({Operation.ENCRYPT}))])
    assert [name for name in NAMES if grants.allows(Operation.ENCRYPT, name, b"")] == matched


def test_an_aad_prefix_has_to_be_met_by_each_request() -> None:
    grants = Grants([rule("allow[0]", "*", Operation.ENCRYPT, aad_prefix=b"invoice/")])
    for _ in range(2):  # the second time from what is kept
        assert grants.allows(Operation.ENCRYPT, "billing", b"invoice/7")
        assert grants.allows(Operation.ENCRYPT, "billing", b"invoice/")
        assert not grants.allows(Operation.ENCRYPT, "billing", b"invoice")
        assert not grants.allows(Operation.ENCRYPT, "billing", b"")


def test_of_two_rules_one_whose_prefix_is_met_is_enough() -> None:
    grants = Grants([rule("allow[0]", "*", Operation.ENCRYPT, aad_prefix=b"a"), rule("allow[1]", "b*", Operation.ENCRYPT)])
    assert grants.allows(Operation.ENCRYPT, "billing", b"")
    assert grants.allows(Operation.ENCRYPT, "payroll", b"a")
    assert not grants.allows(Operation.ENCRYPT, "payroll", b"b")


def test_Health_needs_no_grant_and_no_deny_takes_it_away() -> None:
    assert Grants([], [rule("deny[0]", "*")]).allows(Operation.HEALTH, None, b"")


def test_a_name_that_no_group_can_have_is_refused_and_not_kept() -> None:
    grants = Grants([rule("allow[0]", "*")])
    before = _kept(grants)
    assert not grants.allows(Operation.ENCRYPT, "x" * (MAX_GROUP_NAME_BYTES + 1), b"")
    assert _kept(grants) == before


def test_what_is_kept_of_decisions_is_bounded_however_many_names_are_made_up() -> None:
    grants = Grants([rule("allow[0]", "a*")])
    for number in range(3 * MAX_DECISIONS_KEPT):
        assert grants.allows(Operation.ENCRYPT, f"a{number}", b"")
        assert not grants.allows(Operation.ENCRYPT, f"b{number}", b"")
        assert _kept(grants) <= MAX_DECISIONS_KEPT


def _kept(grants: Grants) -> int:
    return len(grants._decisions)


def test_the_policy_knows_principals_by_name_and_refuses_those_it_does_not_know() -> None:
    policy = GrantPolicy({"billing": Grants([rule("allow[0]", "billing")])}, trusted=["admin"])
    for name, allowed in (("billing", True), ("admin", True), ("removed", False)):
        assert policy.allows(Principal(name), Operation.ROTATE_KEY_GROUP, "billing", b"") is allowed
    assert policy.allows(Principal("admin"), Operation.ROTATE_KEY_GROUP, "payroll", b"")
    assert not policy.allows(Principal("billing"), Operation.ROTATE_KEY_GROUP, "payroll", b"")


def test_an_explanation_names_the_place_of_the_rule_that_decides() -> None:
    grants = Grants(
        [rule("allow[0]", "billing", Operation.ENCRYPT, aad_prefix=b"invoice/"), rule("allow[1]", "b*", Operation.DECRYPT)],
        [rule("deny[0]", "*secret"), rule("deny[1]", "billing-secret")],
    )
    assert grants.explain(Operation.DECRYPT, "billing", b"") == (True, "allow[1]", "allow[1] allows it")
    assert grants.explain(Operation.DECRYPT, "billing-secret", b"") == (False, "deny[0]", "deny[0] denies it")
    assert grants.explain(Operation.DECRYPT, "payroll", b"") == (False, None, "no rule allows it")
    assert grants.explain(Operation.ENCRYPT, "billing", b"invoice/7") == (True, "allow[0]", "allow[0] allows it")
    assert "allow[0] would, for an AAD" in grants.explain(Operation.ENCRYPT, "billing", b"other").reason
    assert grants.explain(Operation.HEALTH, "billing", b"").allowed
    assert not grants.explain(Operation.DECRYPT, "b" * (MAX_GROUP_NAME_BYTES + 1), b"").allowed


def rules(effect: str) -> st.SearchStrategy[list[Rule]]:
    aads = st.sampled_from([b"", b"", b"a", b"ab"]) if effect == "allow" else st.just(b"")
    one = st.tuples(
        st.lists(st.sampled_from(GLOBS), min_size=1, max_size=3),
        st.frozensets(st.sampled_from(GRANTABLE), min_size=1),
        aads,
    )
    return st.lists(one, max_size=4).map(
        lambda drawn: [Rule(f"{effect}[{number}]", tuple(g), o, a) for number, (g, o, a) in enumerate(drawn)]
    )


def naive(allow: list[Rule], deny: list[Rule], operation: Operation, group: str, aad: bytes) -> bool:
    """The rules as the file's documentation has them, in as many words."""

    def covers(rule: Rule) -> bool:
        if operation not in rule.operations:
            return False
        if operation in OF_SERVER:
            return "*" in rule.groups
        return any(fnmatch.fnmatchcase(group, glob) for glob in rule.groups)

    return not any(covers(one) for one in deny) and any(covers(one) and aad.startswith(one.aad_prefix) for one in allow)


@given(
    rules("allow"),
    rules("deny"),
    st.lists(
        st.tuples(st.sampled_from(GRANTABLE), st.sampled_from(NAMES), st.sampled_from([b"", b"a", b"abc", b"b"])),
        min_size=1,
        max_size=20,
    ),
)
def test_decisions_and_explanations_are_those_of_a_naive_reading_of_the_rules(
    allow: list[Rule], deny: list[Rule], asked: list[tuple[Operation, str, bytes]]
) -> None:
    grants = Grants(allow, deny)
    for operation, group, aad in asked * 2:
        expected = naive(allow, deny, operation, group, aad)
        assert grants.allows(operation, group, aad) is expected
        verdict = grants.explain(operation, group, aad)
        assert verdict.allowed is expected
        assert verdict.rule is None or verdict.rule.startswith("allow" if expected else "deny")
        assert verdict.rule is not None or not expected
