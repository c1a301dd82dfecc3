"""The LightningModule: builds the parts, runs a step, logs."""

from __future__ import annotations

import logging
import math
import os
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from lit_vlm.checkpoints.weights import read_slots
from lit_vlm.core.batch import ENCODER, Batch
from lit_vlm.core.lora import NO_ADAPTERS, Adapters
from lit_vlm.core.precision import DTYPES, SCALED
from lit_vlm.core.progress import slowly
from lit_vlm.core.quantised import UNQUANTISED, Quantize
from lit_vlm.core.tokenizers import decoded
from lit_vlm.core.transfer import Fetched, on_host, send_numbers
from lit_vlm.data.datamodule import VLMData
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.decoders import AbsentDecoder, Decoder
from lit_vlm.embedders import Embedder
from lit_vlm.encoders import Encoder
from lit_vlm.heads import Head, Normaliser
from lit_vlm.heads.base import counted
from lit_vlm.model.build import Slots, build, build_on_meta, load_teachers, quantise_slots
from lit_vlm.model.generate import generate
from lit_vlm.model.vlm import NEXT_TOKEN, VLM
from lit_vlm.projectors import Projector
from lit_vlm.training.average import WeightAverage, check_resumed
from lit_vlm.training.compiling import compile_blocks
from lit_vlm.training.frozen import narrow_whole
from lit_vlm.training.left_out import LeftOut, check_base, find_bases
from lit_vlm.training.optim import learning_rates
from lit_vlm.training.sharding import FSDP2, reshard, shard
from lit_vlm.training.stage import Stage

log = logging.getLogger(__name__)


