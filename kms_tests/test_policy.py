"""The authorization seam."""

from __future__ import annotations

import pytest

from kms.core.policy import AllowAll, KeyAuthorizationPolicy, Operation, Plane, Principal


@pytest.mark.parametrize("operation", Operation)
@pytest.mark.parametrize("group", [None, "default"])
def test_a_team_that_trusts_its_tokens_is_allowed_everything(operation: Operation, group: str | None) -> None:
    policy: KeyAuthorizationPolicy = AllowAll()
    assert policy.allows(Principal("api", Plane.DATA), operation, group)


def test_the_operations_are_the_ones_of_the_wire() -> None:
    assert {operation.value for operation in Operation} == {
        "Health",
        "GenerateDataKey",
        "Encrypt",
        "Decrypt",
        "ReEncrypt",
        "CreateKeyGroup",
        "RotateKeyGroup",
        "ListKeyGroups",
        "DisableVersion",
        "EnableVersion",
        "DestroyVersion",
    }


def test_there_are_two_planes() -> None:
    assert {plane.value for plane in Plane} == {"data", "control"}


def test_a_principal_is_a_value_that_does_not_change() -> None:
    principal = Principal("api", Plane.DATA)
    assert principal == Principal("api", Plane.DATA)
    with pytest.raises(AttributeError):
        principal.plane = Plane.CONTROL  # type: ignore[misc] # that it cannot be done is the test
