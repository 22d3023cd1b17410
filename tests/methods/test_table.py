from typing import get_args

from purld.config.methods import Align, StageTwoSettings, has_stage_two
from purld.methods.table import METHODS


def test_every_method_of_the_table_can_be_configured_and_the_other_way_round():
    union, _ = get_args(Align)
    sections = {value: s for s in get_args(union) for value in get_args(s.model_fields["method"].annotation)}
    assert sections.keys() == METHODS.keys()
    assert {n for n, s in sections.items() if issubclass(s, StageTwoSettings)} == {
        n for n, m in METHODS.items() if m.stage_two
    }
    assert all(name == method.name for name, method in METHODS.items())
    assert {name for name in METHODS if has_stage_two(name)} == {name for name, m in METHODS.items() if m.stage_two}
    assert has_stage_two("of_another_version")
