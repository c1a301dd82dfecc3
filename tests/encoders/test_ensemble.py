"""Several encoders side by side, and the projector that takes their tokens apart."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lit_vlm.core.batch import Grid, Images, VisualTokens
from lit_vlm.encoders import Ensemble, HFEncoder, OneFormerSwin
from lit_vlm.model.build import build
from lit_vlm.projectors import MLP, PerEncoder
from tests.encoders.test_teachers import MADE, SWIN
from tests.tiny import CLIP, batch_of, tiny_slots

FIRST = partial(HFEncoder, config=CLIP)
MEMBERS = [FIRST, MADE["gen"], MADE["depth"], MADE["seg"]]
WIDTHS = [32, 24, 32, 64]


def pictures() -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images.pack(list(torch.randint(0, 256, (3, 3, 28, 28), generator=generator).byte()))


def test_channels_hold_what_every_encoder_sees_at_a_patch() -> None:
    ensemble = Ensemble(MEMBERS).eval()
    images = pictures()
    tokens = ensemble(images)
    assert ensemble.width == sum(WIDTHS)
    assert tokens.grids == (Grid(4, 4),) * 3
    clip, gen, depth, seg = tokens.features.split(WIDTHS, dim=1)
    members = ensemble.parts
    torch.testing.assert_close(clip, members[0](images).features)
    torch.testing.assert_close(gen, members[1](images).features.repeat_interleave(16, 0))
    torch.testing.assert_close(depth, members[2](images).features)
    larger = F.interpolate(images.pixels.view(3, 3, 28, 28).float(), (64, 64), mode="bicubic", antialias=True)
    maps = members[3](Images.pack(list(larger.round().clamp(0, 255).byte()))).features.view(3, 2, 2, -1)
    spread = F.interpolate(maps.permute(0, 3, 1, 2), (4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(seg, spread.permute(0, 2, 3, 1).reshape(48, -1), atol=1e-5, rtol=1e-4)


def test_tokens_of_further_encoders_follow_the_patches_each_with_its_own_mlp() -> None:
    ensemble = Ensemble(MEMBERS, "tokens", summary=2).eval()
    images = pictures()
    tokens = ensemble(images)
    assert ensemble.width == max(WIDTHS)
    assert tokens.grids == (Grid(4, 4, suffix=6),) * 3
    projector = PerEncoder(ensemble.width, 16, WIDTHS)
    out = projector(tokens).features.view(3, 22, 16)
    members = ensemble.parts
    clip = projector.members[0](members[0](images).features).view(3, 16, 16)
    torch.testing.assert_close(out[:, :16], clip, atol=1e-5, rtol=1e-4)
    gen = projector.members[1](members[1](images).features)
    torch.testing.assert_close(out[:, 16:18], gen[:, None].expand(-1, 2, -1), atol=1e-5, rtol=1e-4)
    depth = members[2](images).features.view(3, 2, 8, -1).mean(2)
    torch.testing.assert_close(out[:, 18:20], projector.members[2](depth), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fuse", ["channels", "tokens"])
def test_in_a_model_all_positions_agree_and_gradients_reach_the_projector(fuse: str) -> None:
    projector = MLP if fuse == "channels" else partial(PerEncoder, widths=WIDTHS)
    model = build(tiny_slots(encoder=partial(Ensemble, MEMBERS, fuse, 4), projector=projector))
    model.encoder.requires_grad_(False)
    model(batch_of(model), {"next_token": 1.0})["next_token"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.projector.parameters())


def test_what_does_not_fit_says_so() -> None:
    with pytest.raises(ValueError, match="Ensemble needs two encoders"):
        Ensemble([FIRST])
    with pytest.raises(ValueError, match="first encoder must give patches only"):
        Ensemble([partial(HFEncoder, config=CLIP, cls=True), FIRST])
    with pytest.raises(ValueError, match="whose widest is 64"):
        PerEncoder(64, 16, [32, 24])
    with pytest.raises(ValueError, match="0 tokens behind the patches for 1 further"):
        PerEncoder(32, 16, [32, 24])(VisualTokens(torch.zeros(4, 32), (Grid(2, 2),)))
    with pytest.raises(ValueError, match="16 tokens of an encoder do not divide into summary 3"):
        Ensemble([FIRST, MADE["depth"]], "tokens", 3)(pictures())


def test_members_and_their_picture_sizes_are_part_of_its_identity() -> None:
    plain = Ensemble(MEMBERS).identity()
    assert plain == Ensemble(MEMBERS).identity()
    larger = partial(HFEncoder, config=CLIP | {"image_size": 56})
    assert plain != Ensemble([FIRST, *MEMBERS[2:]]).identity()
    assert FIRST().identity() != larger().identity()
    # The same weights on other pictures.
    seg = partial(OneFormerSwin, None, SWIN, input_size=None)
    assert seg(image_size=64).identity() != seg(image_size=96).identity()
    assert (
        Ensemble([FIRST, partial(seg, image_size=64)]).identity()
        != Ensemble([FIRST, partial(seg, image_size=96)]).identity()
    )


def test_pictures_that_the_first_encoder_does_not_take_are_refused() -> None:
    for size in ((28, 21), (56, 28)):
        with pytest.raises(
            ValueError, match=rf"Ensemble takes images of 28 × 28 pixels, found \[\({size[0]}, {size[1]}\)\]"
        ):
            Ensemble([FIRST, FIRST])(Images.pack([torch.zeros(3, *size, dtype=torch.uint8)]))
