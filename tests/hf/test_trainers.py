"""Exported models in trainers of other packages: TRL's fine-tuning and preference tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from lit_vlm.core.batch import IGNORE
from tests.exports import exported
from tests.tiny import LLAMA

RECIPES = ("llava15", "hovle", "ola_vlm")


@pytest.fixture(scope="module", params=RECIPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / request.param
    exported(out, request.param)
    return out


def load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (30, 40, 3), generator=generator, dtype=torch.uint8).numpy())


def asked(number: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is {number}?"}]}]


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def settings(folder: Path, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 2, "report_to": "none",
        "use_cpu": True, "bf16": False, "logging_steps": 1, "save_strategy": "no", "max_length": None,
        "learning_rate": 1e-3, "disable_tqdm": True,
    }  # fmt: skip


def test_trl_tunes_it(folder: Path, tmp_path: Path) -> None:
    model, processor = load(folder)
    rows = [{"prompt": asked(n), "completion": said("A cone."), "images": [picture(n)]} for n in range(4)]
    arguments = SFTConfig(**settings(tmp_path, 2))
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=processor)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] != IGNORE).sum(1).tolist() == [_answered(processor)] * 2
    with torch.no_grad():
        loss = load(folder)[0](**batch).loss
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # Answers are equally long and nearly equally likely, so which two rows come first hardly matters.
    assert losses[0] == pytest.approx(float(loss), rel=0.01)
    assert losses[1] < losses[0]


def _answered(processor: Any) -> int:
    """Number of tokens that the chat template writes for an answer, with what stands around it."""
    whole = processor.apply_chat_template(asked(0) + said("A cone."), tokenize=False)
    prompt = processor.apply_chat_template(asked(0), tokenize=False, add_generation_prompt=True)
    return len(processor.tokenizer(whole.removeprefix(prompt), add_special_tokens=False).input_ids)


def test_trl_learns_preferences(folder: Path, tmp_path: Path) -> None:
    model, processor = load(folder)
    rows = [
        {"prompt": asked(n), "chosen": said("A cone."), "rejected": said("No."), "images": [picture(n)]}
        for n in range(4)
    ]
    arguments = DPOConfig(**settings(tmp_path, 2))
    trainer = DPOTrainer(
        model, load(folder)[0], arguments, train_dataset=Dataset.from_list(rows), processing_class=processor
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the model is its own reference
    assert entries[1]["rewards/margins"] > 0


def test_scales_of_logits_are_in_the_configuration(tmp_path: Path) -> None:
    granite = LLAMA | {"model_type": "granite", "logits_scaling": 4.0}
    decoder = {"class_path": "lit_vlm.decoders.HFDecoder", "init_args": {"config": granite, "tokenizer": "bytes"}}
    exported(tmp_path / "out", "llava15", decoder=decoder)
    assert load(tmp_path / "out")[0].config.logits_scaling == 4.0
