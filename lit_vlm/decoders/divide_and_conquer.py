"""EVEv2's decoder: image tokens have weights of their own in every block."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_vlm.core.batch import Grid, Segments
from lit_vlm.core.flops import Weights
from lit_vlm.core.part import StateDict
from lit_vlm.decoders.base import DecoderOutput
from lit_vlm.decoders.hf import Attention, HFDecoder
from lit_vlm.decoders.images import ImageAttention
from lit_vlm.decoders.stack import Recompute

TEXT, VISION, VISION_AND_ATTENTION = "text", "vision", "vision_and_attention"
BRANCH = re.compile(rf"\.(?:{TEXT}|{VISION})\.")


class _Permute(torch.autograd.Function):
    """Puts rows `[r, d]` into another order; its backward pass gathers rows too, instead of adding them one by one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grads[0], inverse, order), None, None


class Routing:
    """Which positions of the current batch are image tokens; one object that all branches of a decoder share.

    Attributes:
        order: `[b·s]`, text positions and then image positions; None sends everything through the text branch.
        inverse: `[b·s]`, the order that undoes `order`.
        text: the part of `order` with text positions. Its length is where image positions begin; as the length of a
            tensor it does not bind a compiled graph to one batch, as a number would.
    """

    def __init__(self) -> None:
        self.order: Tensor | None = None
        self.inverse: Tensor | None = None
        self.text: Tensor | None = None

    def set(self, shape: torch.Size, visual: Tensor | None) -> None:
        """Route a new batch; the routing stays until the next one, as blocks may be recomputed in the backward pass.

        Args:
            shape: shape `[b, s, d]` of the states.
            visual: `[t]`, index into b·s of the image tokens; None sends everything through the text branch.
        """
        self.order = self.inverse = self.text = None
        if visual is not None:
            mark = torch.zeros(shape[0] * shape[1], dtype=torch.uint8, device=visual.device)
            self.order = mark.index_fill(0, visual, 1).argsort(stable=True)
            self.inverse = self.order.argsort()
            self.text = self.order[: len(mark) - len(visual)]


class Routed(nn.Module):
    """A module and its copy for image tokens; each token goes through one of them.

    Between a norm and the projections behind it the rows stay sorted by branch, so that the projections only take
    slices.

    Args:
        module: the text branch; the vision branch starts as its copy.
        routing: the decoder's routing, one object for all routed modules.
        sort: whether rows arrive in the order of the sequence; otherwise they are sorted by branch already.
        restore: whether rows are handed on in the order of the sequence; otherwise sorted by branch.
    """

    def __init__(self, module: nn.Module, routing: Routing, sort: bool, restore: bool) -> None:
        super().__init__()
        self.text = module
        self.vision = copy.deepcopy(module)
        self._routing, self._sort, self._restore = routing, sort, restore

    def forward(self, states: Tensor) -> Tensor:
        """`[b, s, d]` → `[b, s, d']`, each position through its own branch."""
        order, inverse, of_text = self._routing.order, self._routing.inverse, self._routing.text
        if order is None or inverse is None or of_text is None:
            return self.text(states)
        rows = states.flatten(0, 1)
        if self._sort:
            rows = _Permute.apply(rows, order, inverse)
        # A branch without rows still runs: its gradients are zeros then, on every rank.
        text, vision = rows[: len(of_text)], rows[len(of_text) :]
        rows = torch.cat([self.text(text), self.vision(vision)])
        if self._restore:
            rows = _Permute.apply(rows, inverse, order)
        return rows.unflatten(0, states.shape[:2])


