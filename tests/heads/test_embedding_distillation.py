"""OLA-VLM's predictors and losses against published numbers, and what an image's predictor reads."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_vlm.checkpoints.published.ola_vlm import own_predictor_key
from lit_vlm.core.batch import Batch, Grid, Images, PixelSpec, VisualTokens
from lit_vlm.core.losses import contrastive_loss, smooth_l1_distance
from lit_vlm.data.sample.collate import make_rows
from lit_vlm.data.sample.encode import Sample
from lit_vlm.decoders import HFDecoder
from lit_vlm.embedders import Splice
from lit_vlm.heads import EmbeddingDistillation
from lit_vlm.heads.perceiver import Perceiver
from lit_vlm.model.vlm import VLM
from lit_vlm.teachers import Teacher
from tests.tiny import LLAMA, PHI3, ROOT, tiny_slots, tiny_vlm

FIXTURE = torch.load(ROOT / "tests" / "fixtures" / "ola_vlm.pt", weights_only=True)
RESAMPLERS, HEADS, LOSSES = FIXTURE["A_resamplers"], FIXTURE["B_heads"], FIXTURE["C_losses"]
TARGETS, WIDTH = 4, 24
TOKENS = {"gen": 2, "depth": 3, "seg": 1}


def perceiver_of(state: dict[str, Tensor], **sizes: Any) -> Perceiver:
    """A predictor with published weights; its widths are read from them."""
    own = {own_predictor_key(key): value for key, value in state.items()}
    width, in_width = own["proj_in.weight"].shape
    out_width = len(own["proj_out.weight"])
    latents = own.get("latents")
    if latents is not None:
        sizes["num_queries"] = latents.shape[1]
    made = Perceiver(in_width, out_width, width=width, own_queries=latents is not None, **sizes)
    made.load_state_dict(own)
    return made


@pytest.mark.parametrize("name", RESAMPLERS)
def test_predictors_agree_with_published_ones(name: str) -> None:
    case = RESAMPLERS[name]
    sizes = case["cfg"]
    predictor = perceiver_of(
        case["state_dict"],
        num_queries=sizes["num_queries"],
        num_layers=sizes["depth"],
        num_heads=sizes["heads"],
        head_dim=sizes["dim_head"],
        ffn_ratio=sizes["ff_mult"],
    )
    tokens = case["x"].clone().requires_grad_()
    queries = case["latents"].clone().requires_grad_() if "latents" in case else None
    out = predictor(tokens, queries)
    torch.testing.assert_close(out, case["y"], atol=1e-5, rtol=1e-5)
    if queries is not None:
        grads = torch.autograd.grad(out.square().sum(), (tokens, queries))
        torch.testing.assert_close(grads, (case["gx"], case["glat"]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in HEADS if name != "depth_inter"])
def test_heads_agree_with_published_ones(name: str) -> None:
    case = HEADS[name]
    expected = case["y"][0] if isinstance(case["y"], list) else case["y"]
    if expected.ndim == 4:  # a map, channels first
        expected = expected.flatten(2).transpose(1, 2)
    state = {key.removeprefix("projector."): value for key, value in case["state_dict"].items()}
    heads = case["state_dict"]["projector.layers.0.0.to_q.weight"].shape[0] // 8
    for head_dim in (8, 16, 32):
        heads = case["state_dict"]["projector.layers.0.0.to_q.weight"].shape[0] // head_dim
        predictor = perceiver_of(state, num_queries=expected.shape[1], num_heads=heads, head_dim=head_dim)
        out = predictor(case["x"], case.get("latents"))
        if torch.allclose(out, expected, atol=1e-5):
            return
    raise AssertionError(f"no split into heads gives the published output of {name}")


def losses_of(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Predictions, logarithm of the scale, smooth L1 and cross-entropy of each sample."""
    predictions = case["preds"].clone().requires_grad_()
    scale = torch.tensor(float(case["logit_scale"]), requires_grad=True)
    flat, targets = predictions.flatten(1), case["targets"].flatten(1)
    per_sample = contrastive_loss(flat[None, :, None], targets[:, None], scale)
    return predictions, scale, smooth_l1_distance(flat, targets), per_sample


