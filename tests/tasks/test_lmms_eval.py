"""The adapter to lmms-eval, where that is installed (extra `lmms-eval`)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image as PILImage

from tests.runs import one_step

pytest.importorskip("lmms_eval.api.model")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_step(tmp_path_factory.mktemp("lmms") / "run", "llava15", "2_sft")


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_requests_are_answered_at_any_batch_size(run: Path) -> None:
    from lit_vlm.lmms_eval import LmmsEvalModel

    documents = [{"image": PILImage.new("RGB", (20 + i, 30), "red")} for i in range(3)]
    found = []
    for size in (1, 2):
        model = LmmsEvalModel(str(run), device="cpu", batch_size=size, max_length=1024)
        model.task_dict = {"task": {"test": documents}}
        settings = {"max_new_tokens": 4, "until": ["\n"], "do_sample": False}
        visual = lambda document: [document["image"]]  # noqa: E731
        asked = [request(f"What is it? {i}", settings, visual, i, "task", "test") for i in range(3)]
        answers = model.generate_until(asked)
        scored = model.loglikelihood([request("What?", "red", visual, i, "task", "test") for i in range(3)])
        found.append((answers, [round(value, 3) for value, _ in scored]))
    assert found[0] == found[1]
    assert len(found[0][0]) == 3
    assert all(value < 0 for value in found[0][1])
