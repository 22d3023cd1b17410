"""What Stage II says to look at afterwards."""

import pytest

from purld.training.align import AlignFacts


@pytest.mark.parametrize(("kl", "unmoved"), [(1e-4, True), (-1e-4, True), (0.2, False), (-0.05, False), (None, False)])
def test_a_policy_that_hardly_moved_is_told_and_an_estimate_below_zero_is_no_sign_of_it(kl, unmoved):
    facts = AlignFacts(4, 8, 128, 0, 0, 0, 0, 0.0, "lower the rate", kl=kl)
    assert any("hardly moved" in warning for warning in facts.warnings) is unmoved
