"""The commands of docs/your_data.md, as they stand there, in a folder with nothing but pictures and a JSON file."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from tests.runs import lit_vlm
from tests.tiny import LLAMA, ROOT

PAGE = (ROOT / "docs" / "your_data.md").read_text(encoding="utf-8")
FIVE = [shlex.split(line, comments=True) for line in re.findall(r"^    lit-vlm (.*)$", PAGE, re.MULTILINE)][:6]
TINY = [
    "--model.encoder.pretrained", "null", "--model.decoder.init_args.name", "null",
    "--model.decoder.init_args.tokenizer", "bytes", "--model.decoder.init_args.config", json.dumps(LLAMA),
    "--data.max_length", "256", "--trainer.precision", "32-true", "--trainer.accelerator", "cpu",
    "--trainer.max_epochs", "1",
]  # fmt: skip
"""What makes the quick start's parts tiny; they need no package then."""
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mine.json` of the form that the page shows."""
    found = tmp_path_factory.mktemp("own")
    (found / "images").mkdir()
    block = re.search(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert block is not None
    (shown,) = json.loads(block[1])
    rows = []
    for n in range(24):
        name = f"images/{n:02}.png"
        Image.new("RGB", (40, 30 + n), COLOURS[n % 3]).save(found / name)
        rows.append(shown | {"id": f"{n:02}", "image": name})
    (found / "mine.json").write_text(json.dumps(rows))
    return found


@pytest.mark.slow
def test_five_commands_lead_from_a_file_to_an_answer(folder: Path) -> None:
    said = []
    for words in FIVE:
        said.append(lit_vlm(folder, *words, *(TINY if words[0] == "run" else [])).stdout)
    verbs = [words[0] for words in FIVE]
    assert verbs == ["data", "run", "run", "compare", "chat", "predict"]
    converted, checked, trained, compared, _, _ = said
    assert "24" in converted
    assert checked.count("ready") == 2
    held_out = re.findall(r"data\.train \(mine (\d+), held out: mine (\d+)\)", checked)
    assert held_out == [held_out[0]] * 2
    kept, asked = map(int, held_out[0])
    assert kept + asked == 24
    assert f"{asked} held-out questions" in trained
    assert "shuffled" in trained
    assert "multiple choice" not in trained  # as no record has options
    assert "loss" in compared
    assert "--scale" not in compared
    assert "my-run: its last finished stage, 2_tune" in lit_vlm(folder, "chat", "my-run", "--prompt", "?").stderr
    config = ["--config", "my-run/2_tune/config.yaml", "--ckpt_path", "my-run/2_tune"]
    assert "trainer.limit_val_batches is 0 in this config" in lit_vlm(folder, "validate", *config, check=False).stderr
    assert "val/loss" in lit_vlm(folder, "validate", *config, "--trainer.limit_val_batches", "1.0").stdout
    answers = (folder / "my-run" / "2_tune" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in answers] == ["mine"] * asked


def test_sources_by_name_of_the_page_are_read_beside_each_other(folder: Path) -> None:
    rows = [f"images/{n:02}.png,a colour" for n in range(20)]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    (folder / "talks.json").write_text((folder / "mine.json").read_text())
    (named,) = (line for line in PAGE.splitlines() if line.startswith("    --data.train null --data.train.talks"))
    base = ["run", "quickstart", "--stages", "1_align", "--data.held_out", "0.2", "--dry-run", *TINY]
    found = lit_vlm(folder, *base, "--data.val", "null", *named.split()).stdout
    assert re.search(r"data\.train \(talks \d+, captions \d+, held out: talks \d+, captions \d+\)", found)
    at_once = lit_vlm(folder, *base, "--data.train.talks", "talks.json", check=False).stdout
    assert "begin anew, --data.train null --data.train.NAME FILE" in at_once


def test_a_stage_that_scores_without_questions_is_not_ready(folder: Path) -> None:
    flags = ["--stages", "1_align", "--data.train", "mine.json", "--data.val", "null", "--dry-run"]
    found = lit_vlm(folder, "run", "quickstart", *flags, *TINY, check=False)
    assert found.returncode == 1
    assert "callbacks.HeldOut wants questions of data.val" in found.stdout
    assert "--data.held_out 0.1 keeps a tenth" in found.stdout
