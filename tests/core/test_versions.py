from __future__ import annotations

import importlib.metadata
from typing import NoReturn

import pytest

import lit_vlm
from lit_vlm.core.versions import installed
from lit_vlm.training.run_record import _versions


def test_versions_of_what_is_installed_and_nothing_else() -> None:
    assert installed(["torch", "no-such-package"]) == {"torch": importlib.metadata.version("torch")}


def test_a_folder_of_code_that_is_no_installed_package_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> NoReturn:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert installed(["lit-vlm", "torch"]) == {"lit-vlm": lit_vlm.__version__}
    assert _versions()["version.lit-vlm"] == lit_vlm.__version__
