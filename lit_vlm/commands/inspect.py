"""`lit-vlm inspect`: one batch as the model sees it, or the settings in which two recipes differ."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice

from rich.console import Console
from rich.text import Text

from lit_vlm.commands.diff import print_diff
from lit_vlm.commands.fit import lightning_cli
from lit_vlm.core.batch import IGNORE, Batch
from lit_vlm.data.feed.batching import GlobalBatch
from lit_vlm.data.feed.loader import SourceDataset, assemble
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.model.build import build_on_meta
from lit_vlm.training.module import LitVLM


def main(argv: Sequence[str]) -> None:
    """Show one batch of a stage's data, or the settings in which two recipes or runs differ.

    Raises:
        ValueError: for a wrong flag or key, a batch number that does not exist, or as `print_diff`.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.diff:
        if rest:
            parser.error(f"--diff takes --scale and --stages, not {' '.join(rest)}")
        print_diff(arguments.diff, arguments.scale, arguments.stages and arguments.stages.split(","), Console())
        return
    if arguments.scale or arguments.stages:
        parser.error("--scale and --stages belong to --diff; a batch is that of config files: --config FILE (several)")
    cli = lightning_cli([*rest, "--trainer.logger", "false"], run=False)
    module, data = cli.model, cli.datamodule
    assert isinstance(module, LitVLM)
    module.model = build_on_meta(module.slots)
    spec = module.input_spec
    data.format.check_marks(spec, "refuse")
    sources = data.val_sources if arguments.val else data.train_sources
    dataset = SourceDataset(sources, data.sample_encoder(spec))
    plan = data.plan(sources, spec, 0, GlobalBatch(data.batch_size, 1), shuffle=not arguments.val)
    places = next(islice(iter(plan), arguments.batch, None), None)
    if places is None:
        raise ValueError(f"there are {len(plan)} batches; --batch counts from 0")
    batch = assemble([dataset[place] for place in places], data.collator(spec))
    show(batch, spec, Console(highlight=False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-vlm inspect",
        description="Show one batch: text with the supervised tokens coloured, image positions, lengths, fill rate.",
        epilog="All other flags are those of lit-vlm fit: --config FILE (several), --data.batch_size 4, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--batch", type=int, default=0, help="which batch of the first epoch (default: 0)")
    parser.add_argument("--val", action="store_true", help="of the held-out data")
    parser.add_argument(
        "--diff",
        nargs=2,
        metavar=("A", "B"),
        help="show no batch, but the settings in which two of these differ: RECIPE, RECIPE:SCALE, RECIPE:SCALE:STAGE, "
        "the folder of a run, or of a stage of one",
    )
    parser.add_argument("--scale", help="with --diff: of recipes that name none (default: the recipe's)")
    parser.add_argument("--stages", help="with --diff: only these, separated by commas (default: all)")
    return parser


def show(batch: Batch, spec: InputSpec, console: Console) -> None:
    """Print a batch: the text, images and supervised tokens of each row."""
    console.print(
        Text.assemble(
            ("supervised", "bold green"), "  prompt  ", ("[image]", "cyan"), "  ", ("|", "red"), " next sample"
        )
    )
    flat = {int(position): index for index, position in enumerate(_starts(batch))}
    width = batch.input_ids.shape[1]
    for row in range(batch.input_ids.shape[0]):
        names = ", ".join(f"{sample.source}/{sample.id}" for sample in batch.samples if sample.row == row)
        used = int((batch.segment_ids[row] > 0).sum())
        console.print(f"\n[bold]row {row}[/]  {names}  {used} of {width} positions", soft_wrap=True)
        console.print(_row_text(batch, spec, row, flat), soft_wrap=True)
    counts = batch.counts
    console.print(
        f"\n{counts.samples} samples, {batch.input_ids.shape[0]} rows × {width} positions, "
        f"fill {counts.tokens / counts.positions:.1%}; "
        f"{counts.supervised} supervised tokens ({counts.supervised / max(1, counts.tokens):.1%}); "
        f"{counts.images} images with {counts.visual_tokens} tokens",
        soft_wrap=True,
    )
    for bad in batch.bad:
        console.print(
            f"[red]{'left out' if bad.dropped else 'cut'}[/] {bad.source}/{bad.id}: {bad.reason}: {bad.detail}",
            soft_wrap=True,
        )


def _starts(batch: Batch) -> list[int]:
    """First position of each image, as an index into rows · positions."""
    starts, offset = [], 0
    for grid in batch.image_grids:
        starts.append(int(batch.image_positions[offset]))
        offset += grid.num_tokens
    return starts


def _row_text(batch: Batch, spec: InputSpec, row: int, images: dict[int, int]) -> Text:
    width = batch.input_ids.shape[1]
    text, position, segment = Text(), 0, 1
    run: list[int] = []
    supervised = False

    def flush() -> None:
        if run:
            text.append(spec.tokenizer.decode(run), style="bold green" if supervised else "")
            run.clear()

    while position < width and batch.segment_ids[row, position] > 0:
        if batch.segment_ids[row, position] != segment:
            flush()
            text.append(" | ", style="red")
            segment += 1
        image = images.get(row * width + position)
        if image is not None:
            flush()
            grid = batch.image_grids[image]
            height, side = batch.images.sizes[image]
            text.append(f"[{side}×{height} px → {grid.rows}×{grid.cols} = {grid.num_tokens}]", style="cyan")
            position += grid.num_tokens
            continue
        marked = bool(batch.labels[row, position] != IGNORE)
        if marked != supervised:
            flush()
            supervised = marked
        run.append(int(batch.input_ids[row, position]))
        position += 1
    flush()
    return text
