"""Every composition as a folder of transformers: written, read back, equal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from lit_vlm.commands.cli import main
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.core.bits import Kind
from lit_vlm.core.quantised import quantise_parts, quantised_kinds
from lit_vlm.core.tokenizers import byte_tokenizer
from lit_vlm.data.records import Message, Record, Text
from lit_vlm.data.sample.collate import collate_prompts
from lit_vlm.data.sample.hf_chat import HFChat
from lit_vlm.evaluation.asker import Asker
from lit_vlm.hf.export import export_hf
from lit_vlm.model.generate import generate
from tests.data.sample.test_hf_chat import CHATML, THINKS, tokenizer
from tests.exports import TINY, exported, read, read_stage
from tests.full_disk import small_disk
from tests.runs import one_step
from tests.tiny import CLIP, LLAMA

DINO = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 7}  # fmt: skip


def part(class_path: str, /, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lit_vlm.{class_path}", "init_args": arguments}


CLIP_PART = part("encoders.HFEncoder", config=CLIP, layer=-2)
DEPTH = part("encoders.DepthAnything", name=None, config=DINO, image_size=28)
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 16}
GEMMA2 = LLAMA | {"model_type": "gemma2", "head_dim": 16}
TIED = LLAMA | {"tie_word_embeddings": True}
SWAPS: dict[str, dict[str, Any]] = {
    "S2": {"encoder": part("encoders.S2", encoder=CLIP_PART)},
    "Ensemble": {"encoder": part("encoders.Ensemble", encoders=[CLIP_PART, DEPTH])},
    "TimmEncoder": {"encoder": part("encoders.TimmEncoder", name="test_vit", pretrained=None)},
    "Resampler": {"projector": part("projectors.Resampler", num_queries=3, head_dim=16)},
    "new tokens, tied": {
        "decoder": part("decoders.HFDecoder", config=TIED, tokenizer="bytes", new_tokens=["<here>"]),
    },
    "eager attention": {
        "decoder": part("decoders.HFDecoder", config=GEMMA2, tokenizer="bytes", attention="eager"),
    },
    "another family": {"decoder": part("decoders.HFDecoder", config=QWEN3, tokenizer="bytes")},
}


PUT_TOGETHER = "llava_next"
"""The recipe whose embedder puts tiles together, which the processor knows nothing of."""
WRITTEN = [recipe for recipe in TINY if recipe != PUT_TOGETHER]


def test_tiles_that_are_put_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tells a model nothing of how tiles make up a picture, and model\.embedder"):
        exported(tmp_path / "out", PUT_TOGETHER)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", WRITTEN)
def test_every_recipe_is_the_same_in_transformers(recipe: str, tmp_path: Path) -> None:
    _, found = exported(tmp_path / "out", recipe)
    assert found.logits == 0
    assert found.gradients == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("recipe", ["llava15", "hovle"])
def test_quantised_weights_are_stored_as_such(recipe: str, kind: Kind, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    module, config, written = read(recipe)
    parts = {slot: parts[0] for slot, parts in module.vlm.slots().items()}
    quantise_parts(parts, kind, "--quantise")
    assert export_hf(module.vlm, config, written, module.input_spec, tmp_path / "out").logits == 0
    _, whole = exported(tmp_path / "whole", recipe)
    assert whole.logits == 0
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in ("out", "whole")]
    assert sizes[0] < 0.75 * sizes[1]
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.bfloat16)
    assert loaded.config.quantise.keys() == quantised_kinds(parts).keys()
    assert any(not parameter.is_floating_point() for parameter in loaded.parameters())


EARLIER = [
    pytest.param(recipe, stage, marks=[] if recipe == "llava15" else pytest.mark.slow)
    for recipe in WRITTEN
    for stage in find_recipe(recipe).stages_for("tiny")[:-1]
    if not read_stage(recipe, stage).get("leave_out")
]


@pytest.mark.parametrize(("recipe", "stage"), EARLIER)
def test_earlier_stages_are_the_same_too(recipe: str, stage: str, tmp_path: Path) -> None:
    """Their templates are others: `Plain` writes neither questions nor system text."""
    _, found = exported(tmp_path / "out", recipe, stage)
    assert found.logits == 0


@pytest.mark.parametrize("name", SWAPS)
def test_swapped_parts_are_the_same_in_transformers(name: str, tmp_path: Path) -> None:
    _, found = exported(tmp_path / "out", "llava15", **SWAPS[name])
    assert found.logits == 0


def test_pictures_of_any_size_are_the_same_in_transformers(tmp_path: Path) -> None:
    own = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
           "patch_size": 8, "num_patches": 16}  # fmt: skip
    encoder = part("encoders.NaFlexEncoder", config=own, layer=[1, -1])
    _, found = exported(tmp_path / "out", "eve_v2", encoder=encoder, projector=part("projectors.Linear"))
    assert found.logits <= 1e-5


@pytest.mark.parametrize("jinja", [CHATML, "{{ bos_token }}" + CHATML, THINKS], ids=["plain", "begins", "thinks"])
@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}], ids=["", "no thinking"])
@pytest.mark.parametrize("pieces", [False, True])
def test_a_chat_template_of_the_model_is_the_same_in_transformers(
    jinja: str, arguments: dict[str, Any], pieces: bool, tmp_path: Path
) -> None:
    tokenizer(jinja, pieces).save_pretrained(tmp_path / "tokenizer")
    config = LLAMA | {"vocab_size": 520}
    decoder = part("decoders.HFDecoder", config=config, tokenizer=str(tmp_path / "tokenizer"))
    module, settings, written = read("llava15", decoder=decoder)
    own = replace(written, template=HFChat(arguments=arguments, system="Be brief." if arguments else None))
    assert export_hf(module.vlm, settings, own, module.input_spec, tmp_path / "out").logits <= 1e-5


def test_the_folder_needs_no_other_file(tmp_path: Path) -> None:
    """Names of hub models and folders are not in it, and the classes are the ones that `auto_map` names."""
    exported(tmp_path / "out", "llava15")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {slot["init_args"].get("name") for slot in config["slots"].values()} == {None}
    moved = shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    model = AutoModelForImageTextToText.from_pretrained(moved, trust_remote_code=True)
    assert type(AutoProcessor.from_pretrained(moved, trust_remote_code=True)).__name__ == "LitVLMProcessor"
    assert next(model.parameters()).dtype == torch.float32


def test_parts_from_folders_need_them_no_more(tmp_path: Path) -> None:
    AutoModel.from_config(AutoConfig.for_model(**CLIP)).save_pretrained(tmp_path / "clip")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA, vocab_size=259)).save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    lines = {"name": str(tmp_path / "clip"), "layer": -2}
    words = {"name": str(tmp_path / "llama"), "new_tokens": ["<here>"], "recompute": "offload"}
    changes = {"encoder": part("encoders.HFEncoder", **lines), "decoder": part("decoders.HFDecoder", **words)}
    _, found = exported(tmp_path / "out", "llava15", **changes)
    assert found.logits == 0
    for folder in ("clip", "llama"):
        shutil.rmtree(tmp_path / folder)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert str(tmp_path) not in (tmp_path / "out/config.json").read_text()
    assert str(tmp_path) not in (tmp_path / "out/tokenizer_config.json").read_text()
    inputs = processor(text="<here>", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[259]]
    assert model(**inputs).logits.shape[-1] == 260


def test_the_attention_of_the_run_is_kept_unless_another_is_asked_for(tmp_path: Path) -> None:
    decoder = part("decoders.HFDecoder", config=LLAMA, tokenizer="bytes", attention="eager")
    exported(tmp_path / "out", "llava15", decoder=decoder)
    for asked, expected in ((None, "eager"), ("sdpa", "sdpa")):
        model = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "out", trust_remote_code=True, attn_implementation=asked
        )
        assert model.inner.decoder.attention == expected
        assert model.inner.decoder.lm.config._attn_implementation == expected


def test_an_image_token_that_could_be_written_never_is(tmp_path: Path) -> None:
    decoder = part("decoders.HFDecoder", config=LLAMA | {"vocab_size": 320}, tokenizer="bytes")
    exported(tmp_path / "out", "llava15", decoder=decoder)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.generation_config.suppress_tokens == [model.config.image_token_index] == [259]
    torch.manual_seed(0)
    found = model.generate(
        torch.tensor([[65]]), do_sample=True, top_k=0, num_return_sequences=16, max_new_tokens=40, eos_token_id=None
    )
    assert not bool((found == 259).any())


def test_an_answer_that_holds_that_row_in_the_kit_is_compared_up_to_it(tmp_path: Path) -> None:
    decoder = part("decoders.HFDecoder", config=LLAMA | {"vocab_size": 320}, tokenizer="bytes")
    module, config, written = read("llava15", decoder=decoder)
    asker = Asker(module, written)
    (sample,) = asker.encode([Record("0", "asked", (Message("user", (Text("What is this?"),)),))])
    prompts = collate_prompts([sample])
    before = generate(module.vlm, prompts, [2], 4)[0]
    with torch.no_grad():  # what it would have written second it writes as that row now
        output = module.vlm.decoder.lm.get_output_embeddings().weight
        output[259] = 2 * output[before[1]]
    assert 259 in generate(module.vlm, prompts, [2], 4)[0]
    export_hf(module.vlm, config, written, module.input_spec, tmp_path / "out")


def test_without_the_kit_the_stub_says_what_is_missing(tmp_path: Path) -> None:
    exported(tmp_path / "out", "llava15")
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide/lit_vlm").mkdir()
    (tmp_path / "hide/lit_vlm/__init__.py").write_text("")  # an older version, without lit_vlm.hf
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'hide')!r})\n"
        "from transformers import AutoConfig\n"
        f"AutoConfig.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "this model runs by the package lit-vlm, which is not installed here, or is too old" in done.stderr


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/note.txt").write_text("mine")
    with pytest.raises(ValueError, match="out is not empty"):
        exported(tmp_path / "out", "llava15")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["note.txt"]
    with pytest.raises(ValueError, match=r"note.txt is a file"):
        exported(tmp_path / "out/note.txt", "llava15")


def test_what_differs_is_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_vlm.hf import backbone

    real = backbone.moved_rows

    def wrong(vlm: Any, image_token: int, ids: Any, *others: Any) -> Any:
        return real(vlm, image_token, ids.where(ids != 65, 66), *others)  # one letter for another

    monkeypatch.setattr(backbone, "moved_rows", wrong)
    with pytest.raises(ValueError, match=r"what was read back differs: logits by \d"):
        exported(tmp_path / "out", "llava15")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    module, config, written = read("llava15")
    with small_disk(tmp_path / "disk", 1) as disk:
        (disk / "filler").write_bytes(bytes(2**19))
        with pytest.raises(ValueError, match=r"out cannot be written: .*[Nn]o space"):
            export_hf(module.vlm, config, written, module.input_spec, disk / "out")
        assert [file.name for file in disk.iterdir()] == ["filler"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = one_step(tmp_path / "run", "llava15", "2_sft")
    main(["export", str(run), str(tmp_path / "out"), "--format", "hf"])
    said = " ".join(capsys.readouterr().out.split())
    assert "read back, its logits differ by at most 0.0e+00" in said
    assert "trust_remote_code=True" in said
    (tmp_path / "plain").touch()
    wanted = (tmp_path / "plain").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "out").iterdir()} == {wanted}  # others may read it, too
