"""A value changed in a YAML text: the right value, and every other byte as it was."""

import pytest
import yaml

from loradock_train.yaml_edit import set_value

TEXT = """\
# head
a: 1   # one
section:   # told
  inner: two # 2
  listed:
  - x
  - y   # last
  # before b
b: "text"
flow: {c: 1, d: [1, 2]}
empty: {}
nothing:
"""


@pytest.mark.parametrize(
    ("keys", "value", "old", "new"),
    [
        (["a"], 2, "a: 1   # one", "a: 2   # one"),
        (["section", "inner"], "three", "inner: two # 2", "inner: three # 2"),
        (["section", "listed"], [], "listed:\n  - x\n  - y   # last", "listed: []   # last"),
        (["section", "added"], 1.5, "  - y   # last\n", "  - y   # last\n  added: 1.5\n"),
        (["b"], "a: b", '"text"', '"a: b"'),
        (["flow", "c"], True, "c: 1", "c: true"),
        (["flow", "d"], ["q_proj", 3], "[1, 2]", "[q_proj, 3]"),
        (["flow", "e"], None, "d: [1, 2]}", "d: [1, 2], e: null}"),
        (["empty", "f"], "no", "{}", '{f: "no"}'),
        (["nothing"], {"k": 1}, "nothing:\n", "nothing: {k: 1}\n"),
        (["nothing", "k"], 1, "nothing:\n", "nothing: {k: 1}\n"),
        (["new", "deep"], "/data/x.jsonl", "nothing:\n", "nothing:\nnew: {deep: /data/x.jsonl}\n"),
    ],
)
def test_value_is_changed_and_nothing_else(keys: list[str], value: object, old: str, new: str) -> None:
    edited = set_value(TEXT, keys, value)
    assert edited == TEXT.replace(old, new)
    found = yaml.safe_load(edited)
    for key in keys:
        found = found[key]
    assert found == value


def test_empty_text_gets_its_first_key() -> None:
    assert yaml.safe_load(set_value("# only a comment\n", ["a"], 1)) == {"a": 1}
