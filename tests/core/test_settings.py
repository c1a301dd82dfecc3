"""Files of settings: how YAML is read, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from lit_vlm.core.settings import PlainYaml, checked, read_mapping


def test_words_that_look_like_times_stay_words() -> None:
    found = yaml.load(
        "{i: trueish, j: 0-1, a: 12:00:00, b: 2024-01-01, c: 3, d: off, e: 1e-3, f: 0.5, g: true, h: -2}", PlainYaml
    )
    assert found == {
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
    ],
)
def test_what_is_wrong_is_named(text: str, error: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=error):
        checked(Own, read_mapping(file, "sizes"), str(file))


def test_an_empty_file_has_no_keys_and_a_missing_one_is_named_with_who_names_it(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.touch()
    assert checked(Own, read_mapping(file, "sizes"), str(file)) == Own()
    with pytest.raises(ValueError, match=r"none.yaml \(VARIABLE\) cannot be read: .*No such file"):
        read_mapping(tmp_path / "none.yaml", "sizes", named="VARIABLE")
