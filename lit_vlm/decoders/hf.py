"""Any causal language model of the transformers library."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PretrainedConfig,
)

from lit_vlm.checkpoints.safetensors import read_folder
from lit_vlm.decoders import internlm2
from lit_vlm.decoders.base import Decoder, DecoderOutput
from lit_vlm.part import StateDict
from lit_vlm.pretrained import read_pretrained, resolve, shortened
from lit_vlm.tokenizers import load_tokenizer

Attention = Literal["sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"]
ATTENTIONS = {
    "sdpa": "_supports_sdpa",
    "eager": None,
    "flex_attention": "_supports_flex_attn",
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
}
"""Attention → where a model's class says whether it has it."""
INTERNLM2 = "internlm2"
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on linear layers of the decoder; with them only the adapters train.

    Attributes:
        rank: rank of each update.
        alpha: scale; the update is multiplied by alpha / rank.
        dropout: dropout on the adapter's input.
        targets: names of the linear layers that get an adapter.
    """

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEAR_LAYERS


class HFDecoder(Decoder):
    """A causal language model of transformers; InternLM2, which it lacks, is taken for the Llama that it is.

    Args:
        name: hub name, local folder, or `package:NAME` for a package that carries a GGUF file. Or null, with `config`.
        config: a model configuration with `model_type`, for random weights; `vocab_size` defaults to the tokenizer's.
        tokenizer: source of the tokenizer; default: `name`. `bytes` needs no file.
        lora: adapters; with them the base weights stay frozen.
        recompute: recompute blocks in the backward pass (gradient checkpointing): less memory, a third more compute.
        attention: which implementation; all of them keep the segments of a packed row apart.
    """

    def __init__(
        self,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        lora: Lora | None = None,
        recompute: bool = False,
        attention: Attention = "sdpa",
    ) -> None:
        super().__init__()
        if (name is None) == (config is None):
            raise ValueError("give HFDecoder either a name or a config, not both and not neither")
        self.name, self.lora, self.attention = name, lora, attention
        self.tokenizer_source = tokenizer or name
        self.config = self._load_config(config)
        self.lm = _language_model(self.config, attention)
        self.recompute = recompute
        if recompute:
            self.lm.activation_checkpointing_enable({"use_reentrant": False})
        if lora is not None:
            inject_adapter_in_model(_peft_config(lora), self.lm)
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
            return getattr(loaded, "text_config", loaded)
        settings = dict(config or {})
        if self.tokenizer_source is not None:
            size = len(self.tokenizer)
            if settings.setdefault("vocab_size", size) < size:
                raise ValueError(f"decoder.config.vocab_size {settings['vocab_size']} is below the tokenizer's {size}")
        model_type = settings.pop("model_type", "llama")
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"decoder.config.model_type '{model_type}' is none that transformers knows")
        return AutoConfig.for_model(model_type, **settings)

    @cached_property
    def tokenizer(self) -> Any:
        """The fast tokenizer, with a pad token."""
        if self.tokenizer_source is None:
            raise ValueError("this decoder was built from a config alone: give decoder.tokenizer, e.g. bytes")
        return load_tokenizer(self.tokenizer_source)

    @property
    def base(self) -> Any:
        """The blocks with the final norm, without the head."""
        return self.lm.get_decoder()

    def blocks(self) -> list[nn.Module]:
        """Transformer blocks."""
        layers = getattr(self.base, "layers", None) or getattr(self.base, "h", None)
        if layers is None:
            raise ValueError(f"HFDecoder does not find the blocks of {type(self.base).__name__}")
        return list(layers)

    def pretrained_state(self) -> StateDict | None:
        """The published weights, and new adapters that change nothing yet.

        Raises:
            ValueError: where the files lack weights, have them in other shapes, or cannot be read.
        """
        if self.name is None:
            return None
        source = resolve(self.name)
        found, _ = PretrainedConfig.get_config_dict(source)
        if found.get("model_type") == INTERNLM2:
            state = internlm2.state_as_llama(read_folder(source), found)
        else:
            state, lacking = read_pretrained(
                AutoModelForCausalLM, source, config=self.config, dtype=torch.get_default_dtype()
            )
            if lacking:
                problems = [f"{key} ({reason})" for key, reason in sorted(lacking.items())]
                raise ValueError(
                    f"decoder.name {self.name} has no weights for {shortened(problems)}: "
                    f"name a whole causal language model, with the files of its own config.json"
                )
        return self.adapt_state({f"lm.{key}": value for key, value in state.items()})

    def adapt_state(self, state: StateDict) -> StateDict:
        """Weights of a decoder without adapters, under the names of this one with new adapters."""
        if self.lora is None or any(".lora_A." in key for key in state):
            return state
        adapted: StateDict = {}
        for key, own in self.state_dict().items():
            if ".lora_A." in key:
                bound = 1 / math.sqrt(own.shape[1])  # Kaiming uniform with a = √5, as a linear layer starts
                adapted[key] = torch.empty(own.shape, dtype=own.dtype).uniform_(-bound, bound)
            elif ".lora_B." in key:
                adapted[key] = torch.zeros(own.shape, dtype=own.dtype)
            elif (plain := key.replace(".base_layer.", ".")) in state:
                adapted[key] = state[plain]
        # What is nobody's stays, so that it is refused by name.
        used = {key.replace(".base_layer.", ".") for key in adapted}
        return adapted | {key: value for key, value in state.items() if key not in used}

    def trainable_parameters(self, only: str | None = None) -> Iterable[nn.Parameter]:
        """All parameters, or only those of the adapters."""
        if only is not None or self.lora is None:
            return super().trainable_parameters(only)
        return [p for name, p in self.named_parameters() if ".lora_" in name]

    def merge_adapters(self) -> None:
        """Add adapters into the weights they adapt and remove them; without adapters, nothing."""
        if self.lora is None:
            return
        for name, module in list(self.lm.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge()
                self.lm.set_submodule(name, module.get_base_layer())
        self.lora = None

    def recompute_blocks(self, enabled: bool) -> None:
        """Let the blocks recompute although the decoder is frozen and so in eval mode.

        transformers asks each block whether it is training. Only that flag is set, never that of dropout inside.
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
    ) -> DecoderOutput:
        """Run the blocks; see `Decoder.forward`. Image tokens are treated as all others."""
        states: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for layer in taps:
                self._tap(layer, embeds, states, hooks)
            hidden = run_blocks(self.base, self.attention, embeds, position_ids, cache, attention_mask)
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

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of the output layer."""
        return list(self.lm.get_output_embeddings().parameters())

    def new_cache(self) -> DynamicCache:
        """An empty cache of keys and values."""
        return DynamicCache(config=self.config)

    def select_cache(self, cache: DynamicCache, rows: Tensor) -> DynamicCache:
        """Rows of a cache, as a copy."""
        selected = copy.deepcopy(cache)
        selected.batch_select_indices(rows)
        return selected


def run_blocks(
    stack: Any, attention: str, embeds: Tensor, position_ids: Tensor, cache: Any, attention_mask: Tensor | None
) -> Tensor:
    """The last states `[b, s, d]` of a transformers model without head; arguments as in `Decoder.forward`.

    transformers keeps segments apart by itself where positions restart and no mask is given. Its flash attention does
    so for a single row, so there the rows are joined into one.
    """
    shape = embeds.shape
    if attention.startswith("flash") and cache is None:
        embeds, position_ids = embeds.reshape(1, -1, shape[-1]), position_ids.reshape(1, -1)
    output = stack(
        inputs_embeds=embeds,
        position_ids=position_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.last_hidden_state.view(shape)


def _language_model(config: PretrainedConfig, attention: str) -> Any:
    """The architecture with random weights.

    Raises:
        ValueError: for a model that is no causal language model, or an attention that it lacks.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"decoder: a '{config.model_type}' is no causal language model of transformers")
    family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # What the class says itself: Gemma 2 caps its attention's logits, which sdpa cannot do.
    has = [name for name, flag in ATTENTIONS.items() if flag is None or getattr(family, flag, False)]
    if attention not in has:
        raise ValueError(
            f"decoder.attention is {attention}, which a '{config.model_type}' lacks: "
            f"set model.decoder.init_args.attention to one of {', '.join(has)}"
        )
    try:
        # The dtype is the trainer's choice, not that of the files.
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=torch.get_default_dtype()
        )
    except ImportError as error:
        raise ValueError(
            f"decoder.attention {attention} needs a package that is not here ({str(error).splitlines()[0]}): install "
            f"it, or set model.decoder.init_args.attention to {has[0]}"
        ) from error


def _peft_config(lora: Lora) -> LoraConfig:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
    )
