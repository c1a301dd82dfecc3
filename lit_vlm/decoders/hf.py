"""Any causal language model of the transformers library."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, PretrainedConfig

from lit_vlm.core.batch import Grid, Segments
from lit_vlm.core.flops import Weights
from lit_vlm.core.hub import is_offline
from lit_vlm.core.lora import Lora
from lit_vlm.core.part import StateDict
from lit_vlm.core.pretrained import find_weights, made_config, plain_config, read_pretrained, resolve, shortened
from lit_vlm.core.safetensors import read_folder
from lit_vlm.core.tokenizers import load_tokenizer
from lit_vlm.decoders import internlm2, multimodal
from lit_vlm.decoders.architecture import language_model
from lit_vlm.decoders.base import Decoder, DecoderOutput
from lit_vlm.decoders.images import BIDIRECTIONAL, ImageAttention, check_whole_images, image_masks
from lit_vlm.decoders.stack import Recompute, run_blocks, set_recompute

Attention = Literal["sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"]
INTERNLM2 = "internlm2"
RECURRENT = ("linear_attention", "mamba", "recurrent", "conv")
"""Among transformers' names of layer types, those that carry a state along the row."""


class HFDecoder(Decoder):
    """A causal language model of transformers; InternLM2, which transformers lacks, runs as a Llama with its weights.

    Args:
        name: hub name, local folder, or `package:NAME` for a package that carries a GGUF file. Or null, with `config`.
        config: a model configuration with `model_type`, for random weights; `vocab_size` defaults to the tokenizer's.
        tokenizer: source of the tokenizer; default: `name`. `bytes` needs no file.
        lora: the earlier spelling of `model.lora.decoder`, which existing configs have.
        recompute: recompute blocks in the backward pass (gradient checkpointing): less memory, a third more compute.
            `offload` keeps the inputs of the blocks on the host meanwhile: less memory still, and a copy each way.
        attention: implementation of attention; all of them keep the segments of a packed row apart. Recurrent layers do
            so only where transformers' kernels for them take the borders; others are refused when training on packed
            rows starts.
        new_tokens: special tokens that the tokenizer gets where it lacks them, such as a template's marks. Their rows
            of word table and output layer start as the mean of the others (Hewitt 2021, "Initializing new word
            embeddings for pretrained language models"). With adapters these two layers train as well.
        image_attention: `causal`, or `bidirectional` within each image (as in Gemma 3, arXiv 2503.19786), with
            attention sdpa or eager. The tokens that show an image, with all of its tiles, see each other. Task tokens
            behind it, text and other images see what stands before them.

    Raises:
        ValueError: when not exactly one of `name` and `config` is given; for a model that is no causal language model
            of transformers, an attention that it lacks, a `vocab_size` below the tokenizer's, or `bidirectional` where
            its layers or its attention take no such mask.
    """

    def __init__(
        self,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        lora: Lora | None = None,
        recompute: Recompute = False,
        attention: Attention = "sdpa",
        new_tokens: tuple[str, ...] = (),
        image_attention: ImageAttention = "causal",
    ) -> None:
        super().__init__()
        if (name is None) == (config is None):
            raise ValueError("give HFDecoder either a name or a config (with name: null), not both and not neither")
        self.name, self.lora, self.attention = name, lora, attention
        self.tokenizer_source, self.new_tokens = tokenizer or name, tuple(new_tokens)
        self._whole_config: PretrainedConfig | None = None
        self.config = self._load_config(config)
        self._published_config = copy.deepcopy(self.config)
        if self.new_tokens:
            self.config.vocab_size = max([self.config.vocab_size, *(token + 1 for token in self._tokenizer[1])])
        self.lm = language_model(self.config, attention)
        self.recompute = recompute
        set_recompute(self.lm, recompute)
        self._carries = self.carried() is not None
        self.image_attention = image_attention
        if image_attention == BIDIRECTIONAL:
            check_whole_images(self.config, attention, self.carried())
        self.width = self.config.hidden_size
        self.num_layers = self.config.num_hidden_layers
        self.vocab_size = self.config.vocab_size

    def _load_config(self, config: dict[str, Any] | None) -> PretrainedConfig:
        if self.name is not None:
            source = resolve(self.name, weights=False)
            found, _ = PretrainedConfig.get_config_dict(source)
            if found.get("model_type") == INTERNLM2:
                return AutoConfig.for_model(**internlm2.as_llama(found))
            loaded = AutoConfig.from_pretrained(source)
            if multimodal.is_multimodal(loaded):
                self._whole_config = loaded
                return multimodal.text_config(loaded, self.name)
            return getattr(loaded, "text_config", loaded)
        settings = dict(config or {})
        if self.tokenizer_source is not None:
            size = len(self.tokenizer)
            if settings.setdefault("vocab_size", size) < size:
                raise ValueError(f"decoder.config.vocab_size {settings['vocab_size']} is below the tokenizer's {size}")
        model_type = settings.pop("model_type", "llama")
        return made_config(model_type, settings, "model.decoder")

    @property
    def tokenizer(self) -> Any:
        """The fast tokenizer, with a pad token and the new tokens.

        Raises:
            ValueError: for a decoder that was built from a config without a tokenizer; and as `load_tokenizer`.
        """
        return self._tokenizer[0]

    @cached_property
    def _tokenizer(self) -> tuple[Any, list[int]]:
        """The tokenizer, and the ids of those new tokens that its vocabulary lacked."""
        if self.tokenizer_source is None:
            raise ValueError("this decoder was built from a config alone: give decoder.tokenizer, e.g. bytes")
        tokenizer = load_tokenizer(self.tokenizer_source)
        if not self.new_tokens:
            return tokenizer, []
        vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
        tokenizer.add_tokens([token for token in self.new_tokens if token not in added], special_tokens=True)
        return tokenizer, [tokenizer.convert_tokens_to_ids(t) for t in self.new_tokens if t not in vocabulary]

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Those of the generation config that comes with the model; empty without one, or with another tokenizer."""
        if self.name is None or self.tokenizer_source != self.name or is_offline():
            return frozenset()
        try:
            found = GenerationConfig.from_pretrained(resolve(self.name, weights=False)).eos_token_id
        except OSError:
            return frozenset()
        return frozenset(found if isinstance(found, list) else [found] if found is not None else [])

    @property
    def family(self) -> str:
        """Name of the decoder in messages: the class and the model type."""
        return f"HFDecoder ({self.config.model_type})"

    def carried(self) -> str | None:
        """In words, recurrent and convolutional layers that the configuration or the modules show; None without."""
        kinds = [kind for kind in dict.fromkeys(getattr(self.config, "layer_types", None) or ()) if kind in RECURRENT]
        if kinds:
            return f"layers of type {' and '.join(kinds)}"
        if any(isinstance(module, nn.Conv1d) for block in self._find_blocks() for module in block.modules()):
            return "convolutions along the row"
        return "recurrent layers" if getattr(self.lm, "_is_stateful", False) else None

    @property
    def base(self) -> Any:
        """The model's blocks with the final norm, without the output layer."""
        return multimodal.blocks_of(self.lm)

    def blocks(self) -> list[nn.Module]:
        """Transformer blocks.

        Raises:
            ValueError: for an architecture whose blocks are not found.
        """
        blocks = self._find_blocks()
        if not blocks:
            raise ValueError(f"HFDecoder does not find the blocks of {type(self.base).__name__}")
        return blocks

    def _find_blocks(self) -> list[nn.Module]:
        found = (getattr(self.base, name, None) for name in ("layers", "h", "blocks"))
        return next((list(layers) for layers in found if layers is not None), [])

    def find_pretrained(self) -> None:
        """Check that the files of the model are there.

        Raises:
            ValueError: saying what is missing.
        """
        if self.name is not None:
            find_weights(self.name)

    def pretrained_state(self) -> StateDict | None:
        """The published weights.

        Raises:
            ValueError: where the files lack weights, have them in other shapes, or cannot be read.
        """
        if self.name is None:
            return None
        source = resolve(self.name)
        found, _ = PretrainedConfig.get_config_dict(source)
        lacking: dict[str, str] = {}
        if found.get("model_type") == INTERNLM2:
            state = internlm2.state_as_llama(read_folder(source), found)
        elif self._whole_config is not None:
            state, lacking = multimodal.text_state(self._whole_config, source, self.lm)
        else:
            state, lacking = read_pretrained(
                AutoModelForCausalLM, source, config=self._published_config, dtype=torch.get_default_dtype()
            )
        if lacking:
            problems = [f"{key} ({reason})" for key, reason in sorted(lacking.items())]
            raise ValueError(
                f"decoder.name {self.name} has no weights for {shortened(problems)}: "
                "name a whole causal language model, with the files of its own config.json"
            )
        state = {f"lm.{key}": value for key, value in state.items()}
        # A published table may have spare rows behind the tokenizer's, of which nothing was learnt.
        first = min(self._tokenizer[1], default=None) if self.new_tokens else None
        return self.adapt_state(self._with_new_rows(state, first))

    def _with_new_rows(self, state: StateDict, learnt: int | None = None) -> StateDict:
        """Add rows for new tokens to word table and output layer, each the mean of the learnt rows.

        Args:
            state: weights by name.
            learnt: number of rows that were learnt; default: all that are there.
        """
        grown = dict(state)
        for name in self._table_names() if self.new_tokens else ():
            if name in state and len(old := state[name][:learnt]) < self.vocab_size:
                mean = old.float().mean(0, keepdim=True).to(old.dtype)
                grown[name] = torch.cat([old, mean.expand(self.vocab_size - len(old), *old.shape[1:])])
        return grown

    def _table_names(self) -> list[str]:
        """Parameters of the word table and the output layer."""
        tables = (self.lm.get_input_embeddings(), self.lm.get_output_embeddings())
        modules = [(name, module) for name, module in self.lm.named_modules() if module in tables]
        return [f"lm.{name}.{parameter}" for name, module in modules for parameter, _ in module.named_parameters()]

    def adapt_state(self, state: StateDict) -> StateDict:
        """Give word table and output layer of a decoder with fewer tokens rows for the new ones."""
        return self._with_new_rows(state)

    def standalone(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with the model's configuration in place of its name; the tokenizer is kept apart from it."""
        kept = {key: value for key, value in arguments.items() if key not in ("lora", "new_tokens", "recompute")}
        return kept | {"name": None, "config": plain_config(self.config), "tokenizer": None}

    def beside_adapters(self) -> list[nn.Parameter]:
        """Word table and output layer where new tokens have rows in them."""
        tables = self._table_names() if self.new_tokens else ()
        return [parameter for name, parameter in self.named_parameters() if name in tables]

    def recompute_blocks(self, enabled: bool) -> None:
        """Switch recomputation on or off, also for a frozen decoder, which is in eval mode.

        transformers recomputes a block whose flag `training` is set. Only that flag is set, never that of the dropout
        inside the block.
        """
        for block in self.blocks() if self.recompute else ():
            block.training = enabled

    def embed(self, input_ids: Tensor) -> Tensor:
        """Word vectors: `[b, s]` → `[b, s, d]`."""
        return self.lm.get_input_embeddings()(input_ids)

    def forward(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        taps: Sequence[int] = (),
        cache: Any = None,
        attention_mask: Tensor | None = None,
        visual: Tensor | None = None,
        segments: Segments | None = None,
        grids: Sequence[Grid] | None = None,
    ) -> DecoderOutput:
        """Run the blocks; arguments and errors as in `Decoder.forward`."""
        states: dict[int, Tensor] = {}
        mask: Tensor | dict[str, Tensor] | None = attention_mask
        if self.image_attention == BIDIRECTIONAL and visual is not None and len(visual):
            added_to = embeds.dtype if self.attention == "eager" else None
            mask = image_masks(position_ids, attention_mask, visual, grids, self.config, added_to)
        with ExitStack() as hooks:
            for layer in taps:
                self._tap(layer, embeds, states, hooks)
            known, carries = (segments, self._carries) if cache is None else (None, False)
            hidden = run_blocks(self.base, self.attention, embeds, position_ids, cache, mask, known, carries)
        if self.num_layers in taps:
            states[self.num_layers] = hidden
        return DecoderOutput(hidden, {layer: states[layer].view(embeds.shape) for layer in taps})

    def _tap(self, layer: int, embeds: Tensor, states: dict[int, Tensor], hooks: ExitStack) -> None:
        if not 0 <= layer <= self.num_layers:
            raise ValueError(f"a head taps layer {layer}; this decoder has layers 0 to {self.num_layers}")
        if layer == 0:
            states[0] = embeds
        elif layer < self.num_layers:

            def keep(_module: nn.Module, _args: Any, out: Any) -> None:
                states[layer] = out[0] if isinstance(out, tuple) else out

            # Removed before the backward pass, so that a recomputed block does not fire it again.
            handle = self.blocks()[layer - 1].register_forward_hook(keep)
            hooks.callback(handle.remove)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., d]` → `[..., v]`, with the scale and soft cap that some families have."""
        logits = self.lm.get_output_embeddings()(hidden)
        if scale := getattr(self.config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if divisor := getattr(self.config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if cap := getattr(self.config, "final_logit_softcapping", None):  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits

    @property
    def attention_width(self) -> int:
        """Width of all query heads of all blocks together; those without attention have none."""
        heads = getattr(self.config, "num_attention_heads", 0)
        width = heads and heads * (getattr(self.config, "head_dim", None) or self.width // heads)
        kinds = getattr(self.config, "layer_types", None) or [""] * self.num_layers
        return width * sum(kind not in RECURRENT for kind in kinds)

    def token_weights(self, visual: bool) -> Weights:
        """The weights of the blocks that a token is multiplied with; in a mixture of experts, those of its experts."""
        parameters = (parameter for block in self.blocks() for parameter in block.parameters())
        return Weights.of(parameters, getattr(self.config, "num_experts_per_tok", None))

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of the output layer."""
        return list(self.lm.get_output_embeddings().parameters())

    def new_cache(self) -> DynamicCache:
        """An empty cache of keys and values."""
        return DynamicCache(config=self.config)

    def select_cache(self, cache: DynamicCache, rows: Tensor) -> DynamicCache:
        """A new cache of the rows `rows` `[b']` of another, which stays as it is."""
        selected = copy.deepcopy(cache)
        selected.reorder_cache(rows)  # of any length; unlike `batch_select_indices` it knows recurrent states
        return selected
