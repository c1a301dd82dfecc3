"""The adapter to lmms-eval, where that is installed (extra `lmms-eval`)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
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
    from lit_vlm.evaluation.lmms_eval import LmmsEvalModel

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


def test_a_question_that_is_too_long_costs_no_other_its_answer(run: Path) -> None:
    from lit_vlm.evaluation.lmms_eval import LmmsEvalModel

    model = LmmsEvalModel(str(run), device="cpu", batch_size=3, max_length=1024)
    model.task_dict = {"task": {"test": [{}] * 3}}
    visual = lambda document: []  # noqa: E731
    texts = ["What is it?", "What is it? " * 200, "And that?"]
    asked = [request(text, {"max_new_tokens": 4}, visual, i, "task", "test") for i, text in enumerate(texts)]
    with pytest.warns(UserWarning, match="task document 1 counts as unanswered: too_long"):
        answers = model.generate_until(asked)
    assert answers[1] == ""
    model.rows = 1
    assert answers[::2] == model.generate_until(asked[::2])
    with pytest.warns(UserWarning, match="document 1"):
        scored = model.loglikelihood([request(texts[1], "red", visual, 1, "task", "test")])
    assert scored == [(-math.inf, False)]


def test_its_own_task_runs_from_its_own_command_line(run: Path, tmp_path: Path) -> None:
    """AI2D with lmms-eval's prompts and metric, on a local parquet file; the model is found by the entry point."""
    import datasets
    import lmms_eval

    row = {"question": "Which?", "options": ["leaf", "root"], "answer": "1", "image": PILImage.new("RGB", (40, 30))}
    datasets.Dataset.from_list([row] * 3).to_parquet(tmp_path / "test.parquet")
    theirs = Path(lmms_eval.__file__).parent / "tasks/ai2d"
    (tmp_path / "utils.py").write_text((theirs / "utils.py").read_text())
    (tmp_path / "local.yaml").write_text(
        f"include: {theirs / 'ai2d.yaml'}\ntask: ai2d_local\ndataset_path: parquet\n"
        f"dataset_kwargs:\n  data_files: {{test: {tmp_path / 'test.parquet'}}}\n"
    )
    command = [sys.executable, "-m", "lmms_eval", "--model", "lit_vlm", "--tasks", "ai2d_local", "--batch_size", "2"]
    command += ["--model_args", f"checkpoint={run},max_length=1024,device=cpu", "--include_path", str(tmp_path)]
    ran = subprocess.run([*command, "--output_path", str(tmp_path / "out")], capture_output=True, text=True)
    assert "|ai2d_local|" in ran.stdout, ran.stdout[-1000:] + ran.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("*results.json")).read_text())
    assert 0 <= results["results"]["ai2d_local"]["exact_match,flexible-extract"] <= 1
    assert results["n-samples"]["ai2d_local"]["effective"] == 3
