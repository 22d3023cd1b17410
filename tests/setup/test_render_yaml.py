"""What is written reads back as it was, whatever the values."""

from hypothesis import given, settings
from hypothesis import strategies as st

from purld.config.read_yaml import parse_yaml
from purld.setup.render_yaml import render_yaml

text = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff\u2028\u2029\x85"), max_size=8)
scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, width=32) | text
values = st.recursive(scalars, lambda inner: st.dictionaries(text, inner, max_size=2), max_leaves=4)
keys = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)


@settings(max_examples=15)
@given(st.dictionaries(keys, st.dictionaries(keys, values, min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_any_values_read_back(sections, data):
    paths = [f"{name}.{key}" for name, section in sections.items() for key in section]
    comments = {path: data.draw(st.just("why: #1")) for path in paths[::2]}
    written = render_yaml(sections, comments, ["a header"], {next(iter(sections)): ["left: out"]})
    assert parse_yaml(written) == sections


def test_comments_stand_in_a_column_and_long_ones_above():
    assert render_yaml({"a": {"b": 1, "long": "x", "c": "y"}}, {"a.b": "one", "a.long": "w" * 120}, ["top"]) == (
        f"# top\n\na:\n  b: 1     # one\n  # {'w' * 120}\n  long: x\n  c: y\n"
    )
