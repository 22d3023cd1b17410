"""The table of methods: every row can be configured, and settings reach the objective."""

from typing import get_args

import pytest
import torch

from purld.config.methods import Align, LdlGrpo, StageTwoSettings, has_stage_two
from purld.methods.losses import GroupTokens
from purld.methods.table import METHODS, GroupEvidence


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


def test_a_group_counts_by_its_share_of_positives_where_the_settings_say_so():
    """Four candidates, one of them as good as the anchor: a quarter of the labels' part, and all of the KL's."""
    method, log_probs = METHODS["ldl_grpo"].stage_two, torch.tensor([[-1.0], [-2.0], [-3.0], [-2.5]])
    tokens = GroupTokens(log_probs, log_probs - 0.3, log_probs, torch.ones(4, 1))
    evidence = GroupEvidence(torch.tensor([0.0, 1.0, 0.0, 0.0]), 1.0)
    values = {}
    for weight in ("equal", "positives"):
        settings = LdlGrpo(group_weight=weight, gamma=60.0, beta=0.5)
        values[weight] = method.loss(tokens, method.signal(evidence, settings), settings).value.item()
    kl = 0.5 * 0.3
    assert values["positives"] - kl == pytest.approx((values["equal"] - kl) / 4, rel=1e-5)
    assert values["equal"] - kl > 1
