"""The configuration of an exported model: its slots, as a recipe writes them, with all that their parts must know."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from transformers import PretrainedConfig

from lit_vlm import __version__
from lit_vlm.core.bits import Kind
from lit_vlm.decoders import Decoder
from lit_vlm.embedders import Embedder
from lit_vlm.encoders import Encoder
from lit_vlm.model.build import Slots
from lit_vlm.projectors import Projector

STUB = "modeling_lit_vlm.py"
"""The file beside an exported model that imports the classes from the installed kit."""
AUTO_CLASSES = {
    "AutoConfig": "LitVLMConfig",
    "AutoModel": "LitVLMForConditionalGeneration",  # by which lmms-eval loads what transformers itself does not know
    "AutoModelForImageTextToText": "LitVLMForConditionalGeneration",
    "AutoProcessor": "LitVLMProcessor",
}
AUTO_MAP = {auto: f"{Path(STUB).stem}.{own}" for auto, own in AUTO_CLASSES.items()}
SLOTS: dict[str, type] = {"encoder": Encoder, "projector": Projector, "embedder": Embedder, "decoder": Decoder}


class LitVLMConfig(PretrainedConfig):
    """What an exported model is made of.

    Args:
        slots: slot → `class_path` and `init_args` of its part, which need no other file (`Part.standalone`).
        image_token_index: id at the positions of visual tokens; if the word table has a row for it, nothing reads it.
        hidden_size: width of the decoder.
        num_hidden_layers: number of the decoder's blocks.
        vocab_size: rows of the decoder's word table.
        quantise: slot → type of 4 or 8 bits in which the linear layers of its blocks are stored.
        lit_vlm_version: version of the kit that wrote it.
        kwargs: settings of transformers, such as `dtype`.
    """

    model_type = "lit_vlm"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        slots: dict[str, dict[str, Any]] | None = None,
        image_token_index: int = 0,
        hidden_size: int = 0,
        num_hidden_layers: int = 0,
        vocab_size: int = 0,
        quantise: dict[str, Kind] | None = None,
        lit_vlm_version: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.slots = slots or {}
        self.image_token_index = image_token_index
        self.hidden_size, self.num_hidden_layers, self.vocab_size = hidden_size, num_hidden_layers, vocab_size
        self.quantise = quantise or {}
        self.lit_vlm_version = lit_vlm_version or __version__
        super().__init__(**{"auto_map": AUTO_MAP} | kwargs)

    def to_json_string(self, use_diff: bool = True) -> str:
        """The configuration as JSON. transformers sorts keys, but the order of task tokens has a meaning."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2) + "\n"

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: `auto_map` names the stub, so no file of the kit is copied when the configuration is saved."""


def factories(slots: Mapping[str, Mapping[str, Any]], attention: str | None = None) -> Slots:
    """Factories of the parts that a configuration names.

    Args:
        slots: as in `LitVLMConfig`.
        attention: implementation of attention of all parts that have a choice; None: as the configuration says.

    Raises:
        ValueError: for a slot that is missing, or a class or argument that this version of the kit does not have.
    """
    if missing := sorted(SLOTS.keys() - slots.keys()):
        raise ValueError(f"config.json: slots lacks {', '.join(missing)}; it is no export of lit-vlm")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Slots, "slots", skip={"heads", "lora", "quantize"})
    given = {name: _with_attention(slots[name], attention) for name in SLOTS}
    try:
        made = parser.instantiate_classes(parser.parse_object({"slots": given})).slots
    except Exception as error:  # jsonargparse raises several kinds
        if absent := re.search(r"No module named '([^']*)'", str(error)):
            raise ValueError(
                f"config.json: a part of this model is of the package {absent[1]}, which is not installed here"
            ) from error
        raise ValueError(
            f"config.json: the slots do not fit lit-vlm {__version__}: {error}. Its lit_vlm_version says "
            "which version wrote them"
        ) from error
    assert isinstance(made, Slots)
    return made


def _with_attention(given: Mapping[str, Any], attention: str | None) -> dict[str, Any]:
    arguments = dict(given.get("init_args") or {})
    if attention is not None and "attention" in arguments:
        arguments["attention"] = attention
    return {"class_path": given["class_path"], "init_args": arguments}
