"""How tiles make up a picture: what is left without padding, against transformers."""

from __future__ import annotations

import numpy as np
import torch
from transformers.models.llava_next.modeling_llava_next import unpad_image

from lit_vlm.core.tiling import Tiling


def test_what_is_not_padding_is_what_transformers_leaves() -> None:
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(1, 3000, (300, 2)).tolist(), [336, 672], [1, 3000], [3000, 1], [7, 7]]
    odd = 0
    for number, (height, width) in enumerate(sizes):
        rows, cols = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (1, 1))[number % 6]
        side = (24, 4, 5)[number % 3]
        whole = torch.arange(rows * cols * side**2).view(1, rows * side, cols * side)
        expected = unpad_image(whole, (height, width))[0]
        seen, across = Tiling(rows, cols, height, width).patches(side)
        assert (seen, across) == tuple(expected.shape)
        top, left = (rows * side - seen) // 2, (cols * side - across) // 2
        assert torch.equal(whole[0, top : top + seen, left : left + across], expected)
        odd += seen < rows * side or across < cols * side
    assert odd > 200
