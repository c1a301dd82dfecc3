"""Trains a part, or makes its configuration alone: the process that `made` starts."""

from __future__ import annotations

import sys
from pathlib import Path

from lit_vlm.core.children import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    part, goal, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if part == "scenes-decoder":
        from lit_vlm.worlds.mini.decoder import save_tokenizer, train_decoder

        (train_decoder if goal == "weights" else save_tokenizer)(out)
    elif part == "scenes-siglip":
        from lit_vlm.worlds.mini.dual import save_processor, train_dual

        (train_dual if goal == "weights" else save_processor)(out)
    else:
        from lit_vlm.worlds.mini.encoders import TRANSFORMERS, train_encoder, train_vit

        if part in TRANSFORMERS and goal != "weights":
            TRANSFORMERS[part].save_pretrained(out)
        elif part in TRANSFORMERS:
            train_vit(out, TRANSFORMERS[part])
        else:
            train_encoder(out, classes_only=part == "scenes-classes-encoder")