@pytest.mark.parametrize("name", [name for name in LOSSES if "/" in name])
def test_losses_agree_with_published_ones(name: str) -> None:
    case = LOSSES[name]
    predictions, scale, distances, per_sample = losses_of(case)
    mask = case["mask"].float()
    torch.testing.assert_close(per_sample, case["per_sample_infonce"])
    # As published, samples without images stay anchors and only shrink the average: see docs/systems/ola_vlm.md.
    total = (distances * mask).mean() + 0.3 * mask.mean() * per_sample.mean()
    torch.testing.assert_close(total, case["total"].float())
    torch.testing.assert_close((distances * mask).mean(), case["sl1"].float())
    grads = torch.autograd.grad(total, (predictions, scale))
    torch.testing.assert_close(grads, (case["gpreds"], case["glogit_scale"]), atol=1e-6, rtol=1e-4)


def test_the_temperature_has_a_lower_bound() -> None:
    _, scale, _, per_sample = losses_of(LOSSES["clamp"])
    torch.testing.assert_close(per_sample, LOSSES["clamp"]["per_sample"], atol=1e-5, rtol=1e-5)
    assert torch.autograd.grad(per_sample.sum(), scale)[0] == 0


def test_probes_are_trained_with_smooth_l1_alone() -> None:
    case = LOSSES["probe_loss"]
    distance = smooth_l1_distance(case["preds"].flatten(1), case["targets"].flatten(1)).mean()
    torch.testing.assert_close(distance, case["loss"].float())


class Fixed(Teacher):
    """Targets that depend on the image alone."""

    width = WIDTH
    pixels = PixelSpec(28, 7, (0.5, 0.5, 0.5))

    def __call__(self, images: Images) -> VisualTokens:
        rows = [
            torch.randn(TARGETS, WIDTH, generator=torch.Generator().manual_seed(int(pixels.long().sum())))
            for pixels in images.pixels.view(len(images), -1)
        ]
        return VisualTokens(torch.cat(rows), (Grid(2, 2),) * len(images))

    def identity(self) -> str:
        return "fixed"


def head_with(**changes: Any) -> partial[EmbeddingDistillation]:
    """A head of two layers."""
    settings = {"teacher": Fixed, "layers": [1, 3], "num_targets": TARGETS, "tokens": "depth"} | changes
    return partial(EmbeddingDistillation, **settings)


def model_with(**changes: Any) -> VLM:
    """A tiny model with task tokens and one head."""
    return tiny_vlm(
        embedder=partial(Splice, task_tokens=TOKENS, pooled_from={"depth": 12}), heads={"depth": head_with(**changes)}
    )


FORMS: dict[str, dict[str, Any]] = {
    "parameters": {},
    "states": {"queries": "states", "tokens": "gen"},
    "own": {"queries": "own", "tokens": None},
    "before": {"text": "before"},
    "none": {"text": "none"},
    "no contrast": {"contrastive": 0.0},
}


def batch_with(model: VLM, shapes: list[list[list[int]]], packed: bool = False) -> Batch:
    """Samples of text lengths with an image between two of them; `[[3, 4], [5]]` has one image, then none."""
    generator = torch.Generator().manual_seed(0)
    side = model.encoder.pixels.size
    assert side is not None
    grid = model.grid_map(model.encoder.patch_grid(side, side))
    rows = []
    for row in shapes:
        samples = []
        for lengths in row:
            sample = Sample("", "", [], [])
            for index, length in enumerate(lengths):
                if index:
                    sample.image_starts.append(len(sample.ids))
                    sample.grids.append(grid)
                    sample.images.append(torch.randint(0, 256, (3, side, side), generator=generator).byte())
                    sample.ids += [0] * grid.num_tokens
                sample.ids += torch.randint(1, 200, (length,), generator=generator).tolist()
            sample.labels = list(sample.ids)
            sample.teacher_images = {"depth": sample.images} if sample.images else {}
            samples.append(sample)
        rows.append(samples)
    return make_rows(rows)


PADDED = [[[3, 4]], [[2, 1, 5]], [[6]], [[1, 9]]]
PACKED = [[[3, 4], [2, 1, 5]], [[6], [1, 9]]]


