"""`lit-vlm data list`: what it advises does what it says."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from lit_vlm.commands.cli import main
from lit_vlm.data.records import Text
from lit_vlm.data.sources import Converted
from lit_vlm.worlds import Shapes


@pytest.mark.parametrize("key", ["text", "caption"])
def test_the_advice_for_an_imagefolder_converts_it(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures" / "train"
    folder.mkdir(parents=True)
    for index in range(2):
        (folder / f"{index}.png").write_bytes(Shapes(2, text_only=False).record(index).images[0].data or b"")
    rows = [json.dumps({"file_name": f"{index}.png", key: f"shape {index}"}) for index in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    main(["data", "list", str(tmp_path / "pictures")])
    advice = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("lit-vlm data convert"))
    out = tmp_path / "out"
    main([str(out) if word == "OUT" else word for word in shlex.split(advice)[1:]] + ["--workers", "0"])
    answers = [Converted(str(out)).record(index).messages[-1].content[0] for index in range(2)]
    assert answers == [Text("shape 0"), Text("shape 1")]
