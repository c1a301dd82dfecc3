"""Vision models of the transformers library as parts: which one a setting names, and its weights."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from lit_vlm.core.part import Part, StateDict
from lit_vlm.core.pretrained import find_weights, made_config, plain_config, read_pretrained, resolve, shortened

OF_ALL_STAGES = ("stage_names", "out_features", "out_indices")
"""Settings of transformers' backbones that count all blocks of a model."""


class NamedModel(Part):
    """A part whose weights come from the files of a model of transformers.

    Attributes:
        name: hub name or local folder; None for random weights.
        subfolder: where the model is in its repository.
    """

    name: str | None
    subfolder: str = ""

    def find_pretrained(self) -> None:
        """Check that the files of the model are there.

        Raises:
            ValueError: saying what is missing.
        """
        if self.name is not None:
            find_weights(self.name, self.subfolder)


def check_one_source(encoder: str, name: str | None, config: dict[str, Any] | None) -> None:
    """Check that exactly one of `name` and `config` says what to build.

    Args:
        encoder: what is built, for the message.
        name: hub name or folder.
        config: settings of a model with random weights.

    Raises:
        ValueError: when both or neither are given.
    """
    if (name is None) == (config is None):
        raise ValueError(f"give {encoder} either a name or a config (with name: null), not both and not neither")


def vision_config(
    encoder: str, name: str | None, config: dict[str, Any] | None, known: Collection[str]
) -> PretrainedConfig:
    """The configuration of a published vision model, or one of given settings.

    Args:
        encoder: class that is built, for messages.
        name: hub name or folder.
        config: settings of a model with random weights; the first of `known` if they have no `model_type`.
        known: model types that the class takes.

    Raises:
        ValueError: when not exactly one of `name` and `config` is given, or for another model type.
    """
    check_one_source(encoder, name, config)
    if name is not None:
        loaded = AutoConfig.from_pretrained(resolve(name, weights=False))
    else:
        settings = dict(config or {})
        model_type = settings.pop("model_type", next(iter(known)))
        loaded = made_config(model_type, settings, encoder)
    loaded = getattr(loaded, "vision_config", loaded)
    if loaded.model_type not in known:
        raise ValueError(f"{encoder} knows {', '.join(known)}; '{loaded.model_type}' is not one of them")
    return loaded


def cut_config(config: PretrainedConfig) -> dict[str, Any]:
    """The settings of a model whose last blocks are not built, from which it is made again."""
    return {key: value for key, value in plain_config(config).items() if key not in OF_ALL_STAGES}


def pretrained_backbone(
    whole: type[PreTrainedModel],
    source: str,
    backbone: nn.Module,
    prefix: str = "",
    config: PretrainedConfig | None = None,
    subfolder: str = "",
    renamed: dict[str, str] | None = None,
) -> StateDict:
    """Weights of `backbone`, which is a part of a published model, under the keys of an encoder that holds it.

    Weights that the backbone's class lists as ignorable may be absent: nothing reads them, and they keep the values
    they start with.

    Args:
        whole: class of the published model.
        source: folder or hub name of the published model.
        backbone: the module whose weights are wanted.
        prefix: keys of the published model begin with this where they are the backbone's.
        config: configuration of the published model; default: the one in its files.
        subfolder: where the model is in its repository.
        renamed: pattern in names of weights in the files → what stands there in `whole`, where `whole` is a part of the
            model that is published. Weights that it does not have are not read.

    Raises:
        ValueError: when the files lack weights of the backbone, or have them in other shapes; names them.
    """
    options: dict[str, Any] = {"subfolder": subfolder, "dtype": torch.float32}
    if renamed:
        options["key_mapping"] = renamed
    state, lacking = read_pretrained(whole, source, config=config, **options)
    wanted = {f"{prefix}{own}": own for own in backbone.state_dict()}
    lacking |= dict.fromkeys(wanted.keys() - state.keys(), "missing")
    ignorable = getattr(backbone, "_keys_to_ignore_on_load_missing", None) or ()
    problems = [
        f"{key} ({lacking[key]})"
        for key, own in wanted.items()
        if key in lacking and not any(re.search(pattern, own) for pattern in ignorable)
    ]
    if problems:
        raise ValueError(f"{source} has no weights for {shortened(problems)} of {whole.__name__}")
    return {f"backbone.{own}": state[key] for key, own in wanted.items()}
