"""A value from a file is of its type and in its range, or one line names it."""

import json
import random
from dataclasses import dataclass

import pytest
import torch

from support.errors import UserError
from support.schema import Limits, from_json, read_file, show, value


@dataclass(frozen=True, kw_only=True)
class Inner:
    share: float = value(low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One field of every kind."""

    count: int = value(low=1, high=10)
    rate: float = value(above=0)
    flag: bool = value()
    word: str = value(choices=("a", "b"))
    text: str = "absent"
    note: str | None = None
    numbers: list[int] = value([], high=5)
    rates: dict[str, float] = value({}, low=0, high=1)
    inner: Inner = Inner(share=0.5)
    either: str | list[int] | None = None
    anything: object = None
    nothing: object = value(None, choices=(None,))

    def __post_init__(self):
        if self.count == 10 and self.flag:
            raise ValueError("'count' is 10 and 'flag' is true, expected one of them")


GOOD = {"count": 3, "rate": 2, "flag": True, "word": "a"}
DEEP = json.loads("[" * 900 + "]" * 900)
HUGE = 10**4000

BAD = [
    ([], "found [], expected an object"),
    (None, "found None, expected an object"),
    ("x", "found 'x', expected an object"),
    ({}, "no 'count', expected a whole number from 1 to 10"),
    ({"count": None}, "no 'count', expected a whole number from 1 to 10"),
    ({"count": "8"}, "'count' is '8', expected a whole number from 1 to 10"),
    ({"count": True}, "'count' is True, expected"),
    ({"count": 2.5}, "'count' is 2.5, expected"),
    ({"count": 8.0}, "'count' is 8.0, expected"),
    ({"count": [1]}, "'count' is [1], expected"),
    ({"count": 0}, "'count' is 0, expected"),
    ({"count": -1}, "'count' is -1, expected"),
    ({"count": 11}, "'count' is 11, expected"),
    ({"count": HUGE}, "'count' is 1000"),
    ({"count": DEEP}, "'count' is [[[...]]], expected"),
    ({"count": {"a": 1}}, "'count' is {'a': 1}, expected"),
    ({"rate": 0}, "'rate' is 0, expected a finite number above 0"),
    ({"rate": float("nan")}, "'rate' is nan, expected a finite number above 0"),
    ({"rate": float("inf")}, "'rate' is inf, expected"),
    ({"rate": HUGE}, "'rate' is 1000"),
    ({"rate": "2"}, "'rate' is '2', expected"),
    ({"rate": True}, "'rate' is True, expected"),
    ({"flag": 1}, "'flag' is 1, expected true or false"),
    ({"flag": "false"}, "'flag' is 'false', expected true or false"),
    ({"word": "c"}, "'word' is 'c', expected 'a' or 'b'"),
    ({"word": ["a"]}, "'word' is ['a'], expected 'a' or 'b'"),
    ({"text": 7}, "'text' is 7, expected text"),
    ({"text": ["a\nb" * 99]}, "'text' is ['a\\n"),
    ({"note": False}, "'note' is False, expected text"),
    ({"numbers": {}}, "'numbers' is {}, expected a list"),
    ({"numbers": [1, 2, "3"]}, "'numbers[2]' is '3', expected a whole number at most 5"),
    ({"numbers": [6]}, "'numbers[0]' is 6, expected"),
    ({"rates": []}, "'rates' is [], expected an object"),
    ({"rates": {"task": 1.5}}, "'rates.task' is 1.5, expected a finite number from 0 to 1"),
    ({"rates": {"a\nb": None}}, "'rates.'a\\nb'' is None, expected"),
    ({"rates": {"x" * 10**6: 2}}, "...xxxx"),
    ({"inner": 7}, "'inner' is 7, expected an object"),
    ({"inner": {}}, "no 'inner.share', expected a finite number from 0 to 1"),
    ({"inner": {"share": 2}}, "'inner.share' is 2, expected"),
    ({"either": 7}, "'either' is 7, expected text or a list"),
    ({"either": ["a"]}, "'either[0]' is 'a', expected a whole number"),
    ({"nothing": {}}, "'nothing' is {}, expected None"),
    ({"count": 10}, "'count' is 10 and 'flag' is true, expected one of them"),
]


def changed(changes):
    return GOOD | changes if isinstance(changes, dict) and changes else changes


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_wrong_value_ends_in_one_short_line_that_names_it(changes, message):
    with pytest.raises(UserError) as e:
        from_json(Example, changed(changes), "a/file.json")
    text = str(e.value)
    assert text.startswith("a/file.json: ") and message in text
    assert "\n" not in text and len(text) < 400


def test_a_right_value_is_read_and_the_rest_ignored():
    read = from_json(Example, GOOD | {"another": 1, "numbers": [5, -9], "note": None}, "file")
    assert read == Example(count=3, rate=2.0, flag=True, word="a", numbers=[5, -9])
    assert isinstance(read.rate, float) and read.inner == Inner(share=0.5)
    assert from_json(Example, GOOD | {"either": [7]}, "file").either == [7]
    assert from_json(Example, GOOD | {"anything": DEEP}, "file").anything is DEEP


def test_a_default_is_not_shared():
    first = from_json(Example, GOOD, "file")
    first.numbers.append(1)
    assert from_json(Example, GOOD, "file").numbers == []


def test_types_stand_alone_and_classes_are_instances():
    assert from_json(dict[str, int], {"a": 1}, "file", Limits(low=1)) == {"a": 1}
    with pytest.raises(UserError, match="file: 'a' is 0, expected a whole number at least 1"):
        from_json(dict[str, int], {"a": 0}, "file", Limits(low=1))
    with pytest.raises(UserError, match="file: found {1: 1}, expected an object"):
        from_json(dict[str, int], {1: 1}, "file")
    tensors = {"a": torch.ones(2)}
    assert from_json(dict[str, torch.Tensor], tensors, "file")["a"] is tensors["a"]
    with pytest.raises(UserError, match="file: 'b' is 7, expected a Tensor"):
        from_json(dict[str, torch.Tensor], {"b": 7}, "file")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 10**5, '{"a":' * 10**5, "7" * 5000, '{"count": ' + "7" * 5000 + "}", "\x00"],
)
def test_a_file_that_is_no_json_is_named(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(UserError, match="file.json: not valid JSON .*, expected an example") as e:
        read_file(Example, path, "an example")
    assert "\n" not in str(e.value) and len(str(e.value)) < len(str(path)) + 300


def test_a_file_is_read_or_missing(tmp_path):
    path = tmp_path / "file.json"
    with pytest.raises(UserError, match="file.json: no such file, expected an example"):
        read_file(Example, path, "an example")
    path.write_text(json.dumps(GOOD))
    assert read_file(Example, path, "an example").count == 3
    path.write_text('{"count": 3, "rate": 1e999, "flag": true, "word": "a"}')
    with pytest.raises(UserError, match="'rate' is inf, expected a finite number above 0"):
        read_file(Example, path, "an example")


def random_json(r, depth=0):
    leaf = r.choice(["8", "", "a", 0, -1, 3, 2.5, 1e308, True, False, None, HUGE, float("nan")])
    if depth > 3 or r.random() < 0.6:
        return leaf
    if r.random() < 0.5:
        return [random_json(r, depth + 1) for _ in range(r.randrange(4))]
    keys = ["count", "rate", "share", "a", "\n", "x" * 500]
    return {r.choice(keys): random_json(r, depth + 1) for _ in range(r.randrange(4))}


def test_any_json_is_read_as_declared_or_refused_in_one_line():
    r = random.Random(0)
    n_read = 0
    for _ in range(3000):
        found = dict(GOOD)
        for _ in range(r.randrange(1, 3)):
            found[r.choice([*Example.__dataclass_fields__])] = random_json(r)
        try:
            read = from_json(Example, found, "file")
        except UserError as e:
            assert "\n" not in str(e) and len(str(e)) < 500
            continue
        n_read += 1
        assert type(read.count) is int and 1 <= read.count <= 10
        assert type(read.rate) is float and 0 < read.rate < float("inf")
        assert type(read.flag) is bool and read.word in ("a", "b") and type(read.text) is str
        assert all(type(n) is int and n <= 5 for n in read.numbers)
        assert all(type(n) is float and 0 <= n <= 1 for n in read.rates.values())
        assert type(read.inner.share) is float
    assert n_read > 300


def test_anything_can_be_shown():
    for found in (HUGE, 10**5000, DEEP, "a\n" * 10**6, {"b": DEEP}, [HUGE] * 10**6, "\ud800\u202e"):
        shown = show(found)
        assert len(shown) < 300 and shown.isprintable()
