"""Writing a model as GGUF files, and comparing what llama.cpp makes of them with the kit's own."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image as PILImage
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from lit_vlm.checkpoints.published import check_form, export_published
from lit_vlm.core.lora import merge_adapters
from lit_vlm.core.written import whole_folder
from lit_vlm.data.records import Image, Message, Record, Text
from lit_vlm.data.sample.collate import collate_prompts
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.embedders import Splice
from lit_vlm.encoders import HFEncoder
from lit_vlm.gguf.files import check_held, write_decoder, write_encoder
from lit_vlm.gguf.kinds import KINDS
from lit_vlm.gguf.runtime import Runtime, is_installed
from lit_vlm.model.generate import generate
from lit_vlm.model.vlm import VLM

DEFAULT = "f16"
ROUNDED = ("f32", "f16")
"""Kinds that are compared: of quantised weights nobody can say how far off they may be."""
BOUND = 0.03
"""How far log-probabilities may be apart, as a share of how far they are with another picture. llama.cpp reads its gelu
from a table in fp16, so there is a difference in f32 as well."""
NEW_TOKENS = 8
MOST = 1000
"""Log-probabilities that are compared at most, the likeliest ones."""
TEXTS = ("What is this?", "Two 12-year-olds: it's 3.50 €, naïve!\n\n  <b>Ünïcode</b> 日本語 🐈", "  x = [1, 2];\tdone")


@dataclass(frozen=True)
class Written:
    """What was written, and what llama.cpp made of it.

    Attributes:
        decoder: file of the decoder.
        encoder: file of encoder and projector.
        difference: largest difference of log-probabilities behind a picture and a question, as a share of how far they
            move with another picture; None where llama.cpp is not installed, or weights are quantised.
        same_text: whether the answers of both are the same; None where llama.cpp is not installed.
        tokens_per_s: speed of llama.cpp's answer on this machine.
    """

    decoder: Path
    encoder: Path
    difference: float | None = None
    same_text: bool | None = None
    tokens_per_s: float | None = None


def export_gguf(model: VLM, written: SampleFormat, spec: InputSpec, out: Path, kind: str = DEFAULT) -> Written:
    """Write decoder and encoder of a model of LLaVA's form as two GGUF files.

    Where llama.cpp is installed (extra `edge`), tokens of texts, the number of positions of a prompt with a picture,
    and, unless weights are quantised, log-probabilities are compared before the folder gets its name.

    Args:
        model: CLIP or SigLIP, Linear or MLP of depth 1 or 2, Splice without task tokens, and a decoder of Llama's,
            Mistral's or Qwen2's family; adapters are merged into its weights, in place.
        written: template, transform and `max_length` of its data.
        spec: what the data side knows of it.
        out: a folder that is new or empty.
        kind: one of `KINDS`; encoder and projector stay in f16, or in f32 with `f32`.

    Raises:
        ValueError: for a model of another form, a folder that is not empty or cannot be written, a kind that needs
            llama.cpp's code where that is not installed, or tokens or log-probabilities that differ.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r} of GGUF files here, only {', '.join(KINDS)}")
    check_form(model, "gguf")
    if isinstance(model.embedder, Splice) and model.embedder.task_tokens:
        names = ", ".join(model.embedder.task_tokens)
        raise ValueError(f"gguf holds no task tokens ({names}): llama.cpp puts nothing behind a picture")
    if not isinstance(model.encoder, HFEncoder):
        raise ValueError(f"gguf holds encoders of CLIP and SigLIP, not {type(model.encoder).__name__}")
    if not model.encoder.is_plain:
        raise ValueError("gguf holds encoders that are read at one layer and have no register tokens")
    if model.encoder.patch_grid.prefix:
        raise ValueError("gguf holds no class token among the visual tokens: set cls: false of the encoder")
    merge_adapters(model)
    with whole_folder(out) as scratch:
        files = _files(model, written, spec, scratch, kind)
        result = _compared(model, written, spec, files, kind) if is_installed() else files
        shutil.rmtree(scratch / "llava-hf")
    return replace(result, decoder=out / result.decoder.name, encoder=out / result.encoder.name)


