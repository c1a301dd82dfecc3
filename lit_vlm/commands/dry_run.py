"""`lit-vlm run --dry-run`: a stage is ready when a batch of its data has run forward and backward through its model.

Nothing is trained and no weight is read: parts are built at their full size without values, a few records of each
source go through template and transform, and a batch takes a step without arithmetic (`model.rehearsal`).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from callbacks import HeldOut, Predictions
from lit_vlm.checkpoints.weights import by_slot, find_start, read_shapes
from lit_vlm.commands.fit import lightning_cli, quietly
from lit_vlm.core.part import Part, StateDict
from lit_vlm.data import VLMData
from lit_vlm.data.feed.usable import check_sources, try_records
from lit_vlm.data.sample.encode import Sample
from lit_vlm.data.sources import Source
from lit_vlm.decoders import check_images, check_order
from lit_vlm.evaluation.held_out_records import NONE_HELD_OUT
from lit_vlm.heads import Head
from lit_vlm.model.build import build_on_meta, check_saved
from lit_vlm.model.rehearsal import rehearse
from lit_vlm.model.vlm import VLM
from lit_vlm.training.module import LitVLM
from lit_vlm.training.stage import Stage

SlotStates = Mapping[str, StateDict]
NAMED = 4
"""Number of sources, at most, that one line names."""
SMALL = 20_000_000
"""Parameters of a decoder that is built with random weights, to be asked what its tokens see."""
LARGEST = 4
"""Number of samples, at most, in the batch that takes the step."""


@dataclass(frozen=True)
class Checked:
    """What checking a stage has found.

    Attributes:
        ready: whether it could start.
        leaves: weights that it leaves, without values; None where its model cannot be built.
    """

    ready: bool
    leaves: SlotStates | None


def check_recipe(
    commands: Mapping[str, Sequence[str]], console: Console, known: dict[str, Checked] | None = None
) -> bool:
    """Check the stages of a recipe, and print what was checked and what is wrong.

    Args:
        commands: arguments of `lit-vlm` by stage.
        console: where findings are printed.
        known: what was found of stages that other recipes have as well; those found here are added.

    Returns:
        whether every stage could start.
    """
    known = {} if known is None else known
    left: dict[str, SlotStates] = {}
    for stage, words in commands.items():
        if (found := known.get(stage)) is not None:
            said = "[green]ready[/]" if found.ready else "[red]missing or wrong[/]"
            console.print(f"[bold]{stage}[/]  {said}, as above", soft_wrap=True, highlight=False)
            if found.leaves is not None:
                left[stage] = found.leaves
            continue
        console.print(f"[bold]{stage}[/]  lit-vlm {escape(shlex.join(words))}", soft_wrap=True, highlight=False)
        check = _StageCheck(words, left, [name for name in commands if name not in left])
        try:
            with quietly():
                check.run()
        except (ValueError, OSError, ImportError) as error:
            ready = False
            console.print(f"  [red]missing or wrong[/]: {escape(str(error))}", soft_wrap=True, highlight=False)
        else:
            ready = True
            console.print(f"  [green]ready[/]: {escape('; '.join(check.done))}", soft_wrap=True, highlight=False)
        for note in check.notes:
            console.print(f"  [yellow]{escape(note)}[/]", soft_wrap=True, highlight=False)
        if check.leaves is not None:
            left[stage] = check.leaves
        known[stage] = Checked(ready, check.leaves)
    return all(known[stage].ready for stage in commands)


class _StageCheck:
    """The checks of one stage; each builds on the ones before.

    Args:
        words: arguments of the stage's command.
        left: weights that earlier stages leave, by stage, without values.
        broken: stages whose model could not be built, and those that come later.

    Attributes:
        done: checks that have passed.
        notes: remarks on settings that do not stop the stage.
        leaves: weights that this stage leaves, without values; None where its model cannot be built.
    """

    def __init__(self, words: Sequence[str], left: Mapping[str, SlotStates], broken: Sequence[str]) -> None:
        self.words, self.left, self.broken = words, left, broken
        self.done: list[str] = []
        self.notes: list[str] = []
        self.leaves: SlotStates | None = None

    def run(self) -> None:
        """Run all checks.

        Raises:
            ValueError: for the first thing that is missing or wrong, naming the slot or key and the fix.
        """
        cli: Any = lightning_cli([*self.words[1:], "--trainer.logger", "false"], run=False)
        module, data = cli.model, cli.datamodule
        assert isinstance(module, LitVLM)
        assert isinstance(data, VLMData)
        self.done.append("config parses")
        model = self._build(module)
        self._start(module, model)
        self._pretrained(module.stage, model, data)
        device = cli.trainer.strategy.root_device
        self._order(module, data, model, device)
        samples = self._data(module, data)
        for callback in cli.trainer.callbacks:
            if isinstance(callback, HeldOut | Predictions) and not data.val_sources:
                raise ValueError(
                    f"callbacks.{type(callback).__name__} wants questions of data.val, and {NONE_HELD_OUT}"
                )
        self._step(module, data, model, samples, device)

    def _build(self, module: LitVLM) -> VLM:
        """Build the model without weights and freeze it as the stage says; keep its shapes in `leaves`."""
        model = build_on_meta(module.slots)
        states = by_slot(model.state_dict())
        self.leaves = {slot: state for slot, state in states.items() if slot not in module.stage.leave_out}
        module.stage.freeze(model, module.slots.removed_heads)
        module.stage.make_optimizer(model)
        module.model = model
        count = sum(parameter.numel() for parameter in model.parameters())
        self.done.append(f"parts build ({count:,} parameters)")
        return model

    def _order(self, module: LitVLM, data: VLMData, model: VLM, device: torch.device) -> None:
        """Check what tokens of a small decoder see, as training does before its first step.

        A large decoder is not built; a remark says what remains unchecked.
        """
        if module.stage.leave_out:
            return
        count = sum(parameter.numel() for parameter in model.decoder.parameters())
        if count <= SMALL:
            decoder = module.slots.decoder().to(device)
            for packed in (False, True) if data.batching.packs else (False,):
                check_order(decoder, packed, device)
                check_images(decoder, packed, device)
            self.done.append("the decoder keeps samples apart" if data.batching.packs else "the decoder is causal")
        elif data.batching.packs and (carried := model.decoder.carried()) is not None:
            self.notes.append(
                f"the decoder has {carried}: whether they keep the samples of a packed row apart is asked when "
                "training starts"
            )

    def _start(self, module: LitVLM, model: VLM) -> None:
        """Check that the weights of `start_from` exist and fit, or that an earlier stage of this run leaves them."""
        if not (start := module.stage.start_from):
            return
        saved: SlotStates | None
        earlier = Path(start).name if not Path(start).exists() else ""
        if earlier in self.broken:
            raise ValueError(f"it starts from {earlier}, whose model cannot be built: mend that stage first")
        if earlier in self.left:
            saved, origin = self.left[earlier], f"what {earlier} will leave"
        else:
            find_start(start)
            saved, origin = read_shapes(start), start
        if saved is not None:
            check_saved(model, module.slots, saved, module.stage.fresh, origin)
        self.done.append(f"weights of {start} {'fit' if saved is not None else 'are there'}")

    def _pretrained(self, stage: Stage, model: VLM, data: VLMData) -> None:
        """Check that files of pretrained weights exist, those of teachers too whose features are not prepared."""
        parts: dict[str, Part] = {slot: parts[0] for slot, parts in model.slots().items() if slot != "heads"}
        for slot, part in parts.items():
            if not stage.start_from or slot in stage.fresh:
                _name(f"model.{slot}", part.find_pretrained)
        asked = {name for name in model.heads if stage.losses.get(name) and name not in data.prepared}
        for name, head in model.heads.items():
            if name in asked and isinstance(head, Head) and head.teacher is not None:
                _name(f"model.heads.{name}.teacher", head.teacher.find_pretrained)
        self.done.append("pretrained weights are there")

    def _data(self, module: LitVLM, data: VLMData) -> list[Sample]:
        """Check that records of each source can be encoded; returns a few samples."""
        spec = module.input_spec
        data.format.check_marks(spec, "refuse")
        samples: list[Sample] = []
        for key, sources in (("train", data.train_sources), ("val", data.val_sources)):
            encode = data.train_sample_encoder(spec) if key == "train" else data.sample_encoder(spec)
            check_sources(sources, spec.known, f"data.{key}")
            for source in sources:
                tried = try_records(source, encode, f"data.{key}")
                samples += tried.samples if key == "train" else []
                if tried.problems:
                    reasons = ", ".join(sorted({error.reason for error, _ in tried.problems}))
                    share = f"{len(tried.problems)} of {tried.tried} records"
                    self.notes.append(f"{share} of '{source.name}' in data.{key} cannot be used: {reasons}")
        if not samples:
            raise ValueError("data.train names no source, so there is nothing to train on")
        held_out = f", held out: {_listed(data.val_sources)}" if data.val_sources else ""
        self.done.append(
            f"records of data.train ({_listed(data.train_sources)}{held_out}) go through template and transform"
        )
        return samples

    def _step(self, module: LitVLM, data: VLMData, model: VLM, samples: Sequence[Sample], device: torch.device) -> None:
        """Run one batch forward and backward, and one without pictures if there are samples with and without."""
        spec = module.input_spec
        shown = sorted(samples, key=lambda sample: not sample.grids)[:LARGEST]
        shown += [sample for sample in samples if not sample.grids][:1] if all(s.grids for s in shown) else []
        names = (*(data.prepared if shown[0].features else ()), *spec.known)
        rows = [[[sample] for sample in shown]]
        text = [sample for sample in shown if not sample.grids]
        if text and shown[0].grids:  # the batch of a process that has no picture
            rows.append([text])
        model.train()
        try:
            for row in rows:
                rehearse(model, data.collator(spec, prepared=names)(row, []), module.stage.losses)
        except NotImplementedError as error:  # a kernel that this CPU lacks
            if device.type == "cpu":
                raise ValueError(f"the step does not run on the CPU, which would train here: {error}") from error
            self.notes.append(f"the step was not rehearsed, as it is on a CPU, and this does not run there: {error}")
            return
        pictures = sum(len(sample.grids) for sample in shown)
        self.done.append(
            f"a batch of {_count(len(shown), 'sample')} with {_count(pictures, 'picture')} ran forward and backward"
        )


def _listed(sources: Sequence[Source]) -> str:
    """Names and numbers of records, as far as they fit into a line."""
    shown = [f"{source.name} {len(source):,}" for source in sources[:NAMED]]
    return ", ".join([*shown, *([f"and {len(sources) - NAMED} more"] if len(sources) > NAMED else [])])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _name(key: str, look: Any) -> None:
    """Call `look`, which looks for weights; an error of it is raised with the key in front."""
    try:
        look()
    except (ValueError, OSError) as error:
        raise ValueError(f"{key}: {error}") from error
