"""Files of settings: how YAML is read, and what is said of a wrong one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from lit_vlm.core.settings import PlainYaml, checked, read_mapping


def test_words_that_look_like_times_stay_words() -> None:
    found = yaml.load(
        "{i: trueish, j: 0-1, a: 12:00:00, b: 2024-01-01, c: 3, d: off, e: 1e-3, f: 0.5, g: true, h: -2, "
        "k: 12:30:15.5, l: 1.0e-3, m: .5, n: -.inf, o: null, p: ~, q: 4.}",
        PlainYaml,
    )
    assert found == {
        "k": "12:30:15.5",
        "l": 1e-3,
        "m": 0.5,
        "n": -math.inf,
        "o": None,
        "p": None,
        "q": 4.0,
        "i": "trueish",
        "j": "0-1",
        "a": "12:00:00",
        "b": "2024-01-01",
        "c": 3,
        "d": "off",
        "e": "1e-3",
        "f": 0.5,
        "g": True,
        "h": -2,
    }


class Own(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: int = 1
    inner: dict[str, int] = {}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("siz: 2", r"own.yaml: there is no key 'siz' \(did you mean 'size'\?\); keys: size, inner"),
        ("size: big", "own.yaml: size: Input should be a valid integer.*, found 'big'"),
        ("inner: {a: b}", "own.yaml: inner.a: .*, found 'b'"),
        ("- 1", "own.yaml holds sizes, not a list"),
        ("a: [", "own.yaml cannot be read: while parsing"),
        (
            "inner: {a: 1}\nsize: 2\nsize: 3",
            "the key 'size' stands here and in line 2; a key stands once .*line 3, column 1",
        ),
        ("inner: {a: 1, b: 2, a: 1}", "cannot be read: the key 'a' stands here and in line 1.*line 1, column 21"),
        ("size: !!timestamp foo", "own.yaml cannot be read: 'foo' is no timestamp.*line 1, column 7"),
        ("inner: {a: !!int four}", "own.yaml cannot be read: 'four' is no int"),
        ("inner: {a: !!bool four}", "own.yaml cannot be read: 'four' is no bool"),
    ],
)
def test_what_is_wrong_is_named(text: str, error: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=error):
        checked(Own, read_mapping(file, "sizes"), str(file))


def test_a_key_may_replace_one_that_another_mapping_gives(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("a: &a {x: 1, y: 2}\nb: {c: &c {<<: *a, x: 3}}\nd: {<<: *c, y: 4}\n")
    found = read_mapping(file, "sizes")
    assert (found["b"], found["d"]) == ({"c": {"x": 3, "y": 2}}, {"x": 3, "y": 4})


def test_an_empty_file_has_no_keys_and_a_missing_one_is_named_with_who_names_it(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.touch()
    assert checked(Own, read_mapping(file, "sizes"), str(file)) == Own()
    with pytest.raises(ValueError, match=r"none.yaml \(VARIABLE\) cannot be read: .*No such file"):
        read_mapping(tmp_path / "none.yaml", "sizes", named="VARIABLE")
