"""A recipe whose decoder is swapped by a flag: any family, asked by its own chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from lit_vlm.core.tokenizers import byte_tokenizer
from tests.data.sample.test_hf_chat import CHATML, LLAMA3, PHI3
from tests.runs import lit_vlm

# family → its own settings, its chat template, the marks in it that bytes lack, and what opens an answer
DECODERS: dict[str, tuple[dict[str, Any], str, list[str], str]] = {
    "llama": (
        {},
        LLAMA3,
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|start_header_id|>assistant<|end_header_id|>",
    ),
    "qwen3": ({"head_dim": 16, "tie_word_embeddings": True}, CHATML, [], "<|im_start|>assistant"),
    "phi3": ({"pad_token_id": 0}, PHI3, ["<|user|>", "<|assistant|>", "<|end|>"], "<|assistant|>"),
}


def save(family: str, folder: Path) -> None:
    """A model of this family with random weights, and a tokenizer that has a chat template."""
    own, template, marks, _ = DECODERS[family]
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        family, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=len(tokenizer), **own,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", DECODERS)
def test_the_quick_start_takes_another_decoder_and_its_template(family: str, tmp_path: Path) -> None:
    save(family, tmp_path / family)
    scored = {"class_path": "callbacks.HeldOut", "init_args": {"limit": 2}}
    flags = ["--model.decoder.init_args.name", family, "--data.template", "auto", "--trainer.limit_train_batches", "1"]
    flags += ["--trainer.accelerator", "cpu", "--trainer.callbacks", json.dumps([scored])]
    lit_vlm(tmp_path, "run", "quickstart", "--out", "run", *flags)
    scores = json.loads((tmp_path / "run" / "2_tune" / "held_out.json").read_text())
    assert scores["after"]["num_records"] == 2
    shown = lit_vlm(tmp_path, "inspect", "--config", "run/2_tune/config.yaml").stdout
    assert DECODERS[family][3] in shown
