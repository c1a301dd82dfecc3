"""Exported models under lmms-eval's own model for transformers, where that is installed (extra `lmms-eval`)."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage

from lit_vlm.data.records import Image, Message, Record, Text
from lit_vlm.evaluation.asker import Asker
from lit_vlm.hf.export import export_hf
from tests.exports import read
from tests.runs import environment

pytest.importorskip("lmms_eval.api.model")

COLOURS = ["red", "green", "blue"]
TASK = """\
task: colours
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: "What colour is it?"
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["llava15", "ola_vlm", "eve"])
def test_the_generic_model_answers_a_task_as_the_kit(recipe: str, tmp_path: Path) -> None:
    import datasets

    module, config, written = read(recipe)
    export_hf(module.vlm, config, written, module.input_spec, tmp_path / "out")
    pictures = [PILImage.new("RGB", (40 + 9 * i, 30), colour) for i, colour in enumerate(COLOURS)]
    rows = [{"image": picture, "answer": colour} for picture, colour in zip(pictures, COLOURS, strict=True)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    (tmp_path / "colours.yaml").write_text(TASK.format(file=tmp_path / "test.parquet"))
    (tmp_path / "utils.py").write_text("def pictures(doc):\n    return [doc['image'].convert('RGB')]\n")
    command = [sys.executable, "-m", "lmms_eval", "--model", "huggingface", "--tasks", "colours", "--batch_size", "2"]
    arguments = f"pretrained={tmp_path / 'out'},trust_remote_code=True,device=cpu,device_map=cpu"
    command += ["--model_args", arguments, "--include_path", str(tmp_path), "--log_samples"]
    ran = subprocess.run(
        [*command, "--output_path", str(tmp_path / "results")],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert "|colours|" in ran.stdout, ran.stdout[-1000:] + ran.stderr[-3000:]
    samples = next((tmp_path / "results").rglob("*samples_colours.jsonl")).read_text().splitlines()
    found = {one["doc_id"]: one["filtered_resps"] for one in map(json.loads, samples)}
    asker = Asker(module.to(torch.bfloat16), written)  # as lmms-eval loads it
    asked = [
        Record(str(i), "asked", (Message("user", (_image(one), Text("What colour is it?"))),))
        for i, one in enumerate(pictures)
    ]
    assert [found[i] for i in range(3)] == asker.answer(asker.encode(asked), 8)


def _image(picture: PILImage.Image) -> Image:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return Image(data=buffer.getvalue(), size=picture.size)
