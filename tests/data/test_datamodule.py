"""A run over bad data ends with an error however short it is; what cannot work is said before the first step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from lit_vlm.core.batch import Batch
from lit_vlm.core.tokenizers import byte_tokenizer
from lit_vlm.data import BadSamples, ChatML, Packed, Padded, Phi3, Resize, Template, VLMData
from lit_vlm.data.feed.split import Subset
from lit_vlm.data.feed.usable import check_sources
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sources import ChatJsonl, Source
from lit_vlm.data.sources.provenance import Provenance
from lit_vlm.worlds import Scenes, Shapes


class Model(L.LightningModule):
    """Has a parameter and looks at nothing."""

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.input_spec = spec
        self.steps = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.steps += 1
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def model(bytes_spec: InputSpec) -> Model:
    return Model(bytes_spec)


def chat(file: Path, count: int, bad: range) -> Source:
    """Text samples; those in `bad` name a picture that is not there."""
    lines = []
    for index in range(count):
        image = [{"type": "image", "image": "none.png"}] if index in bad else []
        question = {"role": "user", "content": [*image, {"type": "text", "text": "q"}]}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": "a" * 30}]}))
    file.write_text("\n".join(lines))
    return ChatJsonl(str(file))


def data(train: list[Source], val: list[Source] | None = None, **options: Any) -> VLMData:
    return VLMData(train, ChatML(), Resize(), val=val, batch_size=4, **options)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": False, "accelerator": "cpu"}
    return L.Trainer(default_root_dir=folder, **{**quiet, **settings, **options})


SHORT = [{"max_steps": 2}, {"limit_train_batches": 1}, {"limit_train_batches": 0.04}, {"fast_dev_run": True}]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("options", [*SHORT, {}], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_on_bad_samples_ends_with_an_error(
    options: dict[str, Any], accumulate: int, model: Model, tmp_path: Path
) -> None:
    source = chat(tmp_path / "a.jsonl", 120, range(120))
    with pytest.raises(ValueError, match=r"of \d+ samples cannot be used, .*max_share 0\.05: \{'missing_image in a'"):
        trainer(tmp_path, accumulate_grad_batches=accumulate, **options).fit(model, data([source]))


@pytest.mark.parametrize("options", SHORT, ids=str)
def test_a_short_run_on_good_samples_passes(options: dict[str, Any], model: Model, tmp_path: Path) -> None:
    trainer(tmp_path, **options).fit(model, data([chat(tmp_path / "a.jsonl", 120, range(0))]))
    assert model.steps > 0


def test_a_deny_list_is_for_all_sources_of_a_stage(model: Model, tmp_path: Path) -> None:
    train, val = (chat(tmp_path / f"{name}.jsonl", 120, range(60)) for name in ("a", "b"))
    (tmp_path / "none.png").write_bytes(Shapes(1, text_only=False).record(0).images[0].data or b"")
    digest = hashlib.sha256((tmp_path / "none.png").read_bytes()).hexdigest()
    (tmp_path / "deny.txt").write_text(f"{digest}\n")
    train.provenance = Provenance("MIT")
    made = data([train], [val], deny=str(tmp_path / "deny.txt"), bad_samples=BadSamples(max_share=0.0))
    trainer(tmp_path).fit(model, made)
    listed = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert {(one["source"], one["reason"]) for one in listed} == {("a", "denied"), ("b", "denied")}
    assert len(listed) == 120
    assert made.provenance() == {"train/a": {"licence": "MIT"}, "val/b": {}}


@pytest.mark.parametrize("batching", [Padded(), Packed(window=40)], ids=lambda b: type(b).__name__)
def test_samples_that_are_all_too_long_end_the_run(
    batching: Any, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_VLM_CACHE", str(tmp_path / "cache"))
    made = data([chat(tmp_path / "a.jsonl", 40, range(0))], batching=batching, max_length=16, too_long="drop")
    with pytest.raises(ValueError, match="too_long in a"):
        trainer(tmp_path, max_steps=1).fit(model, made)


@pytest.mark.parametrize("run", ["fit", "validate", "test"])
@pytest.mark.parametrize("limited", [False, True])
def test_held_out_data_is_judged_too(run: str, limited: bool, model: Model, tmp_path: Path) -> None:
    good, bad = chat(tmp_path / "a.jsonl", 40, range(0)), chat(tmp_path / "b.jsonl", 40, range(40))
    limits = {"limit_val_batches": 1, "limit_test_batches": 1} if limited else {}
    with pytest.raises(ValueError, match="samples cannot be used.*missing_image in b"):
        getattr(trainer(tmp_path, **limits), run)(model, datamodule=data([good], [good, bad]))


def test_a_look_at_a_few_held_out_batches_is_not_judged(model: Model, tmp_path: Path) -> None:
    good, some = chat(tmp_path / "a.jsonl", 40, range(0)), chat(tmp_path / "b.jsonl", 80, range(2))
    trainer(tmp_path, num_sanity_val_steps=1).fit(model, data([good], [some]))
    assert model.steps == 10


class StopEarly(L.Callback):
    """As a time limit does."""

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        trainer.should_stop = True


def test_a_run_that_is_stopped_early_is_judged(model: Model, tmp_path: Path) -> None:
    source = chat(tmp_path / "a.jsonl", 80, range(80))
    with pytest.raises(ValueError, match="4 of 4 samples cannot be used"):
        trainer(tmp_path, callbacks=[StopEarly()], max_epochs=-1, max_steps=50).fit(model, data([source]))


@pytest.mark.parametrize("key", ["train", "val"])
def test_an_empty_source_is_named(key: str, model: Model, tmp_path: Path) -> None:
    good, empty = chat(tmp_path / "a.jsonl", 40, range(0)), chat(tmp_path / "none.jsonl", 0, range(0))
    made = data([good, empty], []) if key == "train" else data([good], [good, empty])
    with pytest.raises(ValueError, match=rf"data\.{key}: the source 'none' \(.*none\.jsonl\) holds no sample"):
        trainer(tmp_path).fit(model, made)
    assert model.steps == 0


def test_a_share_without_samples_is_named_by_its_file(tmp_path: Path) -> None:
    source = chat(tmp_path / "a.jsonl", 4, range(0))
    with pytest.raises(ValueError, match=r"the source 'a' \(.*a\.jsonl\) holds no sample"):
        check_sources([Subset(source, np.zeros(0, np.int64))], {}, "data.train")


# ----- maps that pictures carry -----


@pytest.mark.parametrize("key", ["train", "val"])
def test_a_map_that_no_picture_carries_is_named_before_the_first_step(
    key: str, model: Model, bytes_spec: InputSpec, tmp_path: Path
) -> None:
    model.input_spec = replace(bytes_spec, known={"depth": "depth"})
    drawn, shapes = Scenes("captions", 8, size=32, maps=4), Shapes(8)
    made = data([drawn, shapes]) if key == "train" else data([drawn], [drawn, shapes])
    expected = (
        rf"the head 'depth' reads the map 'depth' .* source 'shapes' in data\.{key} carry none: .*heads\.depth null"
    )
    with pytest.raises(ValueError, match=expected):
        trainer(tmp_path).fit(model, made)
    assert model.steps == 0


def test_maps_that_are_there_and_texts_pass(model: Model, bytes_spec: InputSpec, tmp_path: Path) -> None:
    spec = replace(bytes_spec, known={"depth": "depth"}, pixels=replace(bytes_spec.pixels, size=8))
    model.input_spec = spec
    drawn, texts = Scenes("captions", 8, size=32, maps=4), chat(tmp_path / "a.jsonl", 40, range(0))
    trainer(tmp_path, max_steps=2).fit(model, data([drawn, texts]))
    assert model.steps == 2
    other = replace(spec, known={"depth": "normals"})
    model.input_spec = other
    with pytest.raises(ValueError, match="reads the map 'normals' .* carry depth, segmentation:"):
        trainer(tmp_path, max_steps=2).fit(model, data([drawn, texts]))


# ----- marks that the tokenizer does not know -----


class Late(SingleDeviceStrategy):
    """Restores a checkpoint when the model is set up, as sharded strategies do."""

    restore_checkpoint_after_setup = True


class Scheduled(Model):
    """Counts the steps of the run, and so makes the loader, before training begins."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, Late])