class LitVLM(LightningModule):
    """A vision-language model in training: five slots and a stage.

    Args:
        encoder: pixels → visual tokens.
        projector: encoder width → decoder width, maybe fewer tokens.
        embedder: text ids and visual tokens → decoder inputs.
        decoder: the language model.
        stage: which slots train, at which learning rate, and which losses are on.
        heads: auxiliary losses by name; null removes one.
        compile: `blocks` compiles the repeated blocks of all parts for training (torch.compile), each kind of them as
            one graph, and pads packed rows to `data.max_length`, so that their shape stays the same. Not measured on a
            GPU yet.
        lora: low-rank adapters on the linear layers of slots; a slot that trains then trains these alone.
        quantize: types of 4 or 8 bits in which frozen weights of slots are stored (QLoRA).

    Attributes:
        has_values: whether weights have values; False where a step is only planned.
        average: the averages of the weights that train, once training has begun; None where the stage has no `ema`.
        only_trained: whether checkpoints leave out frozen weights that can be read again from where they came from
            (`callbacks.Checkpoint`); None: where a slot has adapters. To be set before the model is built.
    """

    has_values = True

    def __init__(
        self,
        encoder: Callable[[], Encoder],
        projector: Callable[[int, int], Projector],
        embedder: Callable[[int, int], Embedder],
        decoder: Callable[[], Decoder],
        stage: Stage,
        heads: dict[str, Callable[[int, int], Head] | None] | None = None,
        compile: Literal["blocks"] | None = None,
        lora: Adapters = NO_ADAPTERS,
        quantize: Quantize = UNQUANTISED,
    ) -> None:
        super().__init__()
        self.slots = Slots(encoder, projector, embedder, decoder, heads or {}, lora, quantize)
        self.stage = stage
        self.compiles = compile == "blocks"
        self.model: VLM | None = None
        self.encoder_digest = ""
        self._spec: tuple[VLM, InputSpec] | None = None
        self.only_trained: bool | None = None
        self.average: WeightAverage | None = None
        self._validation = ExitStack()
        self._left_out: LeftOut | None = None
        self._denominators: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._held_out: dict[tuple[int, str], Tensor] = {}
        self._fetching: Fetched | None = None
        self._shown = torch.tensor(math.nan)

    # ------------------------------------------------------------------ building

    def configure_model(self) -> None:
        """Build the model, once; sharded where the strategy says so. Lightning calls this for every fit and test.

        Raises:
            ValueError: for another sharding strategy than FSDP2, processes of different precision, weights that are
                missing, do not fit or are beyond the range of fp16 in 16-mixed, or settings of the stage that do not
                fit the model (`Stage.freeze`).
        """
        if self.model is not None:
            return
        strategy = self.trainer.strategy
        self._agree_on_precision()
        narrow = self.narrow()
        if isinstance(strategy, ModelParallelStrategy):
            if not isinstance(strategy, FSDP2):
                raise ValueError(
                    "shard with lit_vlm.training.sharding.FSDP2: ModelParallelStrategy needs a mesh for tensor "
                    "parallelism"
                )
            self.model = self.build() if self.global_rank == 0 else build_on_meta(self.slots)
            self.encoder_digest = strategy.broadcast(self.encoder_digest)
            self._leave_out(self.model)
            self.stage.freeze(self.model, self.slots.removed_heads)
            self.store_frozen(self.model)
            mixed = str(self.trainer.precision) == "bf16-mixed"
            compute = torch.bfloat16 if mixed else None
            shard(self.model, strategy.shard_mesh(), compute, narrow is not None, fill=self.has_values)
        else:
            self.model = self.build()
            self._leave_out(self.model)
            self.stage.freeze(self.model, self.slots.removed_heads)
            self.store_frozen(self.model)
        self.stage.freeze(self.model, self.slots.removed_heads)
        if narrow is not None and not isinstance(strategy, FSDP2):
            # Also where nothing is saved now: a fit may follow a validation of the same model.
            narrow_whole(self.model, narrow, keep=self.trainer.is_global_zero)
        self.load_teachers(self.model, self._asked_teachers(self.model), narrow)
        # Modules are born in train mode, and Lightning keeps the mode it finds: frozen parts must be in eval mode.
        self.model.train()

    def load_teachers(self, model: VLM, names: Collection[str], dtype: torch.dtype | None) -> None:
        """Read the weights of the teachers of these heads; arguments and errors as for `build.load_teachers`."""
        load_teachers(model, names, dtype)

    def narrow(self) -> torch.dtype | None:
        """The type that frozen weights are stored in; None: their own (`Stage.frozen_dtype`)."""
        dtype = DTYPES.get(str(self.trainer.precision), torch.float32)
        return None if self.stage.frozen_dtype == "full" or dtype == torch.float32 else dtype

    def _asked_teachers(self, model: VLM) -> list[str]:
        """Heads whose teachers run: those whose loss is on and whose features were not prepared."""
        if self.trainer.state.fn == TrainerFn.PREDICTING:
            return []
        data = getattr(self.trainer, "datamodule", None)
        prepared = data.prepared if isinstance(data, VLMData) and self.trainer.state.fn == TrainerFn.FITTING else {}
        return [name for name in model.heads if self._uses(name) and name not in prepared]

    def _agree_on_precision(self) -> None:
        """Check that all processes train in the same precision; otherwise all of them raise ValueError."""
        names = [str(self.trainer.precision)] * self.trainer.world_size
        if dist.is_available() and dist.is_initialized():
            dist.all_gather_object(names, str(self.trainer.precision))
        if len(set(names)) > 1:
            raise ValueError(
                f"the processes of this run would train in {', '.join(names)}: their machines are not alike, so set "
                "trainer.precision instead of auto"
            )

    def build(self, only: Collection[str] | None = None) -> VLM:
        """The model with its weights, whole and on the CPU.

        Args:
            only: parts that get their weights, as in `build.build`; default: all.

        Raises:
            ValueError: as `read_slots` and `build.build`.
        """
        start = self.stage.start_from
        with slowly(f"building the model{f' from {start}' if start else ''}", self.global_rank == 0):
            saved = read_slots(start) if start else None
            model = build(self.slots, saved, tuple(self.stage.fresh), only, origin=str(start))
        if only is None or ENCODER in only:
            self.encoder_digest = model.encoder.digest()
        return model

    def _leave_out(self, model: VLM) -> None:
        """Replace the decoder by an empty one where the stage does without it; the embedder no longer needs it."""
        if self.stage.leave_out:
            model.decoder = AbsentDecoder(model.decoder)

    def store_frozen(self, model: VLM) -> None:
        """Keep frozen weights out of checkpoints (`only_trained`), and quantise them; rank 0 has all weights."""
        folder, kinds = Path(self.trainer.default_root_dir) / "checkpoints", self.slots.quantize.kinds()
        wanted = True if kinds and self.only_trained is None else self.only_trained
        found = find_bases(model, wanted, self.stage.start_from, folder) if self.global_rank == 0 else {}
        bases = self.trainer.strategy.broadcast(found)
        quantise_slots(model, self.slots.quantize, self.trainer.strategy.root_device)
        for slot in kinds:
            check_base(slot, bases)
        self._left_out = LeftOut(self, model, bases)
        self.strict_loading = not bases

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put averaged weights into a checkpoint, and say in one that leaves frozen ones out where they came from."""
        if self._left_out is not None:
            self._left_out.record(checkpoint)
        if self.average is not None:
            strategy = self.trainer.strategy
            self.average.record(checkpoint, strategy.for_checkpoint if isinstance(strategy, FSDP2) else dict)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that frozen weights which a checkpoint left out are those that this run has.

        Raises:
            ValueError: where they differ, weights are missing, or only one of checkpoint and stage averages weights.
        """
        if self._left_out is not None:
            self._left_out.check(checkpoint, set(self.state_dict()))
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_resumed(checkpoint, self.stage.ema)

    @property
    def vlm(self) -> VLM:
        """The model.

        Raises:
            RuntimeError: before `configure_model`, which builds it.
        """
        if self.model is None:
            raise RuntimeError("the model is built in configure_model, which has not run yet")
        return self.model

    @property
    def input_spec(self) -> InputSpec:
        """What the data side must know of this model; made once per model. Raises as `vlm` does."""
        if self._spec is None or self._spec[0] is not self.vlm:
            self._spec = (self.vlm, self._make_input_spec(self.vlm))
        return self._spec[1]

    def _make_input_spec(self, model: VLM) -> InputSpec:
        used = {name: head for name, head in model.heads.items() if isinstance(head, Head) and self._uses(name)}
        teachers = {name: head.teacher for name, head in used.items() if head.teacher is not None}
        known = {name: teacher.known for name, teacher in teachers.items() if teacher.known is not None}
        teachers = {name: teacher for name, teacher in teachers.items() if name not in known}
        return InputSpec(
            tokenizer=model.decoder.tokenizer,
            pixels=model.encoder.pixels,
            patch_grid=model.encoder.patch_grid,
            grid_map=model.grid_map,
            tile_map=model.embedder.tile_map,
            teacher_pixels={name: teacher.pixels for name, teacher in teachers.items()},
            known=known,
            networks={ENCODER: f"{model.encoder.identity()} weights {self.encoder_digest}"}
            | {name: teacher.identity() for name, teacher in teachers.items()},
            own_counts={
                name: partial(counted, head.normaliser)
                for name, head in used.items()
                if not isinstance(head.normaliser, str)
            },
            fixed_rows=self.compiles,
            end_ids=model.decoder.end_ids,
        )

    def _uses(self, loss: str) -> bool:
        """Whether the stage gives a loss a weight other than 0."""
        return bool(self.stage.losses.get(loss))

    def on_fit_start(self) -> None:
        """Warn of settings of the stage that are allowed but rarely meant (`Stage.remarks`)."""
        for line in self.stage.remarks(self.vlm):
            self._warn(line)

    def _warn(self, line: str | None) -> None:
        """Log a warning on the first process."""
        if line and self.global_rank == 0:
            log.warning("stage '%s': %s", self.stage.name, line)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The stage's optimizer and schedule.

        Lightning calls this when the model is on its device and before any callback begins, so a decoder that mixes up
        the samples of a row is refused here (`decoders.check_order`).

        Raises:
            ValueError: for such a decoder, a run without an end, or as `Stage.make_optimizer`.
        """
        self._check_decoder()
        optimizer = self.stage.make_optimizer(self.vlm, fused=str(self.trainer.precision) != SCALED)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError("the schedule needs the number of steps: set trainer.max_steps or trainer.max_epochs")
        self._warn(self.stage.schedule_remark(int(steps)))
        scheduler = self.stage.scheduler(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _check_decoder(self) -> None:
        """Check what tokens in the decoder see (`check_order`, `check_images`), unless it is left out."""
        if self.stage.leave_out:
            return
        data = getattr(self.trainer, "datamodule", None)
        with self.autocast():
            for packed in (False, True) if isinstance(data, VLMData) and data.batching.packs else (False,):
                self.vlm.check_order(packed, self.device)
                self.vlm.check_images(packed, self.device)
        reshard(self.vlm)  # frees what the root unit gathered, which the optimizer would take for its parameters

    # ------------------------------------------------------------------ training

    def begin_average(self) -> None:
        """Begin to average the weights that train, or go on as a resumed run did, where the stage averages."""
        self.average = None
        if self.stage.ema is not None:
            self.average = WeightAverage(self.vlm, self.stage.ema)
            if self.trainer.ckpt_path:
                self.average.read(Path(self.trainer.ckpt_path))

    def end_average(self) -> None:
        """Give the model the averaged weights, which are those that the stage leaves."""
        if self.average is not None:
            self.zero_grad()  # as much memory as the weights take that are kept
            self.average.use()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the model has the averaged weights, if there are some; all processes enter it."""
        if self.average is None or self.average.in_use:
            yield
            return
        self.average.use()
        try:
            yield
        finally:
            self.average.put_back()

    def on_train_start(self) -> None:
        """Compile blocks where `compile` says so; here, as the checks before ran them on rows of other shapes.

        Raises:
            ValueError: where weights should be averaged, and the trainer is Lightning's own.
        """
        if self.stage.ema is not None and self.average is None:
            raise ValueError(
                "model.stage.ema: Lightning's own Trainer averages nothing: use lit_vlm.training.trainer.Trainer"
            )
        if self.compiles:
            data = getattr(self.trainer, "datamodule", None)
            compile_blocks(self.vlm, isinstance(data, VLMData) and data.batching.packs)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout by epoch, batch and rank, so that a resumed run draws the numbers of an uninterrupted one.

        Gradients of the step before are freed, too: Lightning frees them after the forward pass, whose peak of memory
        they would raise.
        """
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.zero_grad()
        place = (int(os.environ.get("PL_GLOBAL_SEED", "0")), self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(zlib.crc32(repr(place).encode()))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Weighted sum of the losses, scaled so that the optimizer sees the mean over the whole global batch.

        Lightning divides by the micro-batches of a step and the strategy averages over ranks; both are undone, as the
        denominators already count all micro-batches of all ranks.

        Raises:
            ValueError: with accumulated gradients, for batches without the counts of their whole step.
        """
        denominators = self._denominators = self._denominators or self._count_step(batch)
        sums = self.vlm(batch, self.stage.losses)
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        total = torch.zeros((), device=self.device)
        for name, value in sums.items():
            denominator = denominators[name]
            total = total + self.stage.losses[name] * value * (scale / denominator)
            self._sums[name] = self._sums.get(name, 0) + value.detach() / denominator
        return total

    def _count_step(self, batch: Batch) -> dict[str, Tensor]:
        """The divisor of each loss: its count over all micro-batches of this step and all ranks; 1 where that is 0.

        Raises:
            ValueError: with accumulated gradients, for batches without the counts of their whole step.
        """
        normalisers = {name: self._normaliser(name) for name in (NEXT_TOKEN, *self.vlm.heads) if self._uses(name)}
        if batch.window is not None:
            counts, own = batch.window
            found = [
                float(getattr(counts, normaliser)) if isinstance(normaliser, str) else own[name]
                for name, normaliser in normalisers.items()
            ]
        elif self.trainer.accumulate_grad_batches == 1:
            found = [counted(normaliser, batch) for normaliser in normalisers.values()]
        else:
            raise ValueError(
                "trainer.accumulate_grad_batches is above 1, and these batches do not say what their whole step holds "
                "(Batch.window), which losses are divided by: take the loader of VLMData, or accumulate nothing"
            )
        sums = send_numbers(found, self.device)
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        return dict(zip(normalisers, torch.where(sums > 0, sums, 1).unbind(), strict=True))

    def _normaliser(self, loss: str) -> Normaliser:
        """The count that a loss is divided by, by name or as a function of a batch."""
        head = self.vlm.heads[loss] if loss != NEXT_TOKEN else None
        return head.normaliser if isinstance(head, Head) else "supervised"

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the exact means of the whole step, and the learning rates."""
        names = sorted(self._sums)
        values = torch.stack([self._sums[name] for name in names])
        values = self.trainer.strategy.reduce(values, reduce_op="sum")
        means = dict(zip(names, values.unbind(), strict=True))
        total = sum(self.stage.losses[name] * value for name, value in means.items())
        self.log("train/loss", total)
        self.log_dict({f"train/loss_{name}": value for name, value in means.items()})
        self.log_dict(on_host({f"lr/{slot}": rate for slot, rate in learning_rates(optimizer).items()}))
        self._show(total)
        self._sums, self._denominators = {}, {}

    def _show(self, loss: Tensor) -> None:
        """Put the loss on the progress bar: the last one that has arrived on the host, as asking for this would wait.

        Lightning reads what is on the bar in every step, also where there is no bar.
        """
        if self._fetching is None:
            self._fetching = Fetched(loss)
        if self._fetching.arrived():
            self._shown, self._fetching = self._fetching.get(), None
        self.log("loss", self._shown, prog_bar=True, logger=False)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients by norm (or value), sharded or not; Lightning's own clipping refuses the fused optimizer."""
        if gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            clip = clip_grad_value_ if gradient_clip_algorithm == "value" else clip_grad_norm_
            clip(parameters, gradient_clip_val)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Take a step, and take its weights into their average."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.average is not None:
            self.average.update(self.trainer.global_step + 1)  # Lightning counts the step afterwards

    # ------------------------------------------------------------------ evaluation

    def on_validation_start(self) -> None:
        """Validate the averaged weights, where there are some."""
        self._validation.enter_context(self.averaged())

    def on_validation_end(self) -> None:
        """Train on with the weights."""
        self._validation.close()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add up the losses of held-out data."""
        self._hold_out(batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add up the losses of test data."""
        self._hold_out(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss` and each loss."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Log `test/loss` and each loss."""
        self._log_held_out("test")

    def _hold_out(self, batch: Batch, loader: int) -> None:
        for name, value in self.vlm(batch, self.stage.losses).items():
            count = send_numbers([counted(self._normaliser(name), batch)], value.device, value.dtype)
            pair = torch.cat([value.detach()[None], count])
            self._held_out[loader, name] = self._held_out.get((loader, name), 0) + pair

    def _log_held_out(self, prefix: str) -> None:
        """Log mean losses over all held-out data, and of each source if there are several."""
        sums = {
            key: self.trainer.strategy.reduce(self._held_out[key], reduce_op="sum") for key in sorted(self._held_out)
        }
        self._held_out = {}
        names = sorted({name for _, name in sums})
        means = {
            name: _mean(torch.stack([pair for (_, other), pair in sums.items() if other == name]).sum(0))
            for name in names
        }
        if not means:
            return
        self.log(f"{prefix}/loss", sum(self.stage.losses[n] * v for n, v in means.items()), prog_bar=True)
        self.log_dict({f"{prefix}/loss_{name}": value for name, value in means.items()})
        sources = self.trainer.datamodule.val_sources  # type: ignore[attr-defined]
        if len(sources) > 1:
            self.log_dict({f"{prefix}/loss_{n}/{sources[i].name}": _mean(pair) for (i, n), pair in sums.items()})

    def autocast(self) -> AbstractContextManager[None]:
        """A context in the trainer's precision, for forward passes that Lightning does not wrap itself."""
        return self.trainer.precision_plugin.forward_context() if self._trainer is not None else nullcontext()

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Greedy answers to the last question of each sample."""
        answers = self.answer(batch)
        return [
            {"id": sample.id, "source": sample.source, "answer": answer}
            for sample, answer in zip(batch.samples, answers, strict=True)
        ]

    def answer(self, batch: Batch, max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0) -> list[str]:
        """Generate the text that follows each prompt.

        Args:
            batch: left-padded prompts, one per row.
            max_new_tokens: length of an answer at most, besides what the template lets it begin with.
            temperature: 0 takes the likeliest token; above, one is drawn.
            top_p: draw from the likeliest tokens of this share.

        Raises:
            ValueError: for a decoder that does not go on from a cache.
        """
        spec, most = self.input_spec, max_new_tokens + batch.opening.tokens
        with self.autocast():
            rows = generate(self.vlm, batch, spec.stop_ids | batch.stop_ids, most, temperature, top_p)
        return [decoded(spec.tokenizer, row, batch.opening.text) for row in rows[: len(batch.samples)]]


def _mean(pair: Tensor) -> Tensor:
    """The mean, from a sum and a count `[2]`."""
    return pair[0] / pair[1].clamp(min=1)
