"""HoVLE's holistic embedding: causal layers that image and text pass together, in front of the decoder."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from lit_vlm.core.batch import Batch, Grid, VisualTokens
from lit_vlm.core.flops import Flops, FlopsOf, Weights, attention, causal_pairs, pairs_ahead
from lit_vlm.decoders.architecture import installed_attention
from lit_vlm.decoders.base import Decoder
from lit_vlm.decoders.hf import Attention, HFDecoder
from lit_vlm.decoders.images import BIDIRECTIONAL, MASKED, ImageAttention, masks_of_layers, see_whole_images
from lit_vlm.decoders.stack import Recompute, run_blocks, set_recompute
from lit_vlm.embedders.base import Embedder, check_grids, scatter_visual
from lit_vlm.embedders.own_sequence import OwnSequence, own_lengths, refine
from lit_vlm.projectors.downsample import Fold, PatchMerge

LAYERS = "layers"


@dataclass
class HolisticCache:
    """What the layers remember while decoding.

    Attributes:
        past: keys and values of the positions so far.
        mask: `[b, past]`, 0 for padding, in the layers' own sequence.
        ahead: `[b, 1]`, how many more positions the layers' own sequence has than the decoder's.
    """

    past: DynamicCache
    mask: Tensor | None = None
    ahead: Tensor | None = None


@dataclass(frozen=True)
class WholeFold(Fold):
    """A fold of grids without partial squares only: the layers count on the same number of patches in each token."""

    def __call__(self, grid: Grid) -> Grid:
        """The folded grid.

        Raises:
            ValueError: for a grid whose rows or columns `side` does not divide; and as `Fold`.
        """
        if grid.rows % self.side or grid.cols % self.side:
            raise ValueError(
                f"model.embedder: merge {self.side} needs images of even patch grids, not {grid.rows} × {grid.cols}: "
                "take a projector that leaves patches where they are (Identity, Linear or MLP), and an image_size of "
                "the encoder of an even number of patches; or set model.embedder.init_args.merge to 1"
            )
        return super().__call__(grid)


class Holistic(Embedder):
    """A word table and N causal Llama layers over image and text; no norm behind them (HoVLE, section 3).

    The layers' output takes the place of the decoder's word vectors, so the decoder's own word table is never read.

    With `merge` 2 (HoVLE-HD) the layers see every patch, and the projector gives patches too; behind the layers each
    2 × 2 patches become one token of the decoder. Otherwise patches are merged before, by `projectors.PatchMerge`.

    A stage can leave the word table as it is: `only: {embedder: layers}`.

    Args:
        width: width of the decoder.
        vocab_size: rows of the word table.
        num_layers: number of layers, N.
        num_heads: query heads; they must divide `width`.
        num_kv_heads: key-value heads; they must divide `num_heads`.
        ffn_width: inner width of the SwiGLU.
        rope_theta: base of the rotary frequencies.
        rope_scaling: as transformers takes it, such as `{rope_type: dynamic, factor: 2.0}`.
        max_positions: the longest sequence that the rotary frequencies are meant for.
        norm_eps: epsilon of the RMSNorms.
        merge: patches per side that become one token behind the layers: 1 or 2.
        start: weights of the layers: `decoder` copies the decoder's first N, `random` draws new ones. The word table
            is always a copy of the decoder's.
        image_attention: `causal` as published, or `bidirectional` within each image.
        recompute: recompute layers in the backward pass: less memory, a third more compute. `offload` keeps the inputs
            of the layers on the host meanwhile: less memory still, and a copy each way.
        attention: implementation of attention; all of them keep the segments of a packed row apart.

    Raises:
        ValueError: for heads that do not divide, `bidirectional` without sdpa or eager attention, or an attention whose
            package is not installed.
    """

    def __init__(
        self,
        width: int,
        vocab_size: int,
        num_layers: int = 8,
        num_heads: int = 16,
        num_kv_heads: int = 8,
        ffn_width: int = 8192,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        max_positions: int = 4096,
        norm_eps: float = 1e-5,
        merge: Literal[1, 2] = 1,
        start: Literal["decoder", "random"] = "decoder",
        image_attention: ImageAttention = "causal",
        recompute: Recompute = False,
        attention: Attention = "sdpa",
    ) -> None:
        super().__init__(width, vocab_size)
        if width % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                f"model.embedder.init_args: num_heads {num_heads} must divide the decoder's width {width}, and "
                f"num_kv_heads {num_kv_heads} must divide num_heads"
            )
        if image_attention == BIDIRECTIONAL and attention not in MASKED:
            raise ValueError(f"embedder: image_attention bidirectional needs attention sdpa or eager, not {attention}")
        self.start, self.image_attention, self.merge, self.attention = start, image_attention, merge, attention
        self.config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            intermediate_size=ffn_width,
            rope_parameters={"rope_type": "default"} | (rope_scaling or {}) | {"rope_theta": rope_theta},
            max_position_embeddings=max_positions,
            rms_norm_eps=norm_eps,
            attn_implementation=attention,
        )
        with installed_attention("model.embedder", attention):
            self.stack = LlamaModel(self.config)
        self.stack.norm = nn.Identity()
        self.recompute = recompute
        set_recompute(self.stack, recompute)
        self.merger = PatchMerge(width, width) if merge > 1 else None
        self.adopts_all = start == "decoder" and self.merger is None
        if merge > 1:
            self.grid_map = WholeFold(merge)

    def standalone(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments without `recompute`, which is for whoever trains to choose."""
        return {key: value for key, value in arguments.items() if key != "recompute"}

    def blocks(self) -> list[nn.Module]:
        """The causal layers."""
        return list(self.stack.layers)

    def trainable_parameters(self, only: str | None = None) -> Iterable[nn.Parameter]:
        """All parameters, or with `only: layers` all but the word table.

        Raises:
            ValueError: for another group.
        """
        if only != LAYERS:
            return super().trainable_parameters(only)
        return [p for name, p in self.named_parameters() if not name.startswith("stack.embed_tokens.")]

    def adopt(self, decoder: Decoder) -> None:
        """Copy the decoder's word table, and with `start: decoder` its first layers.

        Raises:
            ValueError: when the decoder is no `HFDecoder`, its word table has another shape, or its layers are of
                another kind, have other shapes, or are fewer.
        """
        if not isinstance(decoder, HFDecoder):
            raise ValueError(f"embedder Holistic starts from an HFDecoder, not from {type(decoder).__name__}")
        words, own_words = decoder.lm.get_input_embeddings().weight, self.stack.embed_tokens.weight
        if words.shape != own_words.shape:
            raise ValueError(
                f"embedder Holistic copies the decoder's word table, and that of a '{decoder.config.model_type}' is "
                f"{tuple(words.shape)}, not {tuple(own_words.shape)}: take another decoder"
            )
        with torch.no_grad():
            own_words.copy_(words)
        if self.start == "random":
            return
        own = self.stack.layers.state_dict()
        theirs = nn.ModuleList(decoder.blocks()).state_dict()
        extra = sorted(key for key in theirs if key.startswith("0.") and key not in own)
        if extra or getattr(decoder.config, "hidden_act", "silu") != "silu":
            kind = decoder.config.model_type if type(decoder) is HFDecoder else type(decoder).__name__
            raise ValueError(
                f"embedder.start is decoder, but the layers of a '{kind}' are not Llama's "
                f"({extra[0] if extra else decoder.config.hidden_act}): take another decoder, or set "
                "model.embedder.init_args.start to random"
            )
        if wrong := [key for key, value in own.items() if key not in theirs or theirs[key].shape != value.shape]:
            found = tuple(theirs[wrong[0]].shape) if wrong[0] in theirs else "nothing"
            raise ValueError(
                f"embedder.start is decoder, but {wrong[0]} is {tuple(own[wrong[0]].shape)} here and {found} in the "
                "decoder: set num_layers, num_heads, num_kv_heads and ffn_width to the decoder's, or start to random "
                "(model.embedder.init_args)"
            )
        self.stack.layers.load_state_dict({key: theirs[key] for key in own})

    def replaced(self, decoder: Decoder) -> Iterable[nn.Parameter]:
        """The decoder's word table, unless its head shares it."""
        if not isinstance(decoder, HFDecoder):
            return ()
        head = {id(parameter) for parameter in decoder.head_parameters()}
        return [p for p in decoder.lm.get_input_embeddings().parameters() if id(p) not in head]

    def words(self, input_ids: Tensor, decoder: Decoder) -> Tensor:
        """Vectors of the embedder's own word table: `[b, s]` → `[b, s, d]`."""
        return self.stack.embed_tokens(input_ids)

    def forward(
        self,
        batch: Batch,
        visual: VisualTokens | None,
        decoder: Decoder,
        cache: HolisticCache | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Input vectors `[b, s, d]`; arguments and errors as in `Embedder.forward`."""
        if visual is not None:
            check_grids(batch, visual, self.grid_map)
        if self.merge > 1 and batch.image_grids:
            own = refine(batch, self.merge**2, right=cache is not None)
        else:
            own = OwnSequence.same(batch)
        embeds = self.words(own.input_ids, decoder)
        if visual is not None:
            embeds = scatter_visual(embeds, own.image_positions, visual)
        hidden = self._layers(embeds, own, None if visual is None else visual.grids, cache, attention_mask)
        if self.merger is None or visual is None:
            return hidden
        patches = hidden.flatten(0, 1)[own.image_positions] if batch.image_grids else visual.features
        merged = self.merger(VisualTokens(patches.to(hidden.dtype), visual.grids))
        if own.places is not None:
            hidden = hidden.gather(1, own.places[..., None].expand(-1, -1, self.width))
        return scatter_visual(hidden, batch.image_positions, merged)

    def _layers(
        self,
        embeds: Tensor,
        own: OwnSequence,
        grids: tuple[Grid, ...] | None,
        cache: HolisticCache | None,
        attention_mask: Tensor | None,
    ) -> Tensor:
        positions, mask = own.position_ids, None
        if cache is not None:
            assert attention_mask is not None
            new = own.mask(attention_mask)
            mask = new if cache.mask is None else torch.cat([cache.mask, new], dim=1)
            positions = positions if cache.ahead is None else positions + cache.ahead
            cache.mask, cache.ahead = mask, own.ahead if cache.ahead is None else cache.ahead
        if self.image_attention == BIDIRECTIONAL and grids is not None and len(own.image_positions):
            seen = see_whole_images(own.position_ids, own.image_positions, grids, mask)
            added_to = embeds.dtype if self.attention == "eager" else None
            masks: Tensor | dict[str, Tensor] | None = masks_of_layers(seen, positions, self.config, added_to)
        else:
            masks = mask
        past = None if cache is None else cache.past
        segments = own.segments if cache is None else None
        return run_blocks(self.stack, self.attention, embeds, positions, past, masks, segments)

    def flops(self) -> FlopsOf:
        """Operations of the layers over their own sequence, and of the merger."""
        layers, merger = Weights.of(self.stack.layers.parameters()), Weights()
        if self.merger is not None:
            merger = Weights.of(self.merger.parameters())

        def of(batch: Batch) -> Flops:
            lengths = own_lengths(batch, self.merge**2)
            pairs = causal_pairs(lengths)
            if self.image_attention == BIDIRECTIONAL:
                pairs += pairs_ahead(grid.picture_tokens * self.merge**2 for grid in batch.image_grids)
            scores = attention(self.width, len(self.stack.layers) * pairs)
            return layers.on(sum(lengths)) + scores + merger.on(len(batch.image_positions))

        return of

    def new_cache(self) -> HolisticCache:
        """An empty cache of the layers."""
        return HolisticCache(DynamicCache(config=self.config))

    def select_cache(self, cache: HolisticCache, rows: Tensor) -> HolisticCache:
        """A new cache that holds the rows `rows` `[b']` of another, which stays as it is."""
        past = copy.deepcopy(cache.past)
        past.reorder_cache(rows)
        mask, ahead = (None if value is None else value[rows] for value in (cache.mask, cache.ahead))
        return HolisticCache(past, mask, ahead)
