"""The model: five slots and one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_vlm.core.batch import ENCODER, Batch, VisualTokens
from lit_vlm.core.losses import chunk_rows, next_token_loss, token_nll
from lit_vlm.core.part import Part
from lit_vlm.decoders import Decoder, DecoderOutput, check_cache, check_images, check_order
from lit_vlm.decoders.images import CAUSAL
from lit_vlm.embedders import Embedder
from lit_vlm.encoders import Encoder
from lit_vlm.heads import WORDS, Head, Tap
from lit_vlm.projectors import Projector
from lit_vlm.projectors.base import GridMap, InTurn

NEXT_TOKEN = "next_token"


class DecodingCache(NamedTuple):
    """The caches of embedder and decoder: what each remembers of the positions so far."""

    embedder: Any
    decoder: Any


class VLM(nn.Module):
    """A vision-language model.

        images ─▶ encoder ─▶ projector ─┐
                                        ├─▶ embedder ─▶ decoder ─▶ next-token loss
        text ids ───────────────────────┘        │          │
                                                 └── taps ──┴──▶ heads ◀── teachers

    Args:
        encoder: pixels → visual tokens.
        projector: encoder width → decoder width.
        embedder: text ids and visual tokens → decoder inputs.
        decoder: the language model.
        heads: auxiliary losses by name.

    Attributes:
        origins: part → whether its weights came from a stage before (True) or are its own pretrained ones (False);
            parts that were drawn at random are not in it.
        drawn: parts whose weights were drawn at random when the model was built: `projector`, `heads.NAME`, ....

    Raises:
        ValueError: naming the head, where it reads task tokens that the embedder does not have; and as
            `Embedder.connect`.
    """

    def __init__(
        self,
        encoder: Encoder,
        projector: Projector,
        embedder: Embedder,
        decoder: Decoder,
        heads: Mapping[str, Head] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.embedder = embedder
        self.decoder = decoder
        self.heads = nn.ModuleDict(dict(heads or {}))
        self.drawn: frozenset[str] = frozenset()
        self.origins: dict[str, bool] = {}
        self._cache_checked = False
        embedder.connect(decoder)
        for name, head in (heads or {}).items():
            try:
                head.connect(embedder)
            except ValueError as error:
                raise ValueError(f"heads.{name}: {error}") from error

    @property
    def grid_map(self) -> GridMap:
        """Layout of an image's tokens after the encoder → layout in the decoder's sequence; the map pickles."""
        return InTurn(self.projector.grid_map, self.embedder.grid_map)

    def slots(self) -> dict[str, list[Part]]:
        """The parts of each slot, by the names that a stage uses."""
        parts: dict[str, list[Part]] = {
            "encoder": [self.encoder],
            "projector": [self.projector],
            "embedder": [self.embedder],
            "decoder": [self.decoder],
        }
        heads = [head for head in self.heads.values() if isinstance(head, Part)]
        return parts | ({"heads": heads} if heads else {})

    def train(self, mode: bool = True) -> VLM:
        """Set train mode for parts that train; frozen parts stay in eval mode, without dropout or batch statistics."""
        self.training = mode
        for parts in self.slots().values():
            for part in parts:
                part.train(mode and not part.frozen())
        self.decoder.recompute_blocks(mode)
        return self

    def forward(self, batch: Batch, losses: Mapping[str, float]) -> dict[str, Tensor]:
        """The sum of each loss over this micro-batch.

        Args:
            batch: what the collator made.
            losses: weight of each loss, `next_token` or the name of a head; one that is 0 or absent does no work.

        Returns:
            loss → fp32 scalar, unweighted, summed over what its denominator counts: supervised tokens for `next_token`,
            the head's `normaliser` for a head.

        Raises:
            ValueError: where visual tokens do not fit the batch, or a head's targets or taps do not fit; names the
                head.
        """
        heads = {name: head for name, head in self.heads.items() if losses.get(name) and isinstance(head, Head)}
        next_token = bool(losses.get(NEXT_TOKEN))
        states, output = self._states(batch, list(heads.values()), next_token)
        sums: dict[str, Tensor] = {}
        if next_token:
            assert output is not None
            params = [p for p in self.decoder.head_parameters() if p.requires_grad]
            hidden = output.hidden.flatten(0, 1)[batch.target_positions]
            chunk = chunk_rows(self.decoder.vocab_size)
            sums[NEXT_TOKEN] = next_token_loss(hidden, batch.targets, self.decoder.logits, params, chunk)
        for name, head in heads.items():
            try:
                sums[name] = head(states, batch, batch.prepared.get(name) or batch.teacher_images.get(name))
            except ValueError as error:  # there may be several of one class
                raise ValueError(f"model.heads.{name}: {error}") from error
        return sums

    def _states(
        self, batch: Batch, heads: Sequence[Head], decode: bool
    ) -> tuple[dict[Tap, Tensor], DecoderOutput | None]:
        """What heads read, and the decoder's output; it runs if a head reads a layer, or if `decode`."""
        wanted = {tap for head in heads for tap in head.taps}
        taps = tuple(sorted(tap for tap in wanted if isinstance(tap, int) and tap != WORDS))
        embeds = self.embed(batch)
        states: dict[Tap, Tensor] = {0: embeds}
        output = None
        if decode or any(taps):
            output = self.decoder(
                embeds,
                batch.position_ids,
                taps,
                visual=batch.image_positions,
                segments=batch.segments,
                grids=batch.image_grids,
            )
            states = dict(output.taps)
        if WORDS in wanted:
            states[WORDS] = self.embedder.words(batch.input_ids, self.decoder).detach()
        states |= {tap: self.embedder.task_parameters(tap) for tap in wanted if isinstance(tap, str)}
        return states, output

    @torch.no_grad()
    def predictions(self, batch: Batch) -> dict[str, Mapping[str, VisualTokens]]:
        """What heads take their teachers' features of a batch's images to be, by name of the head.

        Returns:
            head → where it is read → features; see `Head.predictions`. Without images, and for heads that predict
            nothing that lies on a picture, there is none.
        """
        heads = {name: head for name, head in self.heads.items() if isinstance(head, Head)}
        if not heads or not batch.image_grids:
            return {}
        states, _ = self._states(batch, list(heads.values()), False)
        found = {name: head.predictions(states, batch) for name, head in heads.items()}
        return {name: one for name, one in found.items() if one}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VLM:
        """Move or cast all tensors, but keep the dtype of tables that are computed in constructors and saved nowhere.

        Rounding such tables to bf16 changes the model: rotary frequencies shift positions, pixel means shift colours.
        """
        saved = self.state_dict(keep_vars=True).keys()
        tables = [
            (module, name, buffer)
            for prefix, module in self.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point() and f"{prefix}.{name}" not in saved
        ]
        super()._apply(fn, recurse)
        for module, name, before in tables:
            after = getattr(module, name)
            if after.dtype != before.dtype:
                setattr(module, name, before.to(after.device))
        return self

    def check_order(self, packed: bool, device: torch.device) -> None:
        """Check that no token of the decoder sees a later one or another sample; see `decoders.check_order`.

        Raises:
            ValueError: when one does.
        """
        check_order(self.decoder, packed, device)

    def check_images(self, packed: bool, device: torch.device) -> None:
        """Check that images see all of themselves in the decoder, where that is set; see `decoders.check_images`.

        Raises:
            ValueError: when one does not, or sees more.
        """
        check_images(self.decoder, packed, device)

    def check_cache(self) -> None:
        """Check that the decoder continues correctly from a cache; see `decoders.check_cache`.

        Raises:
            ValueError: when it does not.
        """
        check_cache(self.decoder, next(self.parameters()).device)

    def embed(self, batch: Batch) -> Tensor:
        """The decoder's input vectors: `[b, s, d]`.

        Raises:
            ValueError: as `see`, and where visual tokens do not fit the batch.
        """
        return self.embedder(batch, self.see(batch), self.decoder)

    def see(self, batch: Batch) -> VisualTokens:
        """Visual tokens `[t, d]` of the batch's images, or of a dummy image if it has none, to keep ranks in step.

        Raises:
            ValueError: when features were prepared for an encoder that trains.
        """
        if (prepared := batch.prepared.get(ENCODER)) is not None:
            if not self.encoder.frozen():
                raise ValueError("data.prepared.encoder: the features of an encoder that trains change; remove it")
            if not prepared.grids:
                prepared = self._dummy_features(prepared.features)
            dtype = next((p.dtype for p in self.projector.parameters()), prepared.features.dtype)
            return self.projector(prepared.to(dtype))
        images = batch.images if len(batch.images) else self.encoder.dummy_images()
        with torch.no_grad() if self.encoder.frozen() else nullcontext():
            tokens = self.encoder(images)
        return self.projector(tokens)

    def _dummy_features(self, empty: Tensor) -> VisualTokens:
        side = self.encoder.pixels.size or self.encoder.pixels.multiple
        grid = self.encoder.patch_grid(side, side)
        return VisualTokens(empty.new_zeros(grid.num_tokens, self.encoder.width), (grid,))

    def logits(self, batch: Batch) -> Tensor:
        """Logits of every position: `[b, s, v]`. Training never needs them."""
        output = self.decoder(
            self.embed(batch), batch.position_ids, visual=batch.image_positions, grids=batch.image_grids
        )
        return self.decoder.logits(output.hidden)

    def target_nll(
        self, batch: Batch, cache: DecodingCache | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Negative log-likelihood of each supervised token, in nats: fp32 `[k]`, without a graph.

        Args:
            batch: whole samples; with a cache, text that continues what the cache has seen.
            cache: from `new_cache`.
            attention_mask: `[b, past + s]`, 0 for padding; only with a cache.
        """
        with torch.no_grad():
            visual = self.see(batch) if cache is None else None
            output = self._continue(batch, visual, cache, attention_mask)
            hidden = output.hidden.flatten(0, 1)
        chunk = chunk_rows(self.decoder.vocab_size)
        return token_nll(hidden[batch.target_positions], batch.targets, self.decoder.logits, chunk)

    def next_logits(self, batch: Batch, cache: DecodingCache, attention_mask: Tensor, start: bool) -> Tensor:
        """Logits after the last position of each row: `[b, v]`; the batch's positions are added to `cache`.

        Args:
            batch: left-padded prompts, or the tokens that continue them.
            cache: from `new_cache`.
            attention_mask: `[b, past + s]`, 0 for padding.
            start: whether the batch is the prompts, whose images run through the encoder.
        """
        visual = self.see(batch) if start else None
        output = self._continue(batch, visual, cache, attention_mask)
        return self.decoder.logits(output.hidden[:, -1])

    def new_cache(self) -> DecodingCache:
        """An empty cache for decoding.

        Raises:
            ValueError: for a decoder that does not continue correctly from a cache; the first call checks one with
                recurrent layers, or whose images see all of themselves.
        """
        if not self._cache_checked:
            if self.decoder.carried() is not None or self.decoder.image_attention != CAUSAL:
                self.check_cache()
            self._cache_checked = True
        return DecodingCache(self.embedder.new_cache(), self.decoder.new_cache())

    def select_cache(self, cache: DecodingCache, rows: Tensor) -> DecodingCache:
        """A new cache of the rows `rows` `[b']` of another, which stays as it is; a row may be taken repeatedly."""
        return DecodingCache(
            self.embedder.select_cache(cache.embedder, rows), self.decoder.select_cache(cache.decoder, rows)
        )

    def _continue(
        self, batch: Batch, visual: VisualTokens | None, cache: DecodingCache | None, attention_mask: Tensor | None
    ) -> DecoderOutput:
        own, of_decoder = (cache.embedder, cache.decoder) if cache is not None else (None, None)
        embeds = self.embedder(batch, visual, self.decoder, own, attention_mask)
        return self.decoder(
            embeds,
            batch.position_ids,
            cache=of_decoder,
            attention_mask=attention_mask,
            visual=batch.image_positions,
            grids=batch.image_grids,
        )
