"""Set-ups that cannot train are named by --dry-run: the slot or key, what is wrong, and the way out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from lit_vlm.commands.cli import main
from lit_vlm.commands.recipe import find_recipe, shipped_recipes
from lit_vlm.teachers import EncoderTeacher, Teacher
from tests.runs import lit_vlm
from tests.tiny import ROOT

OTHER_RUN = ROOT / "tests" / "fixtures" / "run_93c4961" / "1_align"
WRONG = "tests.commands.wrong_parts"


class Case(NamedTuple):
    """A set-up that cannot train.

    Attributes:
        flags: of `lit-vlm run llava15 --scale tiny`.
        said: what is said of it, in order.
        stages: which are checked.
        recipe: which.
    """

    flags: Sequence[str]
    said: Sequence[str]
    stages: str = "1_align"
    recipe: str = "llava15"


FILES = ["--data.train", "[{class_path: LlavaJson, init_args: {path: data.json, image_folder: images}}]"]
HEAD = "--model.heads.extra"
ANY_SIZE = ["--data.transform", "Native", "--data.transform.longest", "56"]
CASES = {
    # Parts that do not fit each other.
    "width of a projector": Case(
        ["--model.projector", f"{WRONG}.WideProjector"],
        ["model.projector (WideProjector) gives tokens of width 32", "takes 64", "second argument of its constructor"],
    ),
    "projector that reads another width": Case(
        ["--model.projector", f"{WRONG}.CrossedProjector"],
        ["model.projector (CrossedProjector) fails on features", "built for the encoder's width, 32"],
    ),
    "grid map of a projector": Case(
        ["--model.projector", f"{WRONG}.HalvingProjector"],
        ["model.projector (HalvingProjector) gives the layouts", "its grid_map says", "make the two the same"],
    ),
    "width of an encoder": Case(
        ["--model.encoder", f"{WRONG}.ShyEncoder", *ANY_SIZE],
        ["model.encoder (ShyEncoder) gives features of width 16", "its attribute width says 24"],
    ),
    "grid of an encoder": Case(
        ["--model.encoder", f"{WRONG}.MisplacedEncoder", *ANY_SIZE],
        ["model.encoder (MisplacedEncoder) gives the layouts", "its patch_grid says"],
    ),
    "length of an embedder": Case(
        ["--model.embedder", f"{WRONG}.ShortEmbedder"],
        ["model.embedder (ShortEmbedder) gives vectors", "model.decoder takes"],
    ),
    "loss of a head": Case(
        [HEAD, f"{WRONG}.ListingHead", "--model.stage.losses.extra", "1"],
        ["model.heads.extra", "ListingHead.loss returned", "must return a sum"],
    ),
    "matrix of a head": Case(
        [HEAD, f"{WRONG}.CrossedHead", "--model.stage.losses.extra", "1"],
        ["model.heads.extra (CrossedHead) fails on", "RuntimeError"],
    ),
    "head on a layer that is not there": Case(
        [HEAD, "FeatureDistillation", f"{HEAD}.layer", "7", f"{HEAD}.teacher", "lit_vlm.teachers.HFVision",
         f"{HEAD}.teacher.config", "{model_type: clip_vision_model, image_size: 28, patch_size: 7, hidden_size: 32}"],
        ["model.heads.extra", "layer 7", "3"],
    ),
    "task tokens that a head does not find": Case(
        ["--model.heads.depth.tokens", "other"], ["heads.depth", "other"], "1_pretrain", "ola_vlm"
    ),
    "odd patches under a fold of tiles": Case(
        ["--model.projector", "Downsample", "--model.encoder.config.image_size", "35", "--data.transform", "Tiles"],
        ["data.transform makes tiles of 5 × 5 patches", "even number of patches"],
    ),
    "pictures that an encoder refuses": Case(
        ANY_SIZE, ["model.encoder (HFEncoder) fails on pictures of", "choose a data.transform"]
    ),
    "decoder without its kind": Case(
        ["--model.decoder.config", "{model_type: lama, hidden_size: 64}"],
        ["model.decoder: config.model_type 'lama'", "none that transformers knows"],
    ),
    # Weights.
    "weights of another model": Case(
        ["--model.stage.start_from", str(OTHER_RUN)],
        [f"model.stage.start_from {OTHER_RUN}", "do not fit the slot 'encoder'", "instead of", "model.stage.fresh"],
    ),
    "slot that was swapped between stages": Case(
        ["--2_sft.model.projector", "Linear"],
        ["what 1_align will leave", "do not fit the slot 'projector' (Linear)", "add 'projector' to model.stage.fresh"],
        "1_align,2_sft",
    ),
    "run that is not there": Case(
        ["--model.stage.start_from", "runs/gone"], ["there is no complete checkpoint in runs/gone/checkpoints"]
    ),
    "family that nobody knows": Case(
        ["--model.stage.start_from", "lava:somewhere"],
        ["model.stage.start_from: family: there is no 'lava'", "llava-hf"],
    ),
    "weights of a decoder": Case(
        ["--model.decoder.name", "./gone", "--model.decoder.config", "null"], ["there are no weights at gone"]
    ),
    "weights of a teacher": Case(
        [HEAD, "FeatureDistillation", f"{HEAD}.layer", "2", f"{HEAD}.teacher", "lit_vlm.teachers.HFVision",
         f"{HEAD}.teacher.name", "./gone", "--model.stage.losses.extra", "1"],
        ["model.heads.extra", "there are no weights at gone"],
    ),
    # Data.
    "folder of pictures": Case(
        FILES,
        ["data.train", "source 'data' (LlavaJson data.json) none of the records can be used, of 3", "missing_image",
         "does not exist", "Set image_folder"],
    ),
    "file of data": Case(
        ["--data.train", "[{class_path: LlavaJson, init_args: {path: gone.json}}]"], ["LlavaJson: gone.json does not"]
    ),
    "file of another form": Case(
        ["--data.train", "[{class_path: ChatJsonl, init_args: {path: data.json}}]"],
        ["data.train", "source 'data' (ChatJsonl data.json)", "malformed", "lit-vlm parts sources"],
    ),
    "source without samples": Case(
        ["--data.train", "[{class_path: Shapes, init_args: {count: 0}}]"], ["data.train", "holds no sample"]
    ),
    "records that are all too long": Case(
        ["--data.max_length", "6", "--data.too_long", "drop"],
        ["data.train", "too_long", "max_length is 6", "Set data.max_length larger"],
    ),
    "maps that no picture carries": Case(
        [HEAD, "FeatureDistillation", f"{HEAD}.layer", "2", f"{HEAD}.teacher", "lit_vlm.teachers.KnownMap",
         f"{HEAD}.teacher.name", "depth", "--model.stage.losses.extra", "1"],
        ["the head 'extra' reads the map 'depth'", "--model.heads.extra null"],
    ),
    "prepared features": Case(
        ["--data.prepared.encoder", "gone"], ["gone holds no prepared features", "lit-vlm prepare targets"]
    ),
    "marks that the tokenizer lacks": Case(
        ["--data.template", "Llama3"], ["data.template Llama3 writes", "as one token each", "new_tokens"]
    ),
    # Stage.
    "slot that is none": Case(["--model.stage.train.projektor", "1e-3"], ["model.stage.train names 'projektor'"]),
    "slot with nothing to train": Case(
        ["--model.stage.train.embedder", "1e-3"], ["model.stage.train names 'embedder'", "nothing to train there"]
    ),
    "loss of no head": Case(["--model.stage.losses.depth", "1"], ["model.stage.losses names ['depth']"]),
    "decoder that is left out and read": Case(
        ["--model.stage.leave_out", "[decoder]"], ["model.stage.leave_out names the decoder", "next_token"]
    ),
    "packed rows of a decoder with recurrent layers": Case(
        ["--data.batching", "Packed", "--model.decoder.init_args.config",
         "{model_type: recurrent_gemma, hidden_size: 64, num_hidden_layers: 3, num_attention_heads: 4}"],
        ["HFDecoder (recurrent_gemma) does not keep the samples of a packed row apart", "Padded"],
    ),
    "kernel that the device lacks": Case(
        ["--model.decoder.attention", "flex_attention"],
        ["HFDecoder (llama) cannot be trained on the device 'cpu'", "Set decoder.attention to sdpa"],
    ),
    "workers": Case(["--data.num_workers", "-3"], ["data.num_workers is at least 0, not -3"]),
    "accumulation": Case(["--trainer.accumulate_grad_batches", "0"], ["accumulate_grad_batches is at least 1, not 0"]),
    "no step": Case(["--trainer.max_steps", "0"], ["trainer.max_steps or trainer.max_epochs is 0"]),
    "devices": Case(["--trainer.devices", "2x"], ["trainer:", "devices"]),
    "file of a named source": Case(
        ["--data.train", "{mine: {class_path: LlavaJson, init_args: {path: gone.json}}}"],
        ["LlavaJson: gone.json does not exist (source 'mine'; set its path with --data.train.mine.path"],
    ),
    # Flags.
    "shortened flag": Case(["--trainer.max_step", "3"], ["no flag --trainer.max_step (did you mean"]),
    "precision": Case(["--trainer.precision", "fp17"], ["trainer.precision: expected one of auto", "found 'fp17'"]),
    "flag": Case(["--model.projectr", "Linear"], ["there is no flag --model.projectr (did you mean '--model.pro"]),
    "logger": Case(["--trainer.logger", "wandb"], ["there is no class 'wandb' (did you mean 'WandbLogger'?)"]),
    "class": Case(["--model.projector", "Linaer"], ["model.projector: there is no class 'Linaer' (did you mean"]),
    "argument of a class": Case(["--model.projector.dept", "3"], ["MLP has no argument 'dept' (did you mean 'depth'"]),
    "type of an argument": Case(["--model.projector.depth", "two"], ["projector.depth: expected int, found 'two'"]),
    "type of a number": Case(["--data.batch_size", "many"], ["data.batch_size: expected int, found 'many'"]),
    "choice": Case(
        ["--model.stage.schedule", "cosin"], ["model.stage.schedule: expected one of cosine", "did you mean 'cosine'"]
    ),
    "module": Case(["--model.encoder", "my_lab.Eye"], ["model.encoder: there is no module 'my_lab'", "PYTHONPATH"]),
    "class of another slot": Case(
        ["--model.encoder", "lit_vlm.projectors.MLP"], ["model.encoder: MLP needs the argument", "parts encoders"]
    ),
    "callback": Case(["--trainer.callbacks+", "callbacks.HeldOot"], ["has no 'HeldOot' (did you mean 'HeldOut"]),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file in LLaVA's form, whose pictures are elsewhere."""
    rows = [
        {"id": str(n), "image": f"{n}.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                              {"from": "gpt", "value": "That."}]}
        for n in range(3)
    ]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dry_run(case: Case, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    words = ["run", case.recipe, "--dry-run", "--scale", "tiny", "--strategy", "single", "--stages", case.stages]
    code = 0
    try:
        main([*words, *case.flags])
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_train_is_named_with_the_way_out(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    code, said = dry_run(CASES[name], capsys)
    assert code == 1
    place = 0
    for piece in CASES[name].said:
        assert piece in said[place:], said
        place = said.index(piece, place)
    assert "missing or wrong" in said
    assert "Traceback" not in said
    assert sorted(folder.iterdir()) == before, "a dry run leaves nothing behind"


def test_what_is_mended_is_ready(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "images").mkdir()
    for n in range(3):
        Image.new("RGB", (40, 30), "grey").save(folder / "images" / f"{n}.png")
    code, said = dry_run(Case(FILES, []), capsys)
    assert code == 0, said
    assert "ready: config parses; parts build" in said
    assert "a batch of 1 sample with 1 picture ran forward and backward" in said


@pytest.mark.slow
def test_the_teacher_of_prepared_features_need_not_be_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looked_for: list[str] = []
    monkeypatch.setattr(Teacher, "find_pretrained", lambda self: looked_for.append("one"))
    monkeypatch.setattr(EncoderTeacher, "find_pretrained", lambda self: looked_for.append("one"))
    main(["run", "ola_vlm", "--scale", "tiny", "--stages", "1_pretrain", "--dry-run"])
    assert len(looked_for) == 3
    looked_for.clear()
    tiny = ["--scale", "tiny", "--stages", "1_pretrain"]
    configs = find_recipe("ola_vlm").configs("1_pretrain", "tiny", "single")
    words = [word for path in configs for word in ("--config", str(path.resolve()))]
    main(["prepare", "targets", "--of", "depth", "--out", "features", "--workers", "0", *words])
    main(["run", "ola_vlm", *tiny, "--dry-run", "--data.prepared.depth", "features"])
    assert len(looked_for) == 2
    assert "missing or wrong" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("recipe", shipped_recipes())
def test_every_recipe_is_ready_at_its_smallest_scale(
    recipe: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if recipe == "quickstart":
        pytest.skip("it has one scale, whose pretrained parts `make quickstart` installs")
    main(["run", recipe, "--dry-run", "--scale", "tiny", "--strategy", "single"])
    said = capsys.readouterr().out
    assert "missing or wrong" not in said
    assert said.count("ran forward and backward") == said.count("lit-vlm fit") > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.projectr", "Linear"], "there is no flag --model.projectr"),
        (["--model.stage.train.projektor", "1e-3"], "model.stage.train names 'projektor'"),
        (["--1_algin.trainer.max_steps", "3"], "'1_algin' is no stage (did you mean '1_align'?)"),
        (["--data.train", "gone.json"], "data.train: there is no gone.json"),
        (["--model.stage.start_from", "[gone]"], "model.stage.start_from: there is no complete checkpoint in [gone]/"),
        (["--plugins"], "--plugins needs a value behind it"),
        (["--plugins", "./lab.py"], "a plugin is named by its module, such as my_lab.tasks, not './lab.py'"),
    ],
)
def test_a_wrong_flag_ends_a_run_before_anything_is_written(flags: Sequence[str], said: str, folder: Path) -> None:
    before = sorted(folder.iterdir())
    done = lit_vlm(folder, "run", "llava15", "--scale", "tiny", "--out", "run", *flags, check=False)
    assert done.returncode == 1
    assert f"error: {said}" in done.stderr.replace("error: --1_algin.trainer.max_steps: ", "error: ")
    assert "Traceback" not in done.stderr
    assert "--resume" not in done.stdout
    assert sorted(folder.iterdir()) == before
