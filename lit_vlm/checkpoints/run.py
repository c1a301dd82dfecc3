"""A trained model from what its run left: config.yaml and a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser

import lit_vlm.heads
import lit_vlm.teachers  # noqa: F401 - class names of configs
from lit_vlm.batch import Batch
from lit_vlm.build import build
from lit_vlm.checkpoints.files import find_checkpoint, run_folder
from lit_vlm.data import ImageTransform, Template
from lit_vlm.data.collate import collate_prompts
from lit_vlm.data.format import SampleFormat
from lit_vlm.data.records import Record
from lit_vlm.module import LitVLM


@dataclass
class LoadedRun:
    """A model in eval mode, with the way its data was written.

    Attributes:
        module: its `vlm` has the checkpoint's weights.
        format: of the run's data.
    """

    module: LitVLM
    format: SampleFormat

    def prompts(self, records: list[Record], image_folder: Path) -> Batch:
        """Left-padded prompts on the model's device."""
        spec = self.module.input_spec.without_teachers()
        encode = self.format.encoder(spec, prompt=True)
        samples = [encode(record, image_folder) for record in records]
        return collate_prompts(samples, pad_id=spec.tokenizer.pad_token_id).to(self.module.device)


def pick_device(name: str | None = None) -> str:
    """A device by its name, or a GPU if there is one.

    Raises:
        ValueError: where this machine has no such device.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch built without it asserts
        raise ValueError(f"there is no device '{name}' here: {str(error).splitlines()[0]}") from error
    return name


def load_run(source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> LoadedRun:
    """Build the model of a run and load its weights.

    Marks of its template that the tokenizer does not know are warned of: the model was trained with them in letters.

    Args:
        source: a checkpoint, or the folder of a run (its newest checkpoint is taken).
        device: where to put it.
        dtype: of the weights; `precision.choose(...).dtype` is what the device is fast in.

    Raises:
        ValueError: when there is no complete checkpoint or no config.yaml, or the stage left parts out.
    """
    checkpoint = find_checkpoint(source)
    config = yaml.safe_load((run_folder(checkpoint) / "config.yaml").read_text(encoding="utf-8"))
    if left_out := (config["model"].get("stage") or {}).get("leave_out"):
        raise ValueError(
            f"{source} is of a stage that trains without its {', '.join(left_out)} (model.stage.leave_out), so it is "
            "no whole model: name the folder of a later stage"
        )
    parser = ArgumentParser(parser_mode="omegaconf")
    parser.add_class_arguments(LitVLM, "model")
    parser.add_argument("--template", type=Template)
    parser.add_argument("--transform", type=ImageTransform)
    data = config["data"]
    wanted: dict[str, Any] = {"model": config["model"], "template": data["template"], "transform": data["transform"]}
    objects = parser.instantiate_classes(parser.parse_object(wanted))
    module = objects.model
    assert isinstance(module, LitVLM)
    module.model = build(module.slots, str(checkpoint))
    module.to(device=device, dtype=dtype).eval()
    written = SampleFormat(objects.template, objects.transform, data["max_length"], data.get("fast_jpeg", True))
    written.check_marks(module.input_spec, "warn")
    return LoadedRun(module, written)
