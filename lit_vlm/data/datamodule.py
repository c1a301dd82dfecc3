"""The data of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lit_vlm.core.batch import BadSample, Batch
from lit_vlm.core.transfer import PINNED
from lit_vlm.data.feed.batching import Batching, GlobalBatch, Measures, Padded
from lit_vlm.data.feed.bins import Integers
from lit_vlm.data.feed.elastic import Moved
from lit_vlm.data.feed.loader import BadSamples, Collate, Loader, SourceDataset
from lit_vlm.data.feed.mixture import Mixture, Shuffled
from lit_vlm.data.feed.names import tell_apart
from lit_vlm.data.feed.plan import BatchPlan, Ordering
from lit_vlm.data.feed.split import split
from lit_vlm.data.feed.usable import check_sources
from lit_vlm.data.given import Given, as_sources
from lit_vlm.data.sample.collate import collate_prompts, make_rows
from lit_vlm.data.sample.encode import Sample, SampleEncoder
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.data.sample.prepared import Prepared
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sample.templates import Template
from lit_vlm.data.sample.transforms import ImageTransform
from lit_vlm.data.sets.engine import Local
from lit_vlm.data.sets.scan import modality_length, scan
from lit_vlm.data.sources import Source, Vetted


class HasInputSpec(Protocol):
    """The attributes of a run's LightningModule that the data module reads."""

    @property
    def input_spec(self) -> InputSpec:
        """What the data side knows of the model."""

    @property
    def device(self) -> torch.device:
        """The device that batches are moved to."""


