"""OLA-VLM's auxiliary losses: what a teacher sees in an image must be readable from the decoder's layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lit_vlm.core.batch import Batch, Grid, VisualTokens, index_suffixes
from lit_vlm.core.flops import Flops, FlopsOf
from lit_vlm.core.losses import contrastive_loss, smooth_l1_distance
from lit_vlm.core.transfer import send
from lit_vlm.embedders.base import Embedder
from lit_vlm.heads.base import Head, Tap
from lit_vlm.heads.perceiver import Perceiver
from lit_vlm.teachers.base import Teacher

Queries = Literal["parameters", "states", "own"]
Text = Literal["all", "before", "none"]


class EmbeddingDistillation(Head):
    """Small predictors, one per layer, read the decoder's states and are compared with a teacher (OLA-VLM, section 3).

    For each image a predictor reads the image's tokens, the task tokens behind it that belong to this head, and the
    text of its sample; never another sample, padding, other images or the task tokens of other heads. A head without a
    group of its own reads the task tokens of all groups. The loss of an image is the mean smooth L1 plus a contrastive
    term that picks the image's target among those of all images of all ranks, summed over layers. Samples without
    images take no part.

    Args:
        width: width of the decoder.
        num_layers: blocks of the decoder.
        teacher: gives the targets, equally many for each image.
        layers: which decoder layers are read, one predictor each.
        num_targets: the teacher's features per image; 1 for a whole-image embedding.
        tokens: the group of the embedder's task tokens that is this head's, or null for none.
        queries: what the predictors ask with: the group's `parameters`, its `states` in the layer that is read (one
            query, their mean), or latents of their `own`.
        inner_width: inner width of the predictors; null: the decoder's width.
        text: what is read of the sample's text: `all`, as published, which in training includes answers; only what
            stands `before` the image, as system prompts do; or `none`.
        read_padding: also read the padding of a row, as zeros, like the published code: there padding enters as zeros
            and leaves flash attention as zeros in every layer of a Llama or Phi-3. Then a loss depends on how long the
            other rows are. With eager attention, to which that code falls back where flash attention is not installed,
            padding holds states that look at the sample; those are not reproduced.
        contrastive: weight of the contrastive term; 0 leaves it out.
        num_heads: attention heads of a predictor.
        head_dim: width of an attention head.

    Raises:
        ValueError: for layers that the decoder does not have, and for `queries` and `tokens`, or `read_padding` and
            `text`, that do not go together.
    """

    def __init__(
        self,
        width: int,
        num_layers: int,
        teacher: Callable[[], Teacher],
        layers: list[int],
        num_targets: int = 576,
        tokens: str | None = None,
        queries: Queries = "parameters",
        inner_width: int | None = None,
        text: Text = "all",
        read_padding: bool = False,
        contrastive: float = 0.3,
        num_heads: int = 4,
        head_dim: int = 32,
    ) -> None:
        super().__init__(width, num_layers)
        if not layers or not all(1 <= layer <= num_layers for layer in layers):
            raise ValueError(f"layers {layers}: choose from 1 to {num_layers}, the blocks of this decoder")
        if (tokens is None) != (queries == "own"):
            raise ValueError(
                f"queries {queries} with tokens {tokens}: `own` goes without task tokens, the others need a group"
            )
        if read_padding and text != "all":
            raise ValueError("read_padding goes with text: all")
        self.teacher = teacher()
        self.layers, self.num_targets, self.tokens, self.queries = list(layers), num_targets, tokens, queries
        self.text, self.read_padding, self.contrastive = text, read_padding, contrastive
        self.taps = (*sorted(set(layers)), *([tokens] if tokens and queries == "parameters" else []))
        self.predictors = nn.ModuleList(
            Perceiver(
                width,
                self.teacher.width,
                num_targets,
                inner_width or width,
                own_queries=queries == "own",
                num_heads=num_heads,
                head_dim=head_dim,
            )
            for _ in layers
        )
        # The cosines are multiplied by its exponential; 2 is the published start. Layers share it. A vector of one
        # number, as sharding takes no scalars.
        self.logit_scale = nn.Parameter(torch.tensor([2.0])) if contrastive else None
        self._places = range(0)

    def connect(self, embedder: Embedder) -> None:
        """Find the head's group among the embedder's task tokens.

        Raises:
            ValueError: when the embedder has no such group.
        """
        if self.tokens is None:
            return
        if self.tokens not in embedder.task_tokens:
            found = f"{list(embedder.task_tokens) or 'none'} ({type(embedder).__name__})"
            raise ValueError(
                f"it reads the task tokens '{self.tokens}', model.embedder has {found}: set task_tokens of an embedder "
                "Splice, or for this head tokens: null and queries: own"
            )
        self._places = embedder.task_tokens[self.tokens]

    def loss(self, states: Mapping[Tap, Tensor], batch: Batch, targets: VisualTokens) -> Tensor:
        """The losses of all images, summed; see `Head.loss`.

        Raises:
            ValueError: when the teacher gives another number of features per image than `num_targets`.
        """
        expected = self._of_images(targets)
        predictions = self.predict(states, batch)
        flat = expected.flatten(0, 1)
        distances = [smooth_l1_distance(of_layer.flatten(0, 1), flat).sum() for of_layer in predictions]
        loss = torch.stack(distances).sum() / self.num_targets
        if self.logit_scale is not None:
            loss = loss + self.contrastive * contrastive_loss(predictions, expected, self.logit_scale).sum()
        return loss

    def flops(self) -> FlopsOf:
        """Operations of all predictors, which read an image's sample. Comparing with targets costs next to nothing."""
        parts = [predictor.flops(self.queries == "states") for predictor in self.predictors]  # type: ignore[operator]

        def of(batch: Batch) -> Flops:
            read = [sample for sample in batch.samples if sample.num_images]
            tokens = sum(sample.num_tokens for sample in read)
            lengths = [sample.num_tokens for sample in read for _ in range(sample.num_images)]
            return sum((part(tokens, lengths) for part in parts), Flops()) if read else Flops()

        return of

    def predict(self, states: Mapping[Tap, Tensor], batch: Batch) -> Tensor:
        """Predictions of the teacher's features from each layer: `[layers, n, num_targets, width of the teacher]`."""
        rows, mask, places = self._reading(batch)
        outputs = []
        for layer, predictor in zip(self.layers, self.predictors, strict=True):
            hidden = states[layer]
            if self.read_padding:
                hidden = hidden * (batch.segment_ids != 0)[..., None]
            queries = None
            if self.queries == "parameters":
                assert self.tokens is not None
                queries = states[self.tokens][None].to(hidden.dtype)
            elif self.queries == "states":
                queries = hidden.flatten(0, 1)[places].mean(1, keepdim=True)
            outputs.append(predictor(hidden, queries, rows, mask))
        return torch.stack(outputs)

    def predictions(self, states: Mapping[Tap, Tensor], batch: Batch) -> Mapping[str, VisualTokens]:
        """The predictions from each layer, where the teacher's features are a square; see `Head.predictions`."""
        side = math.isqrt(self.num_targets)
        if side == 1 or side**2 != self.num_targets:
            return {}
        grids = (Grid(side, side),) * len(batch.image_grids)
        found = self.predict(states, batch).float().flatten(1, 2)
        return {f"layer {layer}": VisualTokens(one, grids) for layer, one in zip(self.layers, found, strict=True)}

    def _reading(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Find what the predictor of each image reads.

        Returns:
            the image's row of the batch `[n]`; a bool mask `[n, s]`, True at the positions of that row that are read;
            and the positions of the head's task tokens `[n, c]`, indices into b·s.
        """
        positions, grids, (b, s) = batch.image_positions, batch.image_grids, batch.input_ids.shape
        device, n = positions.device, len(grids)
        lengths = torch.tensor([grid.num_tokens for grid in grids])
        starts = lengths.cumsum(0) - lengths
        others, suffixes = index_suffixes(grids)
        image = torch.arange(n).repeat_interleave(lengths)  # of each visual token
        # The owner of a position: an image's number, −1 for text, −2 for task tokens of another head.
        owner = torch.full((len(image),), -2)
        # Without a group of its own a head reads the whole suffix: all task tokens, and tokens of further encoders.
        own = suffixes if self.tokens is None else suffixes[:, self._places.start : self._places.stop]
        owner[others] = image[others]
        owner[own] = torch.arange(n)[:, None].expand_as(own)
        owner, starts, own = (send(x, device) for x in (owner, starts, own))
        owner = torch.full((b * s,), -1, device=device).index_copy(0, positions, owner).view(b, s)
        first = positions[starts]
        rows = first // s
        segments = batch.segment_ids[rows]
        number = torch.arange(n, device=device)[:, None]
        mask = owner[rows] == number
        if self.text != "none":
            same = segments == segments.gather(1, (first % s)[:, None])
            if self.read_padding:
                same = same | (segments == 0)
            if self.text == "before":
                same = same & (torch.arange(s, device=device) < (first % s)[:, None])
            mask = mask | (same & (owner[rows] == -1))
        return rows, mask, positions[own]

    def _of_images(self, features: VisualTokens) -> Tensor:
        """Group the teacher's features by image: `[n, num_targets, width of the teacher]`."""
        wrong = {grid.num_tokens for grid in features.grids} - {self.num_targets}
        if wrong:
            raise ValueError(
                f"EmbeddingDistillation: the teacher gives {sorted(wrong)} features of an image, num_targets is "
                f"{self.num_targets}; set it to the teacher's number, or the teacher's to it"
            )
        return features.features.view(len(features.grids), self.num_targets, -1)

    def nothing(self, states: Mapping[Tap, Tensor]) -> Tensor:
        """A zero as `Head.nothing`; this rank still takes part in gathering targets, as the other ranks wait for it."""
        zero = super().nothing(states)
        if self.logit_scale is None:
            return zero
        assert self.teacher is not None
        empty = states[self.layers[0]].new_zeros(len(self.layers), 0, self.num_targets, self.teacher.width)
        return zero + contrastive_loss(empty, empty[0], self.logit_scale).sum()
