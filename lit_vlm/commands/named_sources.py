"""Sources by name on the command line and over several config files: each is changed, added and removed by itself."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import Namespace
from jsonargparse._typehints import ActionTypeHint, NestedArg, adapt_typehints
from lightning.pytorch.cli import LightningArgumentParser

from lit_vlm.data.sources import Source

KEYS = ("data.train", "data.val")


class Parser(LightningArgumentParser):
    """Reads a mapping of sources on top of the mapping of an earlier file; a list replaces it, and the other way round.

    jsonargparse itself takes the later mapping alone.
    """

    def merge_config(self, cfg_from: Namespace, cfg_to: Namespace) -> Namespace:
        """The second config with what the first one says."""
        cfg_from = cfg_from.clone()
        for key in KEYS:
            later, earlier = cfg_from.get(key), cfg_to.get(key)
            if isinstance(later, dict) and isinstance(earlier, dict):
                cfg_from[key] = {**earlier, **later}
        return super().merge_config(cfg_from, cfg_to)

    def check_names(self) -> None:
        """Have the values of `data.train` and `data.val` checked by name; once they are arguments of this parser."""
        for action in self._actions:
            if action.dest in KEYS and type(action) is ActionTypeHint:
                action.__class__ = _Sources


class _Sources(ActionTypeHint):
    """Says which source is wrong, where jsonargparse lists all forms that the key could have had."""

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
            value: of the key, or of what follows it in a flag.
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
    """What YAML makes of a text that is JSON; anything else as it is."""
    return yaml.safe_load(value) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value
