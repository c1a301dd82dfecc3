"""What heads predict of pictures, as colours."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_vlm.core.batch import VisualTokens
from lit_vlm.data.sample.encode import Sample
from lit_vlm.evaluation.asker import Asker
from lit_vlm.heads import Head
from lit_vlm.teachers import Teacher


def draw_predictions(asker: Asker, sample: Sample) -> dict[str, dict[str, list[Tensor]]]:
    """What heads take their teachers' features of a prompt's pictures to be.

    Returns:
        head → where it is read → a picture for each of the prompt's, as `draw_features` makes them.
    """
    vlm = asker.module.vlm
    teachers = {name: head.teacher for name, head in vlm.heads.items() if isinstance(head, Head)}
    return {
        name: {place: draw_features(features, teachers[name]) for place, features in places.items()}
        for name, places in vlm.predictions(asker.batch([sample])).items()
    }


def draw_features(features: VisualTokens, teacher: Teacher | None = None) -> list[Tensor]:
    """Features as pictures, in the colours of their teacher where it has some.

    Otherwise the first three principal components over an image's patches are red, green and blue: patches of
    one colour have features that differ little, and what a colour stands for is another thing in each picture.

    Args:
        features: of patches alone, row by row.
        teacher: whose features they are, or are meant to be.

    Returns:
        uint8 `[3, rows, cols]` of each image, a pixel for each patch. A component that does not vary is black, and so
        are features that are not finite.
    """
    flat = features.features.float().cpu()
    # A head may predict several of the teacher's cells side by side.
    colours = teacher.colours(flat) if teacher is not None and flat.shape[1] == teacher.width else None
    parts = (flat if colours is None else colours).split([grid.num_tokens for grid in features.grids])
    shown = [_components(part) for part in parts] if colours is None else parts
    pictures = [(255 * part).round().to(torch.uint8) for part in shown]
    return [one.T.reshape(3, grid.rows, grid.cols) for one, grid in zip(pictures, features.grids, strict=True)]


def _components(features: Tensor) -> Tensor:
    """The first three components of features `[t, d]`, each from 0 to 1: `[t, 3]`."""
    if not features.isfinite().all():
        return torch.zeros(len(features), 3)
    centred = (features - features.mean(0)).double()
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)  # [k, d]
    axes = axes[:3]
    # An axis has no direction of its own: its largest number is taken as positive, so that pictures do not change.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    values = centred @ (axes * largest.sign()).T  # [patches, k]
    low, high = values.aminmax(dim=0)
    scale = features.norm(dim=1).max().double()
    varies = high - low > 1e-6 * scale  # below, there is nothing but rounding
    shown = torch.zeros(len(features), 3, dtype=torch.double)
    shown[:, : values.shape[1]] = torch.where(varies, (values - low) / (high - low).clamp(min=1e-12), 0.0)
    return shown
