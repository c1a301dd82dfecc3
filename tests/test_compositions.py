"""Parts that do not go together: one line that names the slot, the setting and the way out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lit_vlm.commands.cli import main
from lit_vlm.commands.recipe import find_recipe

GPT2 = "{model_type: gpt2, n_embd: 64, n_layer: 3, n_head: 4}"
GEMMA = (
    "{model_type: gemma2, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 3, num_attention_heads: 4, "
    "num_key_value_heads: 2, head_dim: 16}"
)
CLIP = (
    "{model_type: clip_vision_model, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 3, "
    "num_attention_heads: 3, image_size: 28, patch_size: 7}"
)
DINO = (
    "{model_type: dinov2, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, image_size: 28, patch_size: 7}"
)
DECODER, EMBEDDER, ENCODER = (f"--model.{slot}.init_args" for slot in ("decoder", "embedder", "encoder"))
HOLISTIC = [
    "--model.embedder", "Holistic", f"{EMBEDDER}.num_layers", "2", f"{EMBEDDER}.num_heads", "4",
    f"{EMBEDDER}.num_kv_heads", "2", f"{EMBEDDER}.ffn_width", "128",
]  # fmt: skip
DEPTH = "--model.heads.depth.init_args"
LLAVA, HOVLE, EVE, OLA = ("llava15", "1_align"), ("hovle", "3_sft"), ("eve", "2_pretrain"), ("ola_vlm", "1_pretrain")
HOVLE_HD = ("hovle_hd", "3_sft")

WRONG: dict[str, tuple[tuple[str, str], list[str], str]] = {
    "a decoder of other layers under Holistic": (
        LLAVA,
        [f"{DECODER}.config", GPT2, *HOLISTIC],
        "layers of a 'gpt2' are not Llama's .*init_args.start to random",
    ),
    "a split decoder under Holistic": (
        HOVLE,
        ["--model.decoder", "DivideAndConquer"],
        "layers of a 'DivideAndConquer' are not Llama's",
    ),
    "an attention that the family lacks": (
        LLAVA,
        [f"{DECODER}.config", GEMMA],
        "a 'gemma2' does not have .*model.decoder.init_args.attention to one of eager",
    ),
    "an attention that is not installed": (
        LLAVA,
        [f"{DECODER}.attention", "flash_attention_2"],
        "package that is not here .*attention to sdpa or eager",
    ),
    "images that see all of themselves, by an attention without masks": (
        LLAVA,
        [f"{DECODER}.image_attention", "bidirectional", f"{DECODER}.attention", "flex_attention"],
        "image_attention is bidirectional, and attention flex_attention takes no mask .*attention to sdpa or eager",
    ),
    "the same for an embedder": (
        HOVLE,
        [f"{EMBEDDER}.attention", "flash_attention_2"],
        "set model.embedder.init_args.attention to sdpa",
    ),
    "no language model": (LLAVA, [f"{DECODER}.config", "{model_type: vit}"], "model.decoder: a 'vit' is no causal"),
    "no model at all": (LLAVA, [f"{DECODER}.config", "{model_type: lama}"], "model_type 'lama' is none that"),
    "heads that do not divide": (
        LLAVA,
        [f"{ENCODER}.config", CLIP],
        "HFEncoder: config of .* not a multiple of the number",
    ),
    "adapters on layers that are not there": (
        LLAVA,
        [f"{DECODER}.config", GPT2, "--model.lora.decoder", "{rank: 2, targets: [q_proj, c_fc]}"],
        "model.lora.decoder: HFDecoder .gpt2. has no layers q_proj: set its targets to some of c_attn, c_fc",
    ),
    "adapters by a decoder's earlier argument on layers that are not there": (
        LLAVA,
        [f"{DECODER}.lora", "{targets: [c_fc]}"],
        "model.decoder.init_args.lora: HFDecoder .llama. has no layers c_fc: set its targets to some of down_proj",
    ),
    "adapters twice": (
        LLAVA,
        [f"{DECODER}.lora", "{rank: 2}", "--model.lora.decoder", "{rank: 2}"],
        "model.lora.decoder and model.decoder.init_args.lora both ask for adapters: set the second to null",
    ),
    "adapters on a part without linear layers": (
        LLAVA,
        ["--model.lora.embedder", "{rank: 2}"],
        "model.lora.embedder: adapters go on linear layers, and it has no such layers in Splice: set",
    ),
    "adapters of a slot that has none": (
        LLAVA,
        ["--model.lora.heads", "{rank: 2}"],
        "there is no flag --model.lora.heads .*model.lora.encoder",
    ),
    "a name and a config": (LLAVA, [f"{DECODER}.name", "x/y"], "either a name or a config .with name: null."),
    "a resampler over tiles": (
        HOVLE,
        ["--model.projector", "Resampler"],
        "keeps each patch .MLP, Linear., not Resampler",
    ),
    "a resampler under a merging embedder": (
        HOVLE_HD,
        ["--model.projector", "Resampler"],
        "merge 2 needs .* not 1 × 64: take a projector that leaves patches",
    ),
    "a fold over a CLS token": (
        LLAVA,
        ["--model.projector", "Downsample", f"{ENCODER}.cls", "true"],
        "gives 1 before.*set the encoder's cls to false",
    ),
    "a square for an encoder of any size": (
        EVE,
        ["--data.transform", "PadSquare"],
        "data.transform PadSquare .* this one takes any: use Native, or AspectGrid",
    ),
    "any size for an encoder of one": (
        LLAVA,
        ["--data.transform", "Native"],
        "takes images of 28 × 28 .*data.transform SquareCrop, PadSquare or Resize",
    ),
    "any size for tiles of one": (HOVLE, ["--data.transform", "Native"], "ConvPatches takes images of 28 × 28 .*Tiles"),
    "any size for a teacher of one": (
        EVE,
        ["--data.transform", "Native"],
        "model.heads.align: the teacher takes pictures of 28 × 28 .*take AspectGrid",
    ),
    "a head that aligns patches over a resampler": (
        EVE,
        ["--model.projector", "Resampler"],
        "model.heads.align: PatchAlignment .*projector that leaves patches where",
    ),
    "a teacher with a config and its default name": (
        OLA,
        [f"{DEPTH}.teacher", "DINOv2", f"{DEPTH}.teacher.init_args.config", DINO],
        "model.heads.depth: give teacher DINOv2 either a name or a config .with name: null.",
    ),
    "a teacher of another grid": (
        OLA,
        [
            f"{DEPTH}.teacher",
            "DINOv2",
            f"{DEPTH}.teacher.init_args.config",
            DINO,
            f"{DEPTH}.teacher.init_args.name",
            "null",
        ],
        r"model.heads.depth: .*gives \[576\] features of an image, num_targets is 16",
    ),
    "task tokens of an embedder without them": (
        OLA,
        ["--model.embedder", "Holistic"],
        r"heads.depth: .*has none \(Holistic\): set task_tokens of an embedder Splice",
    ),
    "layers that the decoder lacks": (OLA, [f"{DEPTH}.layers", "[8, 20]"], "model.heads.depth: .*choose from 1 to 4"),
    "a group that the part lacks": (
        HOVLE,
        ["--model.stage.only", "{decoder: vision}", "--model.stage.train.decoder", "1e-3"],
        "HFDecoder has no such group: set model.stage.only.decoder to null",
    ),
    "no end": (
        LLAVA,
        ["--trainer.max_epochs", "-1", "--trainer.max_steps", "-1"],
        "set trainer.max_steps or trainer.max_epochs",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together_is_one_line_with_the_way_out(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe, stage), flags, message = WRONG[name]
    words = [word for path in find_recipe(recipe).configs(stage, "tiny", "single") for word in ("--config", str(path))]
    quick = ["--trainer.limit_val_batches", "0", "--trainer.logger", "false", "--trainer.accelerator", "cpu",
             "--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false"]  # fmt: skip
    with pytest.raises(SystemExit):
        main(["fit", *words, *quick, *flags, "--trainer.default_root_dir", str(tmp_path)])
    lines = capsys.readouterr().err.splitlines()
    (error,) = (line for line in lines if line.startswith("error: "))
    assert re.search(message, error)
