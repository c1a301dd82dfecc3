"""Learning rates that fall with a block's distance from the end of a part."""

from __future__ import annotations

from lit_vlm.core.part import Part


def layer_scales(part: Part, decay: float) -> dict[int, float]:
    """The factor of each parameter's learning rate: `decay` to the power of its distance from the end of the part.

    Of l blocks, as built, the last has `decay`, the first decay^l, and what comes before it, such as the embeddings,
    decay^(l + 1); what comes after the last, such as a norm, has 1. These are the exponents of the code that fine-tunes
    BEiT (Bao et al. 2021, arXiv 2106.08254). What stands between two blocks goes with the one before it. The order is
    that in which modules are registered; a block's adapters are in the block. A part that is made of other parts, such
    as an ensemble of encoders, has the distances of each; those of them without blocks have 1.

    Args:
        part: sharded or not.
        decay: above 0, at most 1.

    Returns:
        id of a parameter → factor. Parameters that are not in it have 1.

    Raises:
        ValueError: for a part without blocks, or one with blocks both of its own and in parts inside of it.
    """
    inner = [one for one in part.modules() if one is not part and isinstance(one, Part) and list(one.blocks())]
    own, inside = list(part.blocks()), {id(block) for one in inner for block in one.modules()}
    if inner and any(id(block) not in inside for block in own):
        raise ValueError(
            f"{type(part).__name__} has blocks of its own and parts with blocks in it: which of them come first is "
            "not known, so their learning rates cannot fall from one to the next"
        )
    if inner:
        found: dict[int, float] = {}
        for member in inner:  # from the outside in, and what is inside of a part was found with it
            found = layer_scales(member, decay) | found
        return found
    blocks = list(part.blocks())
    if not blocks:
        raise ValueError(f"{type(part).__name__} has no blocks() whose learning rates could differ")
    place = {id(p): index for index, block in enumerate(blocks, start=1) for p in block.parameters()}
    scales: dict[int, float] = {}
    order = [id(parameter) for parameter in part.parameters()]
    last = max((index for index, one in enumerate(order) if one in place), default=-1)
    current = 0
    for index, one in enumerate(order):
        current = len(blocks) + 1 if index > last else place.get(one, current)
        scales[one] = decay ** (len(blocks) + 1 - current)
    return scales
