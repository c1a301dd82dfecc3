from __future__ import annotations

import json
import logging
import re
from collections import Counter
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from mlflow import MlflowClient

from callbacks import Checkpoint, FreezeGuard, GradientMonitor, HeldOut, Memory, Predictions, Throughput
from lit_vlm.core.batch import VisualTokens
from lit_vlm.data import ChatJsonl, ChatML, SquareCrop, VLMData
from lit_vlm.data.sample.collate import collate
from lit_vlm.decoders import HFDecoder
from lit_vlm.embedders import Splice
from lit_vlm.encoders import HFEncoder, TimmEncoder
from lit_vlm.evaluation.asker import Asker
from lit_vlm.evaluation.held_out import held_out_scores, judge_held_out
from lit_vlm.evaluation.held_out_records import held_out_records
from lit_vlm.projectors import MLP
from lit_vlm.training.module import LitVLM
from lit_vlm.training.stage import Stage
from lit_vlm.training.tracking import MLflow
from lit_vlm.worlds import Shapes
from tests.tiny import CLIP, LLAMA


def lit(**changes) -> LitVLM:
    settings = {"train": {"projector": 1e-3}} | changes
    return LitVLM(
        partial(HFEncoder, config=CLIP),
        MLP,
        Splice,
        partial(HFDecoder, config=LLAMA, tokenizer="bytes"),
        Stage(**settings),
    )


def data(**changes) -> VLMData:
    return VLMData(
        [Shapes(24)], ChatML(), SquareCrop(), val=[Shapes(8, seed=1)], batch_size=4, max_length=256, **changes
    )


def trainer(folder: Path, *callbacks: L.Callback, **changes) -> L.Trainer:
    settings = {"max_steps": 4, "logger": False, "log_every_n_steps": 2} | changes
    return L.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks), **settings,
    )  # fmt: skip


class Meddler(L.Callback):
    """Changes a frozen weight behind the optimizer's back."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        with torch.no_grad():
            pl_module.vlm.decoder.lm.model.norm.weight[3] += 1e-3


def test_freeze_guard_is_silent_when_frozen_stays_frozen_and_names_what_changed(tmp_path: Path) -> None:
    trainer(tmp_path, FreezeGuard()).fit(lit(), data())
    with pytest.raises(
        RuntimeError, match=r"1 frozen tensors changed in stage 'stage', first \['decoder.lm.model.norm.weight'\]"
    ):
        trainer(tmp_path, FreezeGuard(), Meddler()).fit(lit(), data())


def test_batch_statistics_of_a_frozen_encoder_stay(tmp_path: Path) -> None:
    module = lit()
    module.slots.encoder = partial(TimmEncoder, "resnet10t", pretrained=None, image_size=32)
    trainer(tmp_path, FreezeGuard()).fit(module, data())
    assert not module.vlm.encoder.training


class Poison(L.Callback):
    """Makes the pictures of one step useless."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 2:
            pl_module.vlm.encoder.pixel_mean.fill_(float("nan"))


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Spy(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            seen.append([sample.id for sample in batch.samples])

    checkpoint = Checkpoint(every_n_steps=1)
    with pytest.raises(
        ValueError, match="non-finite loss at step 2; samples of that step on this rank: shapes/"
    ) as stopped:
        trainer(tmp_path, GradientMonitor(), Poison(), Spy(), checkpoint).fit(lit(), data())
    assert all(f"shapes/{name}" in str(stopped.value) for name in seen[2])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step=00000002.ckpt"]


def test_gradient_norms_per_slot_and_a_warning_for_idle_parameters(tmp_path: Path, caplog) -> None:
    module = lit(train={"projector": 1e-3, "encoder": 1e-3})
    run = trainer(tmp_path, GradientMonitor())
    with caplog.at_level(logging.WARNING):
        run.fit(module, data())
    assert {"grad_norm/projector", "grad_norm/encoder", "grad_norm/total"} <= run.callback_metrics.keys()
    assert "get no gradient" not in caplog.text

    class Detached(MLP):
        def __init__(self, in_width: int, out_width: int) -> None:
            super().__init__(in_width, out_width)
            self.unused = torch.nn.Linear(2, 2)

    module.slots.projector = Detached
    idle = LitVLM(module.slots.encoder, Detached, Splice, module.slots.decoder, Stage(train={"projector": 1e-3}))
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, GradientMonitor()).fit(idle, data())
    assert "2 parameters train but got no gradient, first: projector.unused.weight" in caplog.text