def _files(model: VLM, written: SampleFormat, spec: InputSpec, scratch: Path, kind: str) -> Written:
    """Both files, by way of transformers' class, whose logits are compared."""
    assert isinstance(model.encoder, HFEncoder)
    rows = model.decoder.vocab_size
    export_published("llava-hf", model, scratch / "llava-hf", written)
    whole = LlavaForConditionalGeneration.from_pretrained(scratch / "llava-hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(scratch / "llava-hf")
    config = whole.config
    check_held(config)
    if config.image_token_index >= rows:  # llama.cpp marks the places of pictures in a way of its own
        config.text_config.vocab_size = rows
    vision = "f32" if kind == "f32" else "f16"
    tail = kind.upper() if kind[0] == "q" else kind
    decoder, encoder = scratch / f"model-{tail}.gguf", scratch / f"mmproj-model-{vision}.gguf"
    state = whole.state_dict()
    closing = written.closing_id(spec)
    ends = closing if closing != tokenizer.eos_token_id else None
    write_decoder(decoder, config, state, tokenizer, kind, spec.bos_id is not None, ends)
    mean, std = model.encoder.pixel_mean.flatten().tolist(), model.encoder.pixel_std.flatten().tolist()
    write_encoder(encoder, config, state, mean, std, vision)
    return Written(decoder, encoder)


def _compared(model: VLM, written: SampleFormat, spec: InputSpec, files: Written, kind: str) -> Written:
    """Ask llama.cpp what the kit is asked.

    Raises:
        ValueError: where tokens, positions or log-probabilities differ.
    """
    with Runtime(files.decoder, files.encoder) as runtime:
        return _asked(runtime, model, written, spec, files, kind)


def _asked(runtime: Runtime, model: VLM, written: SampleFormat, spec: InputSpec, files: Written, kind: str) -> Written:
    _check_tokens(runtime, spec)
    prompt, pictures = _prompt(written, spec), _pictures(model)
    samples = []
    for picture in pictures:
        record = Record("trial", "trial", (Message("user", (Image(data=picture), _QUESTION)),))
        samples.append(written.sample_encoder(spec, prompt=True)(record, Path("/")))
    batch = collate_prompts(samples, pad_id=int(spec.tokenizer.pad_token_id))
    with torch.no_grad():
        ours, other = model.logits(batch)[:, -1].float().log_softmax(-1)
    found = runtime.answer(prompt, pictures[:1], NEW_TOKENS, min(model.decoder.vocab_size, MOST))
    if found.positions != len(samples[0]):
        raise ValueError(f"llama.cpp makes {found.positions} positions of a prompt, the kit {len(samples[0])}")
    ids = list(found.first)
    theirs = torch.tensor([found.first[index] for index in ids])
    difference = float((theirs - ours[ids]).abs().max() / (other - ours)[ids].abs().max())
    if kind in ROUNDED and difference > BOUND:
        raise ValueError(
            f"llama.cpp sees another picture than the kit: log-probabilities differ by {difference:.1%} of what "
            f"exchanging the picture changes; allowed is {BOUND:.0%}{_why(model)}"
        )
    answer = generate(model, batch, spec.stop_ids | batch.stop_ids, NEW_TOKENS)[0]
    same = found.ids[: len(answer)] == answer
    told = difference if kind in ROUNDED else None
    return replace(files, difference=told, same_text=same, tokens_per_s=found.tokens_per_s)


_QUESTION = Text("What is this?")


def _prompt(written: SampleFormat, spec: InputSpec) -> str:
    """The question behind a picture, without the token that begins text, which llama.cpp puts in front itself."""
    text = written.prompt([Message("user", (Image(data=b""), _QUESTION))], spec)
    if written.template.own_start and spec.bos_id is not None and not text.startswith(spec.tokenizer.bos_token):
        raise ValueError(
            f"gguf has one setting for {spec.tokenizer.bos_token} in front of a text: this tokenizer puts it in front "
            "of every text, and this chat template does not write it"
        )
    return text.removeprefix(spec.tokenizer.bos_token) if spec.bos_id is not None else text


def _pictures(model: VLM) -> list[bytes]:
    """Two files of noise, of the side that the encoder takes, so that nobody resizes them."""
    side = model.encoder.pixels.size or 224
    generator = torch.Generator().manual_seed(0)
    files = []
    for _ in range(2):
        noise = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
        buffer = io.BytesIO()
        PILImage.fromarray(noise.numpy()).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def _why(model: VLM) -> str:
    """What is known of versions of llama.cpp that differ."""
    if isinstance(model.encoder, HFEncoder) and model.encoder.skip:
        return (
            ". The version that this was written with puts CLIP's class token behind the patches and hands on all "
            "places but the first, so that a patch is lost: take an encoder without such a token (SigLIP), or another "
            "version of llama.cpp"
        )
    return ""


def _check_tokens(runtime: Runtime, spec: InputSpec) -> None:
    begins = [spec.bos_id] if spec.bos_id is not None else []
    for text in TEXTS:
        expected = [*begins, *spec.tokenizer(text, add_special_tokens=False).input_ids]
        if (found := runtime.tokens(text)) != expected:
            raise ValueError(f"llama.cpp makes the tokens {found} of {text!r}, the kit {expected}")
