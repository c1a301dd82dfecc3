"""Names that every store takes, each for one value."""

from __future__ import annotations

from lit_vlm.core.metric_names import safe_names


def test_names_that_become_the_same_stay_apart() -> None:
    assert safe_names({"a(1)": 1, "a[1]": 2, "a_1_": 3}) == {"a_1_": 1, "a_1__2": 2, "a_1__3": 3}
