"""Shipped configurations: they have the published numbers of parameters, and every recipe is built from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig

from lit_vlm.checkpoints.weights import by_slot
from lit_vlm.commands.cli import lightning_cli
from lit_vlm.commands.recipe import Recipe, find_recipe, shipped_recipes
from lit_vlm.core.part import Part, meta_parameters
from lit_vlm.core.pretrained import resolve
from lit_vlm.core.tokenizers import load_tokenizer
from lit_vlm.data import ChatML, Fuyu, Llama3, Phi3, Plain, VicunaV1
from lit_vlm.data.sample.spelling import spelling_of
from lit_vlm.decoders import HFDecoder
from lit_vlm.encoders import CLIPEmbedding, DepthAnything, HFEncoder, OneFormerSwin, TimmEncoder
from lit_vlm.model.build import build_on_meta, check_saved
from lit_vlm.planning.published import FOLDER, shipped, shipped_names
from tests.tiny import ROOT

OWN_DATA = ("quickstart",)
OWN_SCALES = ("mini", "smol", "tiny", "tiny_deep")


def published_stages() -> list[tuple[str, str | None, str]]:
    """Recipe, scale and stage of everything whose parts and data are published."""
    return [
        (recipe.name, scale, stage)
        for recipe in (find_recipe(name) for name in shipped_recipes() if name not in OWN_DATA)
        for scale in published_scales(recipe)
        for stage in recipe.stages
    ]


def published_scales(recipe: Recipe) -> list[str]:
    return [scale for scale in recipe.scales if scale not in OWN_SCALES]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, and nothing in its cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


NORM = 2 * 1024
SIGLIP_HEAD = 1152 + 4 * (1152**2 + 1152) + 2 * 1152 + 2 * 1152 * 4304 + 4304 + 1152
"""A probe, its attention, a norm and two linear layers."""
POSITIONS = (1370 - 577) * 1024
COUNTS: list[tuple[str, Callable[[], Part], float, int]] = [
    ("lmsys/vicuna-7b-v1.5", lambda: HFDecoder("lmsys/vicuna-7b-v1.5"), 6_738_415_616, 0),
    ("lmsys/vicuna-13b-v1.5", lambda: HFDecoder("lmsys/vicuna-13b-v1.5"), 13_015_864_320, 0),
    ("meta-llama/Llama-2-7b-hf", lambda: HFDecoder("meta-llama/Llama-2-7b-hf"), 6_738_415_616, 0),
    ("meta-llama/Llama-2-13b-hf", lambda: HFDecoder("meta-llama/Llama-2-13b-hf"), 13_015_864_320, 0),
    ("meta-llama/Meta-Llama-3-8B-Instruct", lambda: HFDecoder("meta-llama/Meta-Llama-3-8B-Instruct"), 8_030_261_248, 0),
    ("princeton-nlp/Sheared-LLaMA-2.7B", lambda: HFDecoder("princeton-nlp/Sheared-LLaMA-2.7B"), 2_701_560_320, 0),
    ("microsoft/Phi-3-mini-4k-instruct", lambda: HFDecoder("microsoft/Phi-3-mini-4k-instruct"), 3_821_079_552, 0),
    ("Qwen/Qwen2.5-7B-Instruct", lambda: HFDecoder("Qwen/Qwen2.5-7B-Instruct"), 7_615_616_512, 0),
    ("internlm/internlm2-chat-1_8b", lambda: HFDecoder("internlm/internlm2-chat-1_8b"), 1_889_110_016, 0),
    # The norm behind the last block is not built.
    ("openai/clip-vit-large-patch14", lambda: HFEncoder("openai/clip-vit-large-patch14", layer=-1), 303_179_776, NORM),
    ("openai/clip-vit-large-patch14-336", lambda: HFEncoder("openai/clip-vit-large-patch14-336", layer=-1),
     303_507_456, NORM),
    ("google/siglip-so400m-patch14-384", lambda: HFEncoder("google/siglip-so400m-patch14-384", layer=-1),
     428_225_600, 2 * 1152 + SIGLIP_HEAD),
    ("facebook/dinov2-large", lambda: HFEncoder("facebook/dinov2-large", layer=-1), 304_368_640, NORM),
    # DINOv2-L with positions for 336 instead of 518 pixels.
    ("depth-anything/Depth-Anything-V2-Large-hf", DepthAnything, 304_368_640, POSITIONS),
    ("stabilityai/stable-diffusion-2-1-unclip", CLIPEmbedding, 632_076_800, 0),
]  # fmt: skip
"""Hub name, the part that is built from it, the published number of parameters, and how many of them are not built."""


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("make", "published", "left_out"), [c[1:] for c in COUNTS], ids=[c[0] for c in COUNTS])
def test_parts_have_the_published_number_of_parameters(make: Callable[[], Part], published: int, left_out: int) -> None:
    with shipped(), meta_parameters():
        assert count(make()) == published - left_out


@pytest.mark.parametrize(
    ("make", "published"),
    [
        (lambda: HFEncoder("OpenGVLab/InternVL3-1B-hf", layer=-1), 304.01e6),  # card of InternViT-300M-448px
        (OneFormerSwin, 196.74e6 - 1000 * 1537),  # timm's table: Swin-L with windows of 12, without its classifier
        # timm's table: ConvNeXt-XXL, without norm, projection and the norm of features
        (lambda: TimmEncoder("convnext_xxlarge.clip_laion2b_soup", image_size=768), 846.47e6 - 3072 * 1024 - 2 * 3072),
    ],
    ids=["InternViT", "Swin-L", "ConvNeXt-XXL"],
)
def test_parts_have_the_published_millions_of_parameters(make: Callable[[], Part], published: float) -> None:
    with shipped(), meta_parameters():
        assert count(make()) == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("depth-anything/Depth-Anything-V2-Large-hf", 335_315_649),
        ("shi-labs/oneformer_coco_swin_large", pytest.approx(219e6, rel=2e-3)),
        ("OpenGVLab/InternVL3-1B-hf", pytest.approx(938e6, rel=1e-3)),
        ("adept/fuyu-8b", pytest.approx(9.41e9, rel=1e-3)),
    ],
)
def test_whole_models_have_the_published_number_of_parameters(name: str, published: float) -> None:
    with shipped(), meta_parameters():
        config = AutoConfig.from_pretrained(resolve(name, weights=False))
        (kind,) = config.architectures
        assert count(getattr(transformers, kind)(config)) == published


def test_every_shipped_name_is_checked_and_in_the_table() -> None:
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    whole = {"adept/fuyu-8b", "shi-labs/oneformer_coco_swin_large", "OpenGVLab/InternVL3-1B-hf"}
    checked = {name for name, *_ in COUNTS} | whole
    assert set(shipped_names()) == checked
    assert [name for name in shipped_names() if f"| `{name}` |" not in table] == []


@pytest.mark.slow
@pytest.mark.published
@pytest.mark.parametrize(("recipe", "scale", "stage"), published_stages())
def test_every_published_stage_is_built_without_a_network(
    recipe: str, scale: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for path in find_recipe(recipe).configs(stage, scale, "single") for word in ("--config", str(path))]
    words += ["--data.train", '[{"class_path": "lit_vlm.worlds.Shapes", "init_args": {"count": 4}}]']
    cli = lightning_cli([*words, "--trainer.logger", "false", "--trainer.accelerator", "cpu"], run=False)
    with shipped():
        model = build_on_meta(cli.model.slots)
        tokenizer = model.decoder.tokenizer
    cli.model.stage.freeze(model)
    assert count(model) > 1e9
    assert all(parameter.is_meta for parameter in model.parameters())
    marks = cli.datamodule.template.marks(tokenizer.eos_token)
    assert [mark for mark in marks if spelling_of(tokenizer).single(mark) is None] == []


def test_there_are_published_stages() -> None:
    named = {recipe for recipe, _, _ in published_stages()}
    assert named == set(shipped_recipes()) - set(OWN_DATA)
    assert len(published_stages()) >= 40


def test_a_name_without_a_configuration_is_refused() -> None:
    with shipped(), pytest.raises(ValueError, match="my-lab/own-7b neither ships .*--model.decoder.init_args.name FOL"):
        HFDecoder("my-lab/own-7b", tokenizer="bytes")


def test_weights_are_looked_for_as_always() -> None:
    refused = "lmsys/vicuna-7b-v1.5 cannot be fetched from the hub: HF_HUB_OFFLINE is set"
    with shipped():
        assert Path(resolve("lmsys/vicuna-7b-v1.5", weights=False)).is_dir()
        with pytest.raises(ValueError, match=refused):
            resolve("lmsys/vicuna-7b-v1.5")
    with pytest.raises(ValueError, match=refused):
        resolve("lmsys/vicuna-7b-v1.5", weights=False)


def test_what_the_hub_cache_holds_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "cache" / "models--my-lab--own" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1")
    tiny = ROOT / "tests" / "fixtures" / "tiny_llama"
    for file in tiny.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    with shipped():
        assert resolve("my-lab/own", weights=False) == "my-lab/own"
        assert len(load_tokenizer("my-lab/own")) == len(load_tokenizer(str(tiny)))


def test_a_tokenizer_that_is_not_here_is_replaced_by_one_that_knows_all_marks() -> None:
    with shipped():
        tokenizer = load_tokenizer("meta-llama/Meta-Llama-3-8B-Instruct")
    assert len(tokenizer("four").input_ids) == 4
    assert tokenizer.pad_token_id is not None
    for template in (ChatML(), Fuyu(), Llama3(), Phi3(), Plain(), VicunaV1()):
        assert None not in [spelling_of(tokenizer).single(mark) for mark in template.marks(tokenizer.eos_token)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name != "quickstart"])
def test_each_stage_takes_what_the_one_before_leaves(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = find_recipe(name)
    stages = recipe.stages_for(recipe.scale)
    left: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for stage in stages:
        files = recipe.configs(stage, recipe.scale, "single")
        words = [word for path in files for word in ("--config", str(path))]
        words += ["--data.train", '[{"class_path": "lit_vlm.worlds.Shapes", "init_args": {"count": 4}}]']
        cli = lightning_cli([*words, "--trainer.logger", "false", "--trainer.accelerator", "cpu"], run=False)
        settings = cli.model.stage
        with shipped():
            model = build_on_meta(cli.model.slots)
        if before := recipe.start_of(stage, stages):
            check_saved(model, cli.model.slots, left[before], settings.fresh, before)
        states = by_slot(model.state_dict())
        left[stage] = {slot: state for slot, state in states.items() if slot not in settings.leave_out}
    assert len(left) == len(stages)