class VLMData(LightningDataModule):
    """The data of a stage: sources, how samples are written and resized, and how they are put into batches.

    Args:
        train: sources to train on: name → source, a list of them, or the path of a file or folder.
        template: how messages are written for the decoder. In configs and flags `auto` is the chat template that comes
            with the decoder's tokenizer, `HFChat`, and `Plain` where a stage has it.
        transform: how pictures are resized for the encoder.
        val: held-out sources, given like `train`; for validate, test and predict.
        held_out: share of each training source that is never trained on, by a hash of the record id; it joins `val`.
        batch_size: rows per micro-batch and device. Rows per optimizer step are this × devices ×
            trainer.accumulate_grad_batches. A row is a sample, or, packed, up to `max_length` positions of samples.
        max_length: most positions of a sample, image tokens included; packed, of a row.
        mixture: how much of each source an epoch takes, and in which order.
        batching: how samples become rows: `Padded`, `ModalityLength` or `Packed`.
        too_long: whether a longer sample loses its tail (images only as a whole) or is dropped.
        fast_jpeg: decode a JPEG at a fraction of its size where at least twice the size that is needed is left.
        prepared: head, or `encoder` for a frozen encoder → folder of features that `lit-vlm prepare targets` made; null
            computes them online.
        num_workers: loader processes per device.
        seed: seed of the order of samples.
        bad_samples: what happens to samples that cannot be used.
        deny: a deny-list (`DenyList`) for all sources: records with one of its addresses, or a picture of one of its
            hashes, are left out. `Vetted` gives one to a single source.

    Raises:
        ValueError: for numbers out of range, names or paths of sources that do not work, and folders without features.
    """

    def __init__(
        self,
        train: Given,
        template: Template,
        transform: ImageTransform,
        val: Given | None = None,
        held_out: float = 0.0,
        batch_size: int = 8,
        max_length: int = 2048,
        mixture: Mixture = Shuffled(),  # noqa: B008 - never changed
        batching: Batching = Padded(),  # noqa: B008 - never changed
        too_long: Literal["truncate", "drop"] = "truncate",
        fast_jpeg: bool = True,
        prepared: dict[str, str | None] | None = None,
        num_workers: int = 0,
        seed: int = 0,
        bad_samples: BadSamples = BadSamples(),  # noqa: B008 - frozen
        deny: str | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"data.batch_size and data.max_length are at least 1, not {batch_size} and {max_length}")
        if num_workers < 0:
            raise ValueError(f"data.num_workers is at least 0, not {num_workers}")
        if not 0 <= held_out < 1:
            raise ValueError(f"data.held_out is a share from 0 to below 1, not {held_out}")
        self.given_train, self.given_val = as_sources(train, "data.train"), as_sources(val, "data.val")
        self.held_out = held_out
        tell_apart(self.given_train)
        tell_apart(self.given_val, self.given_train, strictly=held_out > 0)
        if deny is not None:
            self.given_train = [Vetted(source, deny) for source in self.given_train]
            self.given_val = [Vetted(source, deny) for source in self.given_val]
        self.template, self.transform = template, transform
        self.batch_size, self.max_length, self.too_long = batch_size, max_length, too_long
        self.mixture, self.batching, self.fast_jpeg = mixture, batching, fast_jpeg
        self.num_workers, self.seed, self.bad_samples = num_workers, seed, bad_samples
        self.prepared = {name: Prepared(path) for name, path in (prepared or {}).items() if path is not None}
        self._train: Loader | None = None
        self._resume: dict[str, Any] | None = None

    @cached_property
    def _split(self) -> tuple[list[Source], list[Source]]:
        if not self.held_out:
            return self.given_train, self.given_val
        pairs = [split(source, self.held_out, self.num_workers) for source in self.given_train]
        return [kept for kept, _ in pairs], [*self.given_val, *(held_out for _, held_out in pairs if len(held_out))]

    @property
    def train_sources(self) -> list[Source]:
        """The sources to train on, without held-out records."""
        return self._split[0]

    @property
    def val_sources(self) -> list[Source]:
        """The held-out sources, and the held-out records of the training sources."""
        return self._split[1]

    @property
    def format(self) -> SampleFormat:
        """The format of samples, for later questions to the trained model."""
        return SampleFormat(self.template, self.transform, self.max_length, self.fast_jpeg)

    def sample_encoder(self, spec: InputSpec, prompt: bool = False) -> SampleEncoder:
        """The encoder of this stage's records, without prepared features.

        A prompt needs no teacher; one that is too long is dropped, as cutting it would cut the question off. Marks of
        the template that the tokenizer does not know are written in letters, with one warning; call
        `SampleFormat.check_marks` before to refuse them.

        Args:
            spec: what the data side knows of the model.
            prompt: write only up to the next answer, for generation.
        """
        if prompt:
            return self.format.sample_encoder(spec.without_teachers(), "drop", prompt)
        return self.format.sample_encoder(spec, self.too_long)

    def train_sample_encoder(self, spec: InputSpec) -> SampleEncoder:
        """The encoder of training records, which reads prepared features; those of held-out images are computed.

        Raises:
            ValueError: when `data.prepared` names a head that the model does not have, or a set that does not fit.
        """
        encode = self.sample_encoder(spec)
        for name, prepared in self.prepared.items():
            if name not in spec.networks:
                raise ValueError(f"data.prepared names '{name}'; this model has {', '.join(spec.networks)}")
            fingerprints = {source.name: source.fingerprint() for source in self.given_train}
            prepared.check(name, spec.networks[name], encode.preprocessing(), fingerprints)
        return replace(encode, prepared=self.prepared)

    def collator(self, spec: InputSpec, prompt: bool = False, prepared: Sequence[str] = ()) -> Collate:
        """The function that makes a batch of rows of samples.

        Args:
            spec: what the data side knows of the model.
            prompt: whether samples are prompts, which are padded on the left.
            prepared: heads or `encoder` whose features come with the samples.
        """
        pad_id = spec.tokenizer.pad_token_id
        if prompt:
            return partial(_collate_rows_of_prompts, pad_id=pad_id)
        length = self.max_length if spec.fixed_rows and self.batching.packs else 0
        return partial(make_rows, pad_id=pad_id, prepared=prepared, length=length)

    def plan(
        self,
        sources: Sequence[Source],
        spec: InputSpec,
        rank: int,
        global_batch: GlobalBatch,
        shuffle: bool,
        prompt: bool = False,
    ) -> BatchPlan:
        """The plan of batches: which samples each batch takes.

        Args:
            sources: the sources, one after the other.
            spec: what the data side knows of the model.
            rank: the rank whose batches these are.
            global_batch: how rows are dealt out to ranks.
            shuffle: False takes the samples in order.
            prompt: whether samples are prompts, which have a row each.

        Raises:
            ValueError: for a mixture that does not fit the sources.
        """
        batching = Padded() if prompt else self.batching
        ordering = Ordering(sources, self.mixture, batching, self._measures(sources, spec), self.seed)
        return BatchPlan(ordering, global_batch, rank, shuffle)

    def _measures(self, sources: Sequence[Source], spec: InputSpec) -> Measures:
        workers = Local(self.num_workers)

        def modality_lengths() -> Integers:
            found = [scan(s, modality_length, 1, "modality length", workers, "lengths of") for s in sources]
            return np.concatenate([one[:, 0] for one in found], dtype=np.int32, casting="same_kind")

        def sizes() -> Integers:
            encode = self.sample_encoder(spec)
            key = encode.measure_key()
            found = [scan(s, encode.measure, 2, key, workers, "tokens of") for s in sources]
            return np.concatenate(found, dtype=np.int32, casting="same_kind")

        return Measures(modality_lengths, sizes, self.max_length)

    def train_dataloader(self) -> Loader:
        """The loader of training data, shuffled, each epoch in an order of its own.

        Raises:
            ValueError: for data that can never work (a source without samples or maps, marks that the tokenizer lacks,
                prepared features of something else), and when a resumed run could not continue in the same order.
        """
        self._train = self._loader(self.train_sources, "train")
        self._go_on()
        return self._train

    def state_dict(self) -> dict[str, Any]:
        """State of the training loader: the place of the next batch.

        It is kept here and not left to Lightning's fit loop, which forgets the state when the loader was already made
        to count the steps of a schedule, as is usual, and would start the epoch anew.
        """
        return {"train": self._train.state_dict()} if self._train else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, now or as soon as the loader is made.

        Raises:
            ValueError: as `Loader.load_state_dict`, and when the number of steps was asked for before and changes now.
        """
        self._resume = state_dict.get("train")
        known = len(self._train) if self._train is not None else None
        self._go_on()
        if self._train is not None and known not in (None, len(self._train)):
            raise ValueError(
                f"an epoch of this run has {len(self._train)} micro-batches, as {type(self.mixture).__name__} made it "
                f"for the devices that it began on, and the schedule was made for {known}: go on with lit-vlm fit, or "
                "give the data its state before the trainer's fit"
            )

    @property
    def moved(self) -> Moved | None:
        """How places of an epoch changed, where training goes on with other micro-batches; None where not."""
        return self._train.batch_sampler.moved if self._train is not None else None

    def _go_on(self) -> None:
        if self._train is not None and self._resume is not None:
            self._train.load_state_dict(self._resume)
            self._resume = None

    def val_dataloader(self) -> list[Loader]:
        """Loaders of held-out data, in order, one for each source.

        Raises:
            ValueError: for data that can never work, as `train_dataloader`.
        """
        return [self._loader([source], "val") for source in self.val_sources]

    def test_dataloader(self) -> list[Loader]:
        """The loaders of `val_dataloader`; raises as it does."""
        return self.val_dataloader()

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch, which the loader has pinned, without waiting; Lightning itself would wait for each tensor."""
        return batch.to(device, non_blocking=device.type in PINNED)

    def predict_dataloader(self) -> Loader:
        """The loader of prompts of the held-out data.

        Raises:
            ValueError: when there is no held-out data, and as `val_dataloader`.
        """
        if not self.val_sources:
            raise ValueError("lit-vlm predict answers the questions of data.val, which is empty")
        return self._loader(self.val_sources, "predict")

    def _loader(self, sources: list[Source], phase: Literal["train", "val", "predict"]) -> Loader:
        assert self.trainer is not None
        module = cast(HasInputSpec, self.trainer.lightning_module)
        spec = module.input_spec
        prompt = phase == "predict"
        encode = self.train_sample_encoder(spec) if phase == "train" else self.sample_encoder(spec, prompt)
        dataset = SourceDataset(sources, encode)
        check_marks = partial(self._check_marks, spec)
        if self.trainer.ckpt_path is not None or not self.trainer.strategy.restore_checkpoint_after_setup:
            check_marks()
        check_sources(sources, encode.spec.known, f"data.{'train' if phase == 'train' else 'val'}")
        rank = self.trainer.global_rank
        window = self.trainer.accumulate_grad_batches if phase == "train" else 1
        global_batch = GlobalBatch(self.batch_size, self.trainer.world_size, window)
        return Loader(
            dataset,
            self.plan(sources, spec, rank, global_batch, phase == "train", prompt),
            self.collator(spec, prompt, (*encode.prepared, *spec.known)),
            num_workers=self.num_workers,
            window=window,
            bad_samples=self.bad_samples,
            log=Path(self.trainer.default_root_dir) / f"bad_samples{f'-rank{rank}' if rank else ''}.jsonl",
            pin_memory=module.device.type == "cuda" or self.trainer.strategy.root_device.type == "cuda",
            stops_at=partial(_stops_at, self.trainer, phase, window),
            on_start=check_marks,
            own_counts=spec.own_counts if phase == "train" else None,
            resumes_at=partial(_resumes_at, self.trainer) if phase == "train" else None,
        )

    def _check_marks(self, spec: InputSpec) -> None:
        """Refuse a template whose marks the tokenizer does not know where training begins; warn where it continues.

        Lightning knows which of the two it is before a loader is made; with a sharded strategy, only before the loader
        begins.

        Raises:
            ValueError: as `SampleFormat.check_marks`.
        """
        assert self.trainer is not None
        begins = self.trainer.state.fn == TrainerFn.FITTING and self.trainer.ckpt_path is None
        self.format.check_marks(spec, "refuse" if begins else "warn")

    def teardown(self, stage: str) -> None:
        """Judge the samples of a training that stopped before its loader judged them.

        Raises:
            ValueError: when too many samples cannot be used; see `Loader.judge`.
        """
        if stage == "fit" and self._train is not None:
            self._train.judge()

    def fingerprints(self) -> dict[str, str]:
        """`train/NAME` or `val/NAME` of each source → hash of its content."""
        parts = {"train": self.train_sources, "val": self.val_sources}
        return {f"{part}/{source.name}": source.fingerprint() for part, sources in parts.items() for source in sources}

    def provenance(self) -> dict[str, dict[str, str]]:
        """`train/NAME` or `val/NAME` of each source → licence, origin and revision, as far as they are known."""
        parts = {"train": self.train_sources, "val": self.val_sources}
        return {
            f"{part}/{source.name}": source.provenance.known() for part, sources in parts.items() for source in sources
        }


