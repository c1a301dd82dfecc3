"""The parser of a stage: sources by name on the command line and over several files, and a template that is `auto`."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import Namespace
from jsonargparse._typehints import ActionTypeHint, NestedArg, adapt_typehints
from jsonargparse._util import import_object
from lightning.pytorch.cli import LightningArgumentParser

from lit_vlm.data.sample.templates import Plain
from lit_vlm.data.sources import Source

KEYS = ("data.train", "data.val")
TEMPLATE = "data.template"


class Parser(LightningArgumentParser):
    """Merges a mapping of sources into that of an earlier file; a list replaces a mapping, and a mapping a list.

    jsonargparse itself keeps only the later mapping.
    """

    def merge_config(self, cfg_from: Namespace, cfg_to: Namespace) -> Namespace:
        """`cfg_to`, changed by the settings of `cfg_from`."""
        cfg_from = cfg_from.clone()
        for key in KEYS:
            later, earlier = cfg_from.get(key), cfg_to.get(key)
            if isinstance(later, dict) and isinstance(earlier, dict):
                cfg_from[key] = {**earlier, **later}
        return super().merge_config(cfg_from, cfg_to)

    def check_names(self) -> None:
        """Check the values of `data.train` and `data.val` by name, and let `data.template` be `auto`.

        Call it once they are arguments of this parser.
        """
        kinds: dict[str, type[ActionTypeHint]] = dict.fromkeys(KEYS, _Sources) | {TEMPLATE: _Template}
        for action in self._actions:
            if action.dest in kinds and type(action) is ActionTypeHint:
                action.__class__ = kinds[action.dest]


class _Template(ActionTypeHint):
    """Takes `auto`: the decoder's own chat template, or `Plain` where a stage has it, as that goes with any decoder."""

    def _check_type(
        self, value: Any, append: bool = False, cfg: Namespace | None = None, mode: str | None = None
    ) -> Any:
        if value == "auto":
            given = cfg.get(self.dest) if cfg else None
            path = given.get("class_path") if isinstance(given, Namespace | dict) else None
            if path and issubclass(import_object(path), Plain):
                return given
            value = "lit_vlm.data.HFChat"
        return super()._check_type(value, append=append, cfg=cfg, mode=mode)


class _Sources(ActionTypeHint):
    """Names the source that is wrong; jsonargparse itself would list an error for each type that the key may have."""

    def _check_type(
        self, value: Any, append: bool = False, cfg: Namespace | None = None, mode: str | None = None
    ) -> Any:
        given = cfg.get(self.dest) if cfg else None
        earlier = given if isinstance(given, dict) else {}
        if append and earlier:
            raise TypeError(
                f"{self.dest}+ adds to a list of sources, and these have names ({', '.join(earlier)}): add one by "
                f"a name of its own, --{self.dest}.NAME CLASS"
            )
        try:
            found = super()._check_type(value, append=append, cfg=cfg, mode=mode)
        except TypeError:
            self._find_wrong(value, earlier)
            raise
        if isinstance(value, NestedArg) and isinstance(given, list) and not isinstance(found, list):
            raise TypeError(
                f"{self.dest} is a list of sources without names here, so there is no '{value.key}' to set: "
                f"replace it, --{self.dest} FILE, or begin anew, --{self.dest} null --{self.dest}.NAME FILE"
            )
        return found

    def _find_wrong(self, value: Any, earlier: dict[str, Any]) -> None:
        """Raise the error of the one source that is wrong, if one is.

        Args:
            value: value of the key, or of a key below it that a flag names.
            earlier: the sources so far, by name.
        """
        if isinstance(value, NestedArg):
            name, _, rest = value.key.partition(".")
            value = {name: NestedArg(rest, value.val) if rest else _parsed(value.val)}
        value = _parsed(value)
        for name, one in value.items() if isinstance(value, dict) else enumerate(value if type(value) is list else ()):
            if one is None or isinstance(one, str):
                continue
            before = earlier.get(str(name))
            flag = f"--{self.dest}.{name}"
            if before is None and (isinstance(one, NestedArg) or "class_path" not in one):
                known = ", ".join(key for key, source in earlier.items() if source is not None)
                raise TypeError(
                    f"{self.dest} has no source '{name}' whose settings could change; sources: {known or 'none'}. A "
                    f"new one begins with its class ({flag} CLASS) or is a path ({flag} FILE)"
                )
            settings = {"sub_add_kwargs": self.sub_add_kwargs, "logger": self.logger}
            try:
                adapt_typehints(one, Source, prev_val=before, orig_val=one, **settings)
            except (TypeError, ValueError) as error:
                raise TypeError(f"{self.dest}.{name}: {error}") from error


def _parsed(value: Any) -> Any:
    """The value of a text that holds a JSON list or object; any other value unchanged."""
    return yaml.safe_load(value) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value
