"""The card of a run: its stages, data, scores and origin."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_vlm.checkpoints.progress import Progress
from lit_vlm.experiments.card import model_card
from lit_vlm.training.mlflow_run import MLflowRun
from tests.experiments.made import finished_run

PARTS = {
    "encoder": {"class_path": "lit_vlm.encoders.HFEncoder", "init_args": {"name": "lab/vision-large"}},
    "projector": {"class_path": "lit_vlm.projectors.MLP", "init_args": {}},
    "embedder": {"class_path": "lit_vlm.embedders.Splice", "init_args": {}},
    "decoder": {"class_path": "lit_vlm.decoders.HFDecoder", "init_args": {"name": "lab/text-7b"}},
    "heads": {"depth": {"class_path": "lit_vlm.heads.EmbeddingDistillation"}},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = finished_run(tmp_path / "my-run", right=[1, 0, 1, 1] * 10)
    for stage, trains, start in (
        ("1_align", {"projector": 1e-3, "decoder": None}, None),
        ("2_sft", {"decoder": 2e-5}, "1_align"),
    ):
        settings: dict[str, Any] = {"name": stage[2:], "train": trains, "losses": {"next_token": 1.0, "depth": 0.5}}
        settings["start_from"] = start and f"elsewhere/my-run/{start}"
        data = {
            "train": {"photos": {"class_path": "lit_vlm.data.Converted"}, "gone": None},
            "transform": {"class_path": "lit_vlm.data.PadSquare"}, "max_length": 2048,
        }  # fmt: skip
        config = {"seed_everything": 3, "model": {**PARTS, "stage": settings}, "data": data}
        (folder / stage / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        (folder / stage / "checkpoints").mkdir()
        torch.save({"state_dict": {}}, folder / stage / "checkpoints" / "step=00000050.ckpt")
    return folder


def test_it_tells_stages_data_scores_and_limits(run: Path) -> None:
    card = model_card(run / "2_sft", "hf", "lit-vlm export my-run/2_sft OUT")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == ["lab/text-7b", "lab/vision-large"]
    assert head["tags"] == ["lit-vlm", "llava15"]
    assert "| `align` | projector (0.001) | 12.3 k | next_token × 1, depth × 0.5 | 30 | 60 s | 2 | 3.0 GiB |" in card
    assert "| `sft` | decoder (2e-05) |" in card
    assert "| `sft` | train | – | `Converted` | – | – |" in card
    # 30 of 40 right: Wilson's interval.
    assert "| `held_out/accuracy` | 75.0 | 59.8 to 85.8 | 40 | 25.0 | 0.0 |" in card
    assert "2,048 positions at most" in card
    assert "| heads | `depth` | left behind" in card
    assert "- Seed: 3" in card


def test_it_tells_how_much_of_each_slot_trained(run: Path) -> None:
    command = ("hf", "lit-vlm export my-run/2_sft OUT")
    assert "| stage | slot |" not in model_card(run / "2_sft", *command)
    progress = Progress.read(run / "2_sft")
    assert progress is not None
    replace(progress, slots={"encoder": (0, 300_000), "decoder": (7_000, 0)}).write(run / "2_sft")
    card = model_card(run / "2_sft", *command)
    assert "| `sft` | encoder | 0 | 300,000 |\n| `sft` | decoder | 7,000 | 0 |" in card


def test_it_names_no_folder_of_the_machine(run: Path) -> None:
    assert str(run.parent) not in model_card(run / "2_sft", "hf", "lit-vlm export my-run/2_sft OUT")


def test_a_run_without_scores_says_how_to_get_some(run: Path) -> None:
    for file in ("held_out.json", "held_out.jsonl"):
        (run / "2_sft" / file).unlink()
    assert "None were kept: `callbacks.HeldOut` or `lit-vlm evaluate` write them." in model_card(
        run / "2_sft", "hf", ""
    )


def test_a_stage_that_is_gone_ends_the_chain(run: Path) -> None:
    (run / "1_align" / "checkpoints" / "step=00000050.ckpt").unlink()
    card = model_card(run / "2_sft", "hf", "")
    assert "`sft`" in card
    assert "`align`" not in card


def test_a_stage_that_began_from_one_of_its_own_name_is_not_its_own_beginning(run: Path) -> None:
    file = run / "2_sft" / "config.yaml"
    file.write_text(file.read_text().replace("elsewhere/my-run/1_align", "elsewhere/other-run/2_sft"))
    card = model_card(run / "2_sft", "hf", "")
    assert card.count("| `sft` | decoder (2e-05) |") == 1


@pytest.mark.parametrize(("format_name", "library"), [("hf", "transformers"), ("gguf", "gguf"), ("vila", None)])
def test_the_head_names_the_library_that_loads_the_format(run: Path, format_name: str, library: str | None) -> None:
    head = yaml.safe_load(model_card(run / "2_sft", format_name, "").split("---\n")[1])
    assert head.get("library_name") == library


def test_it_tells_where_the_data_come_from(run: Path) -> None:
    assert "Licences of data were not recorded: name them here." in model_card(run / "2_sft", "hf", "")
    tracked = MLflowRun(f"sqlite:///{run.parent}/mlflow.db", "lit-vlm", "2_sft", {}, run / "2_sft")
    tracked.owns_folder()
    known = {"licence": "CC-BY-4.0", "origin": "hf://datasets/lab/photos@main", "revision": "4f2a"}
    tracked.text(json.dumps({"train/photos": known, "train/texts": {}, "val/photos": known}), "data_provenance.json")
    tracked.end("FINISHED")
    card = model_card(run / "2_sft", "hf", "")
    assert "| photos | CC-BY-4.0 | hf://datasets/lab/photos@main | 4f2a |" in card
    assert "No licence was recorded of texts: name it here." in card
    assert yaml.safe_load(card.split("---\n")[1])["datasets"] == ["lab/photos"]