def head_of(model: VLM) -> EmbeddingDistillation:
    head = model.heads["depth"]
    assert isinstance(head, EmbeddingDistillation)
    return head


def read_by_hand(model: VLM, batch: Batch, states: dict[Any, Tensor]) -> Tensor:
    """Each image's tokens picked one by one, and a predictor that reads all that it gets."""
    head = head_of(model)
    starts = batch.image_positions.split([grid.num_tokens for grid in batch.image_grids])
    flat_ids = batch.segment_ids.flatten().tolist()
    length = batch.input_ids.shape[1]
    images = {int(p) for p in batch.image_positions}
    outputs = []
    for positions in starts:
        tokens = positions.tolist()
        patches, tasks = tokens[: -sum(TOKENS.values())], tokens[-sum(TOKENS.values()) :]
        group = dict(zip(TOKENS, (tasks[:2], tasks[2:5], tasks[5:]), strict=True)).get(head.tokens or "", tasks)
        row = tokens[0] // length
        text = [
            p for p in range(row * length, (row + 1) * length) if flat_ids[p] == flat_ids[tokens[0]] and p not in images
        ]
        text = {"all": text, "before": [p for p in text if p < tokens[0]], "none": []}[head.text]
        seen = torch.tensor(sorted([*patches, *group, *text]))
        per_layer = []
        for layer, predictor in zip(head.layers, head.predictors, strict=True):
            hidden = states[layer].flatten(0, 1)
            queries = None
            if head.queries == "parameters":
                queries = states[head.tokens][None]
            elif head.queries == "states":
                queries = hidden[group].mean(0)[None, None]
            per_layer.append(predictor(hidden[seen][None], queries)[0])
        outputs.append(torch.stack(per_layer))
    return torch.stack(outputs, dim=1)


def states_of(model: VLM, batch: Batch) -> dict[Any, Tensor]:
    """What the head reads."""
    output = model.decoder(model.embed(batch), batch.position_ids, [1, 2, 3], visual=batch.image_positions)
    return {**output.taps, **{name: model.embedder.task_parameters(name) for name in TOKENS}}


