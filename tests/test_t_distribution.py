"""Student's t distribution, against tables."""

import pytest

from purld.t_distribution import t_quantile, two_sided_p


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (7, 2.3646), (30, 2.0423), (20_000, 1.9601)]
)
def test_students_table(degrees, t):
    assert t_quantile(0.975, degrees) == pytest.approx(t, abs=1e-4)
    assert two_sided_p(t, degrees) == pytest.approx(0.05, abs=1e-5)


def test_one_degree_of_freedom_is_cauchy():
    """P(|T| > 1) is a half."""
    assert two_sided_p(1.0, 1) == pytest.approx(0.5)