def test_marks_in_letters_begin_no_run_and_end_none(
    strategy: type[SingleDeviceStrategy],
    bytes_spec: InputSpec,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Scheduled(replace(bytes_spec, tokenizer=byte_tokenizer()))

    def fit(template: Template, steps: int, checkpoint: Path | None = None) -> None:
        made = VLMData([chat(tmp_path / "a.jsonl", 40, range(0))], template, Resize(), batch_size=4)
        run = trainer(tmp_path, max_steps=steps, max_epochs=3, strategy=strategy("cpu"))
        run.fit(model, made, ckpt_path=checkpoint)
        run.save_checkpoint(tmp_path / "a.ckpt")

    with pytest.raises(ValueError, match=r"data\.template Phi3 writes .*new_tokens"):
        fit(Phi3(), 2)
    assert model.steps == 0
    fit(ChatML(), 2)
    assert not marks_logged(caplog)
    model.input_spec = replace(bytes_spec, tokenizer=byte_tokenizer())  # another process knows nothing of the above
    fit(Phi3(), 4, tmp_path / "a.ckpt")
    assert model.steps == 4
    (logged,) = marks_logged(caplog)
    assert logged.startswith("data.template Phi3 writes <|system|>, <|end|>")


def marks_logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "lit_vlm.data.sample.spelling"]


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_model_with_marks_in_letters_is_asked(
    verb: str, bytes_spec: InputSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model(replace(bytes_spec, tokenizer=byte_tokenizer()))
    sources = [chat(tmp_path / f"{name}.jsonl", 8, range(0)) for name in "abc"]
    getattr(trainer(tmp_path), verb)(model, VLMData(sources[:1], Phi3(), Resize(), val=sources[1:]))
    (logged,) = marks_logged(caplog)
    assert logged.startswith("data.template Phi3 writes <|system|>, <|end|>")
