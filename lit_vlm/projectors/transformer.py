"""A projector of Llama blocks, which VILA compares with a linear one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from lit_vlm.core.batch import VisualTokens
from lit_vlm.projectors.base import Projector
from lit_vlm.projectors.resampler import pad_images


class Transformer(Projector):
    """A linear layer, then Llama blocks in which all tokens of an image see each other; no norm at the end.

    Source: VILA, table 1, row "Transformer"; how many blocks it had is not said (its code has variants of 1 and 3).

    Args:
        in_width: width of the encoder.
        out_width: width of the decoder, and of the blocks.
        depth: number of Llama blocks.
        head_dim: width of an attention head.
        ffn_ratio: inner width of the feed-forward, as a multiple of the decoder's width; Llama-2-7B has 11008 / 4096.

    Raises:
        ValueError: for a depth below 1, or a width that does not divide into heads of even width.
    """

    def __init__(
        self, in_width: int, out_width: int, depth: int = 1, head_dim: int = 128, ffn_ratio: float = 2.6875
    ) -> None:
        super().__init__(in_width, out_width)
        if depth < 1:
            raise ValueError(f"projector depth must be at least 1, not {depth}")
        num_heads = max(1, out_width // head_dim)
        if out_width % (2 * num_heads):
            raise ValueError(f"projector: {num_heads} heads of even width do not divide the decoder's {out_width}")
        self.linear = nn.Linear(in_width, out_width)
        config = LlamaConfig(
            vocab_size=1,
            hidden_size=out_width,
            intermediate_size=int(out_width * ffn_ratio),
            num_hidden_layers=depth,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            attn_implementation="sdpa",
        )
        self.stack = LlamaModel(config)
        self.stack.norm = nn.Identity()
        self.stack.embed_tokens = nn.Identity()  # in place of a word table that nothing would read

    def blocks(self) -> list[nn.Module]:
        """The Llama blocks."""
        return list(self.stack.layers)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """`[t, in_width]` → `[t, out_width]`."""
        padded, mask = pad_images(VisualTokens(self.linear(tokens.features), tokens.grids))
        n, length, _ = padded.shape
        seen = torch.ones(n, length, dtype=torch.bool, device=padded.device) if mask is None else mask
        hidden: Tensor = self.stack(
            inputs_embeds=padded, attention_mask=seen[:, None, None].expand(-1, -1, length, -1), use_cache=False
        ).last_hidden_state
        return VisualTokens(hidden.flatten(0, 1) if mask is None else hidden[mask], tokens.grids)
