"""What is known of hub names without a network: configurations in a folder, and what the hub cache holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from lit_vlm.core.fetch import fetched

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")

_folder: ContextVar[Path | None] = ContextVar("folder of configurations", default=None)


@contextmanager
def configurations_in(folder: Path) -> Iterator[None]:
    """A context in which configurations of hub names come from a folder, and no hub is asked for them.

    A tokenizer that the hub cache lacks is then replaced by `core.tokenizers.stand_in`. Weights are looked for as
    always.

    Args:
        folder: `ORG/NAME` below it holds the `config.json` of that hub name.
    """
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def is_offline() -> bool:
    """Whether the code runs inside `configurations_in`."""
    return _folder.get() is not None


def configuration(name: str, folders: Sequence[str] = ("",)) -> str:
    """The folder where transformers finds the configuration of a hub name, of the hub cache or of `configurations_in`.

    Args:
        name: hub name.
        folders: as for `core.fetch.fetched`.

    Raises:
        ValueError: inside `configurations_in`, for a name that neither its folder nor the hub cache has; outside, as
            `core.fetch.fetched`.
    """
    root = _folder.get()
    if root is None:
        return str(fetched(name, False, folders))
    if (folder := root / name).is_dir():
        return str(folder)
    if not is_cached(name, ("config.json",)):
        raise ValueError(
            f"the configuration of {name} neither ships with the kit nor is in the hub cache: give a local folder with "
            "its config.json in place of the name, such as --model.decoder.init_args.name FOLDER"
        )
    return name


def is_cached(name: str, files: tuple[str, ...]) -> bool:
    """Whether the local hub cache holds any of these files of a hub name."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    except HFValidationError:  # no hub name at all
        return False
