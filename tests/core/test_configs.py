"""Configurations of transformers as plain settings, and back."""

from __future__ import annotations

import json
import math

from transformers import AutoConfig

from lit_vlm.core.pretrained import made_config, plain_config


def test_an_infinity_stays_one() -> None:
    config = AutoConfig.for_model("granitemoehybrid")
    settings = plain_config(config)
    assert settings["time_step_limit"] == [0.0, math.inf]
    again = made_config(settings["model_type"], json.loads(json.dumps(settings)), "model.decoder")
    assert plain_config(again) == settings