def _stops_at(trainer: Trainer, phase: str, window: int, start: int, length: int) -> int:
    """The batch of an epoch that the trainer stops in front of, as far as that is known when the epoch begins."""
    if trainer.sanity_checking:
        return length  # a few batches to see that nothing breaks; held-out data is judged when all of it was read
    limits = {
        "train": trainer.limit_train_batches,
        "predict": trainer.limit_predict_batches,
        "val": trainer.limit_test_batches if trainer.testing else trainer.limit_val_batches,
    }
    limit = limits[phase]
    stop = limit if isinstance(limit, int) else int(length * limit)
    if phase == "train" and trainer.max_steps >= 0:
        stop = min(stop, start + (trainer.max_steps - trainer.global_step) * window)
    return stop


def _resumes_at(trainer: Trainer, handed_out: int) -> int:
    """The batch that a run resumed now begins with: the first that was not trained on."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    trained = handed_out - (progress.ready - progress.processed)  # one that a step has begun with is not trained on yet
    if trained >= trainer.num_training_batches:  # a limited epoch is over, and the next begins with its first batch
        return 0
    return trained


def _collate_rows_of_prompts(rows: Sequence[Sequence[Sample]], bad: Sequence[BadSample], pad_id: int) -> Batch:
    return collate_prompts([sample for row in rows for sample in row], bad, pad_id)
