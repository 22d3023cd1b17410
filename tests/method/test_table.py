from typing import get_args

from purld.config import Align
from purld.method.table import METHODS


def test_every_method_of_the_table_can_be_configured_and_the_other_way_round():
    union, _ = get_args(Align)
    names = {value for section in get_args(union) for value in get_args(section.model_fields["method"].annotation)}
    assert names == set(METHODS)
    assert all(name == method.name for name, method in METHODS.items())
