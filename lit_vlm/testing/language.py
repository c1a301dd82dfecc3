"""Contract tests of embedders and decoders, each in a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_vlm.core.batch import Batch
from lit_vlm.data.sample.collate import collate, collate_prompts, make_rows
from lit_vlm.decoders import Decoder, DecoderOutput, check_images, check_order
from lit_vlm.embedders import Embedder
from lit_vlm.model.build import build
from lit_vlm.model.vlm import NEXT_TOKEN, VLM
from lit_vlm.testing.rules import blocks_run_once, broken, built, near, pickled, same_when_loaded
from lit_vlm.testing.tiny import Size, samples_for, tiny_slots


def check_embedder(
    factory: Callable[[int, int], Embedder],
    slots: Mapping[str, Any] | None = None,
    sizes: Sequence[Size] = ((28, 28), (28, 28)),
) -> None:
    """Check the rules of an embedder, in a tiny model.

    Args:
        factory: makes the embedder from the decoder's width and vocabulary size.
        slots: factories of other parts that the embedder needs (`tiny_slots`).
        sizes: (height, width) in pixels of pictures that the encoder takes.

    Raises:
        AssertionError: naming the rule that the embedder breaks.
    """
    model = build(tiny_slots(**dict(slots or {}), embedder=factory)).eval()
    embedder, decoder = model.embedder, model.decoder
    built(lambda: factory(decoder.width, decoder.vocab_size), Embedder)
    pickled(embedder, "grid_map", embedder.grid_map)
    pickled(embedder, "tile_map", embedder.tile_map)
    seen, text = samples_for(model, sizes)
    batch = collate([*seen, *text])
    shape = (*batch.input_ids.shape, decoder.width)
    with torch.no_grad():
        for what, found in (("forward", model.embed(batch)), ("words", embedder.words(batch.input_ids, decoder))):
            if tuple(found.shape) != shape:
                broken(embedder, f"{what} gives {tuple(found.shape)} instead of {shape}", "Vectors are `[b, s, d]`")
    same_when_loaded(
        embedder,
        lambda: factory(decoder.width, decoder.vocab_size),
        lambda part: part(batch, model.see(batch), decoder),
    )
    _check_rows(model, embedder, sizes)
    _check_text(model, embedder, collate(text))
    _check_decoding(model, embedder, sizes)
    blocks_run_once(embedder, lambda: model.embed(batch), "embedder")


def check_decoder(factory: Callable[[], Decoder], sizes: Sequence[Size] = ((28, 28), (28, 28))) -> None:
    """Check the rules of a decoder, in a tiny model.

    Args:
        factory: makes a tiny decoder with random weights.
        sizes: (height, width) in pixels of the pictures that the model gets.

    Raises:
        AssertionError: naming the rule that the decoder breaks.
    """
    decoder = built(factory, Decoder)
    model = build(tiny_slots(decoder=factory)).eval()
    seen, text = samples_for(model, sizes)
    batch = collate([*seen, *text])
    layers = tuple(range(decoder.num_layers + 1))
    with torch.no_grad():
        embeds = model.embed(batch)

    def decoded(part: Decoder, taps: Sequence[int] = ()) -> DecoderOutput:
        return part(embeds, batch.position_ids, taps, visual=batch.image_positions, grids=batch.image_grids)

    with torch.no_grad():
        output = model.decoder(
            embeds, batch.position_ids, layers, visual=batch.image_positions, grids=batch.image_grids
        )
        logits = model.decoder.logits(output.hidden)
    if set(output.taps) != set(layers):
        broken(decoder, f"gives the layers {sorted(output.taps)} of {list(layers)}", "taps are what was asked for")
    near(decoder, output.taps[0], embeds, "layer 0 is not its input", "Layer 0 are the input vectors")
    near(decoder, output.taps[layers[-1]], output.hidden, "its last layer is not `hidden`",
         "The last number are the states after the final norm")  # fmt: skip
    if logits.shape[-1] != decoder.vocab_size or decoder.embed(batch.input_ids).shape[-1] != decoder.width:
        broken(decoder, "width or vocab_size is not that of its tables", "`[..., d]` → `[..., vocab_size]`")
    for packed in (False, True):
        try:
            check_order(decoder, packed, torch.device("cpu"))
            check_images(decoder, packed, torch.device("cpu"))
        except ValueError as error:
            raise AssertionError(str(error)) from error
    same_when_loaded(
        model.decoder,
        factory,
        lambda part: part(embeds, batch.position_ids, visual=batch.image_positions, grids=batch.image_grids).hidden,
    )
    _check_rows(model, decoder, sizes)
    _check_decoding(model, decoder, sizes)
    own = {id(parameter) for parameter in decoder.parameters()}
    if not all(id(parameter) in own for parameter in decoder.head_parameters()):
        broken(decoder, "head_parameters() has others than its own", "They are what `logits` uses")
    blocks_run_once(
        model.decoder,
        lambda: model.decoder(embeds, batch.position_ids, visual=batch.image_positions, grids=batch.image_grids),
        "decoder",
    )


def _check_rows(model: VLM, part: Embedder | Decoder, sizes: Sequence[Size]) -> None:
    """Check that samples give the same logits in rows of their own and packed into one row."""
    seen, text = samples_for(model, sizes)
    samples = [*seen, *text]
    losses = {NEXT_TOKEN: 1.0}
    with torch.no_grad():
        apart, together = model(collate(samples), losses), model(make_rows([samples]), losses)
    near(part, together[NEXT_TOKEN], apart[NEXT_TOKEN], "samples see each other in a packed row",
         "Where position_ids restart, nothing crosses")  # fmt: skip


def _check_text(model: VLM, part: Embedder, text: Batch) -> None:
    """Check that a batch without images still runs the projector, so that its parameters get a gradient."""
    model.zero_grad()
    model(text, {NEXT_TOKEN: 1.0})[NEXT_TOKEN].backward()
    for name, parameter in model.projector.named_parameters():
        if parameter.grad is None or parameter.grad.any():
            broken(part, f"without images the projector's {name} has no gradient of zero",
                   "The dummy's tokens are added with weight zero: see embedders.base.scatter_visual")  # fmt: skip


@torch.no_grad()
def _check_decoding(model: VLM, part: Embedder | Decoder, sizes: Sequence[Size]) -> None:
    """Check that decoding from a cache gives the logits of the whole text, also with padding on the left."""
    seen, _ = samples_for(model, sizes)
    prompts = collate_prompts(seen)
    mask = (prompts.segment_ids > 0).long()
    cache = model.new_cache()
    model.next_logits(prompts, cache, mask, start=True)
    ids = torch.full((len(mask), 1), 65)
    step = prompts.text_only(ids, prompts.position_ids[:, -1:] + 1)
    found = model.next_logits(step, cache, torch.cat([mask, mask.new_ones(len(mask), 1)], 1), start=False)
    for row, sample in enumerate(seen):
        sample.ids, sample.labels = [*sample.ids, 65], [*sample.labels, 65]
        near(part, found[row], _last(model, collate([sample])), "a token from a cache is not that of the whole text",
             "new_cache, select_cache and forward with a cache go on where they left off")  # fmt: skip


def _last(model: VLM, batch: Batch) -> Tensor:
    return model.logits(batch)[0, batch.num_tokens - 1]
