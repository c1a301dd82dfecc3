"""The backbone of an exported model: all of it but the output layer, as transformers loads it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from lit_vlm.core.part import meta_parameters
from lit_vlm.core.quantised import quantise_parts
from lit_vlm.decoders import DecoderOutput, HFDecoder
from lit_vlm.embedders import Holistic
from lit_vlm.hf.cache import LitVLMCache
from lit_vlm.hf.config import STUB, LitVLMConfig, factories
from lit_vlm.hf.rows import check_positions, make_batch, moved_rows
from lit_vlm.model.vlm import VLM


class LitVLMPreTrainedModel(PreTrainedModel):
    """What both classes of an exported model answer transformers."""

    config_class = LitVLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    @property
    def inner(self) -> VLM:
        """The model as the kit has it."""
        raise NotImplementedError

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Weight → the weight that it shares, of the transformers models inside the parts."""
        return {
            f"{prefix}.{name}": f"{prefix}.{other}"
            for prefix, module in self.named_modules()
            if isinstance(module, PreTrainedModel) and module is not self
            for name, other in module.get_expanded_tied_weights_keys().items()
        }

    def named_non_persistent_buffers(
        self, recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield buffers that are not saved and have no values; loading makes new ones of those, also without values."""
        found = super().named_non_persistent_buffers(recurse, remove_duplicate)
        yield from ((name, buffer) for name, buffer in found if buffer.is_meta)

    def get_input_embeddings(self) -> nn.Module:
        """The word table that text ids are looked up in."""
        if isinstance(self.inner.embedder, Holistic):
            return self.inner.embedder.stack.embed_tokens
        return self.language_model().get_input_embeddings()

    def language_model(self) -> Any:
        """The decoder's own model of transformers.

        Raises:
            NotImplementedError: for a decoder that is none.
        """
        if not isinstance(self.inner.decoder, HFDecoder):
            raise NotImplementedError(f"{type(self.inner.decoder).__name__} does not name its word table")
        return self.inner.decoder.lm

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refuse: the decoder's new tokens are given where it is trained, in `model.decoder.init_args.new_tokens`.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("give new tokens to the decoder before it trains: model.decoder.init_args.new_tokens")

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute the blocks of all parts in the backward pass.

        Args:
            gradient_checkpointing_kwargs: for `torch.utils.checkpoint`; not re-entrant unless they ask for it.
            kwargs: other settings of transformers' own method, such as `offload`.
        """
        settings = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        self._recompute(True, "enable", settings, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep what the backward pass needs, instead of recomputing it."""
        self._recompute(False, "disable")

    def _recompute(self, enabled: bool, verb: str, *args: Any, **kwargs: Any) -> None:
        for module in self.inner.modules():
            if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
                # The second name is that of transformers before 5.23.
                names = (f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}")
                switch = next(found for name in names if (found := getattr(module, name, None)) is not None)
                switch(*args, **kwargs)
        self.inner.decoder.recompute = enabled
        self.inner.decoder.recompute_blocks(self.inner.training)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return bool(self.inner.decoder.recompute)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Write weights and configuration as transformers does, and beside them the stub that imports the kit."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        write_stub(Path(save_directory))
        return saved

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: `auto_map` names the stub, so no file of the kit is copied when a model is saved."""


class LitVLMModel(LitVLMPreTrainedModel):
    """Encoder, projector, embedder and decoder; without logits.

    Args:
        config: what the model is made of.

    Attributes:
        vlm: the model as the kit has it.
    """

    def __init__(self, config: LitVLMConfig) -> None:
        asked = config._attn_implementation_internal
        super().__init__(config)
        slots = factories(config.slots, asked)
        # transformers builds on the meta device and in the wanted dtype: tables that constructors compute would be lost
        # or rounded.
        on_meta, dtype = torch.get_default_device().type == "meta", torch.get_default_dtype()
        with torch.device("cpu"), meta_parameters() if on_meta else nullcontext(), _default_dtype(torch.float32):
            self.vlm = slots.assemble(lambda _name, factory: factory())
        for slot, kind in config.quantise.items():
            quantise_parts({slot: self.vlm.slots()[slot][0]}, kind, "config.json: quantise")
        self.vlm.to(dtype)
        self.post_init()

    @property
    def inner(self) -> VLM:
        """The model as the kit has it."""
        return self.vlm

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LitVLMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """States of all positions after the decoder's final norm.

        Args:
            input_ids: `[b, s]`, with `config.image_token_index` at each visual token.
            attention_mask: `[b, s]`, or with a cache `[b, past + s]`; 0 for padding. None: there is none.
            pixel_values: uint8 `[b, n, 3, h, w]`, the images of each row; smaller ones lie in the upper left corner.
            image_sizes: `[b, n, 2]`, height and width of each image; 0 where a row has fewer than n.
            position_ids: `[b, s]`, which must count the tokens of each row, as they do where they are None.
            past_key_values: what an earlier call returned.
            inputs_embeds: not taken.
            use_cache: whether a cache is returned, which the next call continues.
            output_hidden_states: whether the states of all layers are returned.
            kwargs: what transformers hands to every model, such as `return_dict`.

        Raises:
            ValueError: for images that do not fit the image tokens, segments of packed rows, `inputs_embeds`, or
                attentions, which the kit's parts do not give out.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("a model of lit-vlm takes input_ids, not inputs_embeds: images become vectors in it")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions: the parts of a lit-vlm model do not give out attention weights")
        taps = tuple(range(self.config.num_hidden_layers + 1)) if output_hidden_states else ()
        cache = LitVLMCache(self.vlm) if use_cache and past_key_values is None else past_key_values
        given = (input_ids, attention_mask, position_ids, pixel_values, image_sizes)
        output = self._whole(taps, *given) if cache is None else self._continued(cache, taps, *given)
        return BaseModelOutputWithPast(
            last_hidden_state=output.hidden,
            past_key_values=cache,
            hidden_states=tuple(output.taps[layer] for layer in taps) if taps else None,
        )

    def _whole(
        self,
        taps: tuple[int, ...],
        ids: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        pixel_values: Tensor | None,
        image_sizes: Tensor | None,
    ) -> DecoderOutput:
        """What the decoder gives for whole rows, in the order of their positions."""
        image_token = self.config.image_token_index
        rows = moved_rows(self.vlm, image_token, ids, mask, position_ids, pixel_values, image_sizes)
        batch = rows.batch
        output = self.vlm.decoder(
            self.vlm.embed(batch),
            batch.position_ids,
            taps,
            visual=batch.image_positions,
            segments=batch.segments,
            grids=batch.image_grids,
        )
        states = {layer: rows.restored(state) for layer, state in output.taps.items()}
        return DecoderOutput(rows.restored(output.hidden), states)

    def _continued(
        self,
        cache: LitVLMCache,
        taps: tuple[int, ...],
        ids: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        pixel_values: Tensor | None,
        image_sizes: Tensor | None,
    ) -> DecoderOutput:
        """What the decoder gives for positions that follow those of a cache, which remembers them."""
        if not isinstance(cache, LitVLMCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}: a model of lit-vlm makes its own, which an earlier call "
                "with use_cache=True returns"
            )
        new = ids.shape[1]
        mask = ids.new_ones(len(ids), cache.length + new) if mask is None else mask
        if mask.shape[1] != cache.length + new:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns; {cache.length} + {new} positions need one each"
            )
        present = mask[:, -new:].bool()
        counted = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
        check_positions(position_ids, counted, present)
        start = cache.length == 0
        if not start and bool((ids == self.config.image_token_index).any()):
            raise ValueError("a cache cannot be continued with images: give the whole conversation again")
        batch = make_batch(
            self.vlm,
            self.config.image_token_index,
            ids,
            present,
            counted,
            *((pixel_values, image_sizes) if start else (None, None)),
        )
        cache.length += new
        visual = self.vlm.see(batch) if start else None
        embeds = self.vlm.embedder(batch, visual, self.vlm.decoder, cache.held.embedder, mask)
        return self.vlm.decoder(
            embeds,
            counted,
            taps,
            cache=cache.held.decoder,
            attention_mask=mask,
            visual=batch.image_positions,
            grids=batch.image_grids,
        )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def write_stub(folder: Path) -> None:
    """Write the file that `auto_map` names into a folder; it imports the classes from the installed kit."""
    shutil.copyfile(Path(__file__).with_name("stub.py"), folder / STUB)