class DivideAndConquer(HFDecoder):
    """A causal language model whose blocks have a second set of weights for image tokens (EVEv2, section 3.1).

    Projections, norms and MLP are split; attention is one over all tokens, and word table, final norm and output layer
    are shared. Each token pays for one branch. Weights of a plain decoder start both branches.

    A stage can train the copies alone, `only: {decoder: vision}`, or with all of the attention, `vision_and_attention`.

    Args:
        name: hub name, local folder, or `package:NAME` for a package that carries a GGUF file. Or null, with `config`.
        config: a model configuration with `model_type`, for random weights; `vocab_size` defaults to the tokenizer's.
        tokenizer: source of the tokenizer; default: `name`. `bytes` needs no file.
        recompute: recompute blocks in the backward pass (gradient checkpointing): less memory, a third more compute.
            `offload` keeps the inputs of the blocks on the host meanwhile: less memory still, and a copy each way.
        attention: implementation of attention; all of them keep the segments of a packed row apart.
        split: `all` of a block, or its `mlp` alone: the visual experts of Mono-InternVL (arXiv 2410.08202).
        new_tokens: see `HFDecoder`.
        image_attention: see `HFDecoder`.

    Raises:
        ValueError: for a decoder whose blocks are not built like those of Llama and Qwen2; and as `HFDecoder`.
    """

    def __init__(
        self,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        recompute: Recompute = False,
        attention: Attention = "sdpa",
        split: Literal["all", "mlp"] = "all",
        new_tokens: tuple[str, ...] = (),
        image_attention: ImageAttention = "causal",
    ) -> None:
        super().__init__(
            name,
            config,
            tokenizer,
            recompute=recompute,
            attention=attention,
            new_tokens=new_tokens,
            image_attention=image_attention,
        )
        self.split = split
        self._routing = Routing()
        for block in self.blocks():
            self._split(block)

    def _split(self, block: Any) -> None:
        wanted = {
            "input_layernorm": (True, False),
            "self_attn.q_proj": (False, True),
            "self_attn.k_proj": (False, True),
            "self_attn.v_proj": (False, True),
            "self_attn.o_proj": (True, True),
            "post_attention_layernorm": (True, False),
            "mlp": (self.split == "mlp", True),
        }
        covered = tuple(f"{name}." for name in wanted)
        modules = dict(block.named_modules())
        other = [name for name, _ in block.named_parameters() if not name.startswith(covered)]
        if other or not modules.keys() >= wanted.keys():
            raise ValueError(
                f"DivideAndConquer splits blocks such as those of Llama and Qwen2, of {', '.join(wanted)}; "
                f"{type(block).__name__} has {', '.join(other) or 'other ones'}"
            )
        for name, (sort, restore) in wanted.items():
            if self.split == "mlp" and name != "mlp":
                continue
            block.set_submodule(name, Routed(modules[name], self._routing, sort, restore))

    def adapt_state(self, state: StateDict) -> StateDict:
        """Give both branches the weights of a plain decoder; weights of a split decoder stay as they are."""
        state = self._with_new_rows(state)
        if any(BRANCH.search(key) for key in state):
            return state
        plain = {key: BRANCH.sub(".", key, count=1) for key in self.state_dict()}
        # Cloned, as the branches part ways from here. Keys of no parameter stay, so that loading refuses them by name.
        split = {key: state[name].clone() for key, name in plain.items() if name in state}
        used = set(plain.values())
        return split | {key: value for key, value in state.items() if key not in used}

    def trainable_parameters(self, only: str | None = None) -> Iterable[nn.Parameter]:
        """All parameters, the `vision` branches alone, or with all of the attention: `vision_and_attention`.

        Raises:
            ValueError: for another group.
        """
        if only is None:
            return self.parameters()
        if only not in (VISION, VISION_AND_ATTENTION):
            return super().trainable_parameters(only)
        attention = ".self_attn." if only == VISION_AND_ATTENTION else ".vision."
        return [p for name, p in self.named_parameters() if ".vision." in name or attention in name]

    def token_weights(self, visual: bool) -> Weights:
        """The weights of one branch of the blocks, and those that both share; see `Decoder.token_weights`."""
        other = f".{TEXT if visual else VISION}."
        named = (item for block in self.blocks() for item in block.named_parameters())
        return Weights.of(parameter for name, parameter in named if other not in name)

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
        """Run the blocks; see `Decoder.forward`."""
        # While decoding there are no image tokens; in training even an empty branch needs its gradients.
        idle = visual is None or not (len(visual) or torch.is_grad_enabled())
        self._routing.set(embeds.shape, None if idle else visual)
        return super().forward(embeds, position_ids, taps, cache, attention_mask, visual, segments, grids)