@pytest.mark.parametrize("shapes", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_an_image_is_read_with_its_own_tokens_and_the_text_of_its_sample(form: str, shapes: Any) -> None:
    model = model_with(**FORMS[form])
    batch = batch_with(model, shapes)
    states = states_of(model, batch)
    with torch.no_grad():
        own = head_of(model).predict(states, batch)
        torch.testing.assert_close(own, read_by_hand(model, batch, states), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_packing_changes_no_loss(form: str) -> None:
    model = model_with(**FORMS[form])
    losses = [model(batch_with(model, shapes), {"depth": 1.0})["depth"] for shapes in (PADDED, PACKED)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-5)


def test_the_loss_is_the_sum_over_images_and_layers_of_the_published_formula() -> None:
    model = model_with()
    batch = batch_with(model, PACKED)
    head = head_of(model)
    predictions = head.predict(states_of(model, batch), batch).detach()
    assert isinstance(head.teacher, Fixed)
    targets = head.teacher(batch.teacher_images["depth"]).features.view(-1, TARGETS, WIDTH)
    expected = torch.zeros(())
    for of_layer in predictions:
        expected = expected + F.smooth_l1_loss(of_layer, targets, reduction="none").mean((1, 2)).sum()
        cosines = F.normalize(of_layer.flatten(1)) @ F.normalize(targets.flatten(1)).T
        own = torch.arange(len(targets))
        expected = expected + 0.3 * F.cross_entropy(cosines * torch.tensor(2.0).exp(), own, reduction="sum")
    torch.testing.assert_close(model(batch, {"depth": 1.0})["depth"].detach(), expected)


def test_read_padding_makes_a_prediction_depend_on_the_other_rows() -> None:
    model = model_with(read_padding=True)
    alone, beside = batch_with(model, [[[3, 4]]]), batch_with(model, [[[3, 4]], [[40]]])
    with torch.no_grad():
        first, second = (head_of(model).predict(states_of(model, batch), batch) for batch in (alone, beside))
        assert (first - second).abs().max() > 1e-4
    model = model_with()
    with torch.no_grad():
        first, second = (head_of(model).predict(states_of(model, batch), batch) for batch in (alone, beside))
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("decoder", [LLAMA, PHI3], ids=["llama", "phi3"])
@pytest.mark.parametrize("queries", ["parameters", "states"])
def test_read_padding_reads_the_zeros_that_flash_attention_leaves(queries: str, decoder: dict[str, Any]) -> None:
    # Published: embeddings of padding are zeros, and flash attention hands on zeros there. So are all states, as no
    # layer of these decoders has a bias behind its attention.
    tokens = "gen" if queries == "states" else "depth"
    model = tiny_vlm(
        decoder=partial(HFDecoder, config=decoder, tokenizer="bytes"),
        embedder=partial(Splice, task_tokens=TOKENS, pooled_from={"depth": 12}),
        heads={"depth": head_with(queries=queries, tokens=tokens, read_padding=True)},
    )
    zeros = torch.zeros(1, 1, model.decoder.width)
    for block in model.decoder.blocks():
        assert not block.self_attn.o_proj(torch.zeros(1, 1, block.self_attn.o_proj.in_features)).any()
        assert not block.mlp(block.post_attention_layernorm(zeros)).any()
    head, batch = head_of(model), batch_with(model, [[[3, 4]], [[6, 30]]])
    suffix = sum(TOKENS.values())
    place = model.embedder.task_tokens[tokens]
    with torch.no_grad():
        states = states_of(model, batch)
        found = head.predict(states, batch)
        for row, before in enumerate([3, 6]):
            end = before + 16 + suffix  # of the image's tokens and the task tokens
            own = slice(end - suffix + place.start, end - suffix + place.stop)
            real = batch.segment_ids[row] != 0
            padding = zeros.expand(1, int((~real).sum()), -1)
            assert bool(padding.numel()) == (row == 0)
            for layer, predictor, given in zip(head.layers, head.predictors, found[:, row], strict=True):
                hidden = states[layer][row, real][None]
                read = torch.cat([hidden[:, : end - suffix], hidden[:, own], hidden[:, end:], padding], dim=1)
                asked = states[tokens][None] if queries == "parameters" else hidden[:, own].mean(1, keepdim=True)
                torch.testing.assert_close(given, predictor(read, asked)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_images_uses_every_parameter_with_weight_zero(form: str) -> None:
    model = model_with(**FORMS[form])
    model.requires_grad_(True)
    loss = model(batch_with(model, [[[7]]]), {"depth": 1.0})["depth"]
    loss.backward()
    assert loss.item() == 0
    for part in (model.embedder, model.heads, model.projector):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_gradients_reach_task_tokens_projector_and_all_of_the_head() -> None:
    model = model_with()
    model.requires_grad_(True)
    model.decoder.requires_grad_(False)
    model(batch_with(model, PADDED), {"depth": 1.0})["depth"].backward()
    for part in (model.projector, model.heads):
        assert all(p.grad is not None and p.grad.any() for p in part.parameters())
    grads = {name: p.grad for name, p in model.embedder.named_parameters()}
    assert all(grad is not None and grad.any() for grad in grads.values())


WRONG = {
    "choose from 1 to 3": {"layers": [0]},
    "choose from 1 to": {"layers": []},
    "queries own with tokens depth": {"queries": "own"},
    "queries parameters with tokens None": {"tokens": None},
    "heads.depth: it reads the task tokens 'pose', model.embedder has": {"tokens": "pose"},
    "read_padding goes with text: all": {"read_padding": True, "text": "none"},
}


@pytest.mark.parametrize("message", WRONG)
def test_settings_that_do_not_fit_say_so(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_with(**WRONG[message])


def test_a_teacher_of_another_number_of_features_says_so() -> None:
    model = model_with(num_targets=9)
    with pytest.raises(ValueError, match="the teacher gives \\[4\\] features of an image, num_targets is 9"):
        model(batch_with(model, PADDED), {"depth": 1.0})


def test_heads_that_read_no_task_tokens_work_without_them() -> None:
    slots = tiny_slots(heads={"depth": head_with(queries="own", tokens=None)})
    model = tiny_vlm(heads=slots.heads)
    assert model(batch_with(model, PADDED), {"depth": 1.0})["depth"].isfinite()
