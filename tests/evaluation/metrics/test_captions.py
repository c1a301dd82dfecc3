"""CIDEr against the official code, whose tokenizer ran once (in Java) for `fixtures/cider.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_vlm.evaluation.metrics.captions import Cider, tokenize_caption

OFFICIAL: dict[str, Any] = json.loads((Path(__file__).parents[2] / "fixtures" / "cider.json").read_text())


@pytest.mark.parametrize("case", OFFICIAL["tokens"], ids=range(len(OFFICIAL["tokens"])))
def test_words_are_those_of_the_official_tokenizer(case: dict[str, str]) -> None:
    assert " ".join(tokenize_caption(case["caption"])) == case["tokens"]


def test_scores_are_the_official_ones() -> None:
    metric = Cider()
    for picture in OFFICIAL["cider"]["pictures"]:
        metric.update(picture["caption"], picture["references"])
    assert metric.scores() == pytest.approx([picture["score"] for picture in OFFICIAL["cider"]["pictures"]], abs=1e-6)
    assert float(metric.compute()) == pytest.approx(OFFICIAL["cider"]["score"], abs=1e-6)
    metric.reset()
    assert float(metric.compute()) == 0


def test_a_picture_without_references_is_refused() -> None:
    with pytest.raises(ValueError, match="one reference or more"):
        Cider().update("a cat", [])
