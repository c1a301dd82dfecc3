"""Small pretrained parts that know generated scenes, for the scales `mini` and `edge`.

They are trained on this machine when they are first asked for, each in some minutes on two cores, and are then
kept in the cache. `made:scenes-decoder` has read the language of scenes. `made:scenes-encoder` sees what stands where,
how large it is and how far away, `made:scenes-vit` the same as a vision transformer of SigLIP's kind,
`made:scenes-naflex` as one of SigLIP 2's NaFlex kind, in pictures of any shape, and `made:scenes-classes-encoder` where
something stands, its shape and its colour. `made:scenes-siglip` is a dual encoder of SigLIP's kind, which knows which
descriptions fit which pictures.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lit_vlm.core.cache import held
from lit_vlm.core.children import PARENT

PARTS = {
    "scenes-decoder": 4,
    "scenes-encoder": 1,
    "scenes-classes-encoder": 1,
    "scenes-vit": 1,
    "scenes-naflex": 1,
    "scenes-siglip": 1,
}
"""Names of the parts, each with a version that goes up whenever its training gives other weights."""
MODELS = ("scenes-decoder", "scenes-vit", "scenes-naflex", "scenes-siglip")
"""Parts that are whole models of transformers, with a configuration; the others are files of weights."""


def made(name: str, cache: Path, weights: bool = True) -> Path:
    """The path of a pretrained part; it is trained first if the cache does not hold it.

    Args:
        name: one of `PARTS`.
        cache: folder that keeps the parts.
        weights: whether the weights of one of `MODELS` are needed; without them its configuration, and its tokenizer
            if it has one, are made in seconds.

    Returns:
        of `MODELS` the folder as transformers saves it, of the others the file of weights.

    Raises:
        ValueError: for an unknown name.
        subprocess.CalledProcessError: when the process that trains the part fails.
    """
    if name not in PARTS:
        raise ValueError(f"there is no part 'made:{name}'; there are {', '.join(f'made:{part}' for part in PARTS)}")
    target = cache / f"{name}-{PARTS[name]}"
    target.mkdir(exist_ok=True)
    whole = name in MODELS
    wanted = target / ("config.json" if whole and not weights else "model.safetensors")
    if wanted.exists():
        return target if whole else wanted
    goal = "weights" if weights else "config"
    # A lease for each goal: who needs the configuration alone does not wait for a training.
    with held(cache / f"{name}-{goal}.lease", f"makes made:{name}"):
        if not wanted.exists():
            # A process of its own: the caller may have set another dtype, device or thread count.
            words = [sys.executable, "-m", "lit_vlm.worlds.mini", name, goal]
            environment = {**os.environ, PARENT: str(os.getpid())}
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                subprocess.run([*words, scratch], env=environment, check=True)
                # What is looked for comes last: whoever sees it finds the others, wherever this process is stopped.
                last = ("config.json", "model.safetensors")
                for file in sorted(Path(scratch).iterdir(), key=lambda file: (file.name in last, file.name)):
                    file.replace(target / file.name)
    return target if whole else wanted
