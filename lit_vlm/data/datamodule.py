"""The data of a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lightning.pytorch import LightningDataModule

from lit_vlm.batch import BadSample, Batch
from lit_vlm.data.collate import collate, collate_packed, collate_prompts
from lit_vlm.data.encode import Sample, SampleEncoder
from lit_vlm.data.loader import BadSamples, BatchPlan, Loader, SourceDataset
from lit_vlm.data.sources import Source
from lit_vlm.data.spec import InputSpec
from lit_vlm.data.templates import Template
from lit_vlm.data.transforms import ImageTransform

if TYPE_CHECKING:
    from lit_vlm.module import LitVLM

Collate = Callable[[Sequence[Sample], Sequence[BadSample]], Batch]


class VLMData(LightningDataModule):
    """Sources, how they are written and resized, and how they are put into batches.

    Args:
        train: sources to train on.
        template: how messages are written for the decoder.
        transform: how pictures are resized for the encoder.
        val: held-out sources, for validate, test and predict too.
        batch_size: samples per micro-batch and device. Samples per optimizer step are this × devices ×
            trainer.accumulate_grad_batches.
        max_length: positions per sample at most, image tokens included.
        packing: put several samples into a row of `max_length` positions; attention and loss do not cross.
        too_long: whether a longer sample loses its tail (images only as a whole) or is dropped.
        num_workers: loader processes per device.
        seed: of the order of samples.
        bad_samples: what happens to samples that cannot be used.
    """

    def __init__(
        self,
        train: list[Source],
        template: Template,
        transform: ImageTransform,
        val: list[Source] | None = None,
        batch_size: int = 8,
        max_length: int = 2048,
        packing: bool = False,
        too_long: Literal["truncate", "drop"] = "truncate",
        num_workers: int = 0,
        seed: int = 0,
        bad_samples: BadSamples = BadSamples(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"data.batch_size and data.max_length are at least 1, not {batch_size} and {max_length}")
        self.train_sources, self.val_sources = train, val or []
        self.template, self.transform = template, transform
        self.batch_size, self.max_length, self.packing, self.too_long = batch_size, max_length, packing, too_long
        self.num_workers, self.seed, self.bad_samples = num_workers, seed, bad_samples
        self._train: Loader | None = None
        self._resume: dict[str, Any] | None = None

    def encoder(self, spec: InputSpec, prompt: bool = False) -> SampleEncoder:
        """How a record becomes a sample of this stage."""
        return SampleEncoder(spec, self.template, self.transform, self.max_length, self.too_long, prompt)

    def collator(self, spec: InputSpec) -> Collate:
        """How samples become a training batch of this stage."""
        pad_id = spec.tokenizer.pad_token_id
        if self.packing:
            return partial(_packed, capacity=self.max_length, pad_id=pad_id)
        return partial(collate, pad_id=pad_id)

    def train_dataloader(self) -> Loader:
        """Shuffled; each epoch in an order of its own."""
        self._train = self._loader(self.train_sources, "train", shuffle=True)
        self._go_on()
        return self._train

    def state_dict(self) -> dict[str, Any]:
        """Where training is in its data.

        Kept here and not left to Lightning's fit loop: that one forgets the state when the loader was already made to
        count the steps of a schedule, which is the usual case, and would start the epoch anew.
        """
        return {"train": self._train.state_dict()} if self._train else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, now or as soon as the loader is made."""
        self._resume = state_dict.get("train")
        self._go_on()

    def _go_on(self) -> None:
        if self._train is not None and self._resume is not None:
            self._train.load_state_dict(self._resume)
            self._resume = None

    def val_dataloader(self) -> Loader | list[Loader]:
        """Held-out data, in order."""
        return self._loader(self.val_sources, "val") if self.val_sources else []

    def test_dataloader(self) -> Loader | list[Loader]:
        """The same data as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Loader:
        """Prompts of the held-out data."""
        if not self.val_sources:
            raise ValueError("lit-vlm predict answers the questions of data.val, which is empty")
        return self._loader(self.val_sources, "predict")

    def _loader(self, sources: list[Source], phase: str, shuffle: bool = False) -> Loader:
        assert self.trainer is not None
        module = cast("LitVLM", self.trainer.lightning_module)
        spec = module.input_spec
        prompt = phase == "predict"
        dataset = SourceDataset(sources, self.encoder(spec, prompt))
        if not len(dataset):
            raise ValueError(f"data.{'train' if phase == 'train' else 'val'} holds no sample")
        rank, world = self.trainer.global_rank, self.trainer.world_size
        pad_id = spec.tokenizer.pad_token_id
        return Loader(
            dataset,
            BatchPlan(len(dataset), self.batch_size, rank, world, shuffle, self.seed),
            partial(collate_prompts, pad_id=pad_id) if prompt else self.collator(spec),
            num_workers=self.num_workers,
            window=self.trainer.accumulate_grad_batches if phase == "train" else 1,
            bad_samples=self.bad_samples,
            log=Path(self.trainer.default_root_dir) / f"bad_samples{f'-rank{rank}' if rank else ''}.jsonl",
            pin_memory=module.device.type == "cuda" or self.trainer.strategy.root_device.type == "cuda",
        )

    def fingerprints(self) -> dict[str, str]:
        """A hash of the content of each source."""
        parts = {"train": self.train_sources, "val": self.val_sources}
        return {f"{part}/{source.name}": source.fingerprint() for part, sources in parts.items() for source in sources}


def _packed(samples: Sequence[Sample], bad: Sequence[BadSample], capacity: int, pad_id: int) -> Batch:
    return collate_packed(samples, capacity, bad, pad_id)