def test_throughput_counts_tokens_without_padding(tmp_path: Path) -> None:
    run = trainer(tmp_path, Throughput(peak=1e12))
    run.fit(lit(), data())
    metrics = run.callback_metrics
    assert metrics["throughput/tokens_per_s"] > 0
    assert 0 < metrics["throughput/supervised"] < 0.5
    assert 0.5 < metrics["throughput/fill"] <= 1
    assert 0 <= metrics["throughput/data_wait"] <= 1
    assert 0 < metrics["throughput/mfu"] < 1


def test_the_peak_of_the_process_is_logged_and_counts_anew_each_time(tmp_path: Path) -> None:
    logged: list[float] = []

    class Hoard(L.Callback):
        """Holds 200 MiB during the first step only."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 0:
                torch.ones(200 * 2**18)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            logged.append(float(trainer.callback_metrics["memory/host"]))

    run = trainer(tmp_path, Memory(), Hoard(), log_every_n_steps=1)
    run.fit(lit(), data())
    assert not {"memory/allocated", "memory/reserved"} & run.callback_metrics.keys()
    assert 0.05 < logged[-1] < 64
    assert logged[0] - logged[-1] > 0.15


class Undecided(MLP):
    """Looks at values, which the meta device has none of."""

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        return super().forward(tokens) if tokens.features.sum() < 1e9 else tokens


def test_what_cannot_be_counted_leaves_mfu_out_and_training_goes_on(tmp_path: Path, caplog) -> None:
    module = lit()
    module.slots.projector = Undecided
    run = trainer(tmp_path, Throughput(peak=1e12))
    with caplog.at_level(logging.WARNING):
        run.fit(module, data())
    assert run.global_step == 4
    assert "throughput/mfu is left out: a part does not run on the meta device" in caplog.text
    assert "throughput/mfu" not in run.callback_metrics
    assert run.callback_metrics["throughput/tokens_per_s"] > 0


@pytest.mark.slow
def test_held_out_scores_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = MLflow(tracking_uri=f"sqlite:///{tmp_path}/m.db")
    run = trainer(tmp_path, HeldOut(batch_size=3), Predictions(num=3, every_n_steps=2), logger=logger)
    run.fit(lit(), data())
    scores = json.loads((tmp_path / "held_out.json").read_text())
    assert scores["before"]["num_records"] == 8
    assert scores["after"]["loss"] != scores["before"]["loss"]
    printed = capsys.readouterr().out
    assert re.search(r"held out: asking 8 questions of \w+, before training: 0 of 8", printed)
    assert re.search(r"held out: 8 questions of \w+, each with the pictures of another: loss ", printed)
    answers = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    for when in ("before", "after", "shuffled"):
        own = [line for line in answers if line["when"] == when]
        assert len({line["id"] for line in own}) == len(own) == 8
        loss = sum(line["nll"] for line in own) / sum(line["tokens"] for line in own)
        assert loss == pytest.approx(scores[when]["loss"])
        for name in ("exact_match", "token_f1"):
            assert sum(line[name] for line in own) / 8 == pytest.approx(scores[when][name])
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert len(answers) == 3
    assert (tmp_path / "answers-step=00000002.png").stat().st_size > 1000
    files = {item.path for item in MlflowClient(f"sqlite:///{tmp_path}/m.db").list_artifacts(logger.version)}
    assert {"answers.png", "answers.json", "answers-step=00000004.png"} <= files


def test_without_options_no_score_of_choices_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "2"}]} for n in range(4)
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    talk = ChatJsonl(str(tmp_path / "talk.jsonl"))
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, HeldOut(), max_steps=1, logger=logger)
    run.fit(lit(), VLMData([talk], ChatML(), SquareCrop(), val=[talk], batch_size=2, max_length=256))
    scores = json.loads((tmp_path / "held_out.json").read_text())["after"]
    assert (scores["choice_accuracy"], scores["choice_chance"], scores["num_choices"]) == (None, None, 0)
    assert "choice" not in capsys.readouterr().out
    logged = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "held_out/after_exact_match" in logged
    assert not {name for name in logged if "choice_accuracy" in name or "choice_chance" in name}


def test_what_is_too_long_to_be_asked_is_left_out_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Cut, such a record would end in an earlier answer, and its prompt in the middle of a question.
    module, source = lit(), data()
    trainer(tmp_path, max_steps=1).fit(module, source)
    whole = held_out_records(Asker(module, source.format), source.val_sources)
    encode = source.format.sample_encoder(module.input_spec)
    lengths = sorted(len(encode(record, Path("/"))) for record in whole)
    short = data()
    short.max_length = lengths[3]
    kept = held_out_records(Asker(module, short.format), short.val_sources)
    assert [len(encode(record, Path("/"))) <= lengths[3] for record in kept] == [True] * len(kept)
    assert 4 <= len(kept) < len(whole)
    assert f"{len(whole) - len(kept)} of the held-out records looked at are left out" in caplog.text
    assert "too_long" in caplog.text


def test_scores_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    module, source = lit(), data()
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, source)
    records = held_out_records(Asker(module, source.format), source.val_sources)
    one, five = (held_out_scores(judge_held_out(Asker(module, source.format), records, size)) for size in (1, 5))
    assert one.loss == pytest.approx(five.loss, rel=1e-5)
    assert one.exact_match == five.exact_match
    assert one.choice_accuracy == five.choice_accuracy
    encode = source.sample_encoder(module.input_spec)
    samples = [encode(record, Path("/")) for record in records]
    whole = sum(float(module.vlm.target_nll(collate([sample])).sum()) for sample in samples)
    assert one.loss == pytest.approx(whole / sum(sample.num_supervised for sample in samples), rel=1e-5)


def test_a_limit_spreads_the_questions_over_the_held_out_data(tmp_path: Path) -> None:
    module, source = lit(), data()
    trainer(tmp_path, max_steps=1).fit(module, source)
    every = [record.id for record in held_out_records(Asker(module, source.format), source.val_sources)]
    few = [record.id for record in held_out_records(Asker(module, source.format), source.val_sources, 2)]
    assert few == [every[0], every[5]]
    assert len({record.id for record in held_out_records(Asker(module, source.format), source.val_sources, 7)}) == 7


def test_a_limit_takes_its_share_of_each_source_and_something_of_all(tmp_path: Path) -> None:
    module, source = lit(), data()
    trainer(tmp_path, max_steps=1).fit(module, source)
    many, few, one = Shapes(30, seed=1), Shapes(15, seed=2), Shapes(1, seed=3)
    for name, held_out in (("many", many), ("few", few), ("one", one)):
        held_out.name = name
    found = held_out_records(Asker(module, source.format), [many, few, one], 10)
    assert Counter(record.source for record in found) == {"many": 6, "few": 3, "one": 1}
    assert len({(record.source, record.id) for record in found}) == 10
    with pytest.raises(ValueError, match=r"there is no usable one: --data.held_out 0.1 keeps a tenth"):
        trainer(tmp_path, HeldOut(), max_steps=1).fit(lit(), VLMData([many], ChatML(), SquareCrop()))


def test_only_the_samples_of_the_broken_step_are_named_under_accumulation(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Spy(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            seen.append([sample.id for sample in batch.samples])

    with pytest.raises(ValueError, match="non-finite loss at step 1") as stopped:
        trainer(tmp_path, GradientMonitor(), Poison(), Spy(), accumulate_grad_batches=2).fit(lit(), data())
    named = {name for batch in seen for name in batch if f"shapes/{name}," in f"{stopped.value}".replace(". Look", ",")}
    assert named == {*seen[2], *seen[3]}
