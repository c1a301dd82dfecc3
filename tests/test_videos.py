"""A stage trains on videos: made ones, a broken one among them, at the tiny scale of VILA-1.5."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lit_vlm.commands.recipe import find_recipe
from tests.data.made_videos import make_sound, make_video, rows_of, turns
from tests.runs import lit_vlm, tiny_fit


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_vila15_trains_on_videos_and_lists_the_broken_one(workers: int, tmp_path: Path) -> None:
    rows = []
    for number in range(16):
        make_video(tmp_path / f"{number}.mp4", 8 + 3 * number)
        rows.append({"id": f"v{number}", "video": f"{number}.mp4", "conversations": turns(answer=f"{number} frames")})
    make_sound(tmp_path / "5.mp4")
    path = rows_of(tmp_path, rows)
    flags = ["--data.train", path, "--data.max_length", "420", "--data.bad_samples.max_share", "0.1"]
    flags += ["--data.num_workers", str(workers), "--data.val", path, "--trainer.logger", "false"]
    first = tiny_fit(tmp_path, "first", "2_sft", *flags, recipe="vila15")
    assert all(value.isfinite().all() for value in first.values())
    assert dropped(tmp_path / "first") == {("5", "corrupt_video", "5.mp4 has no video stream; it has audio")}
    if workers:
        return
    # The same from pictures: what `data convert` made of the videos.
    lit_vlm(tmp_path, "data", "convert", path, "set", "--max-bad-share", "0.1", "--workers", "1")
    check = lit_vlm(tmp_path, "data", "check", "set", "--decode", "--workers", "1")
    assert "is whole" in check.stdout
    stats = lit_vlm(tmp_path, "data", "stats", "set", "--workers", "1")
    assert "images per record" in stats.stdout
    again = tiny_fit(tmp_path, "again", "2_sft", *["set" if flag == path else flag for flag in flags], recipe="vila15")
    assert again.keys() == first.keys()
    assert all(value.isfinite().all() for value in again.values())
    assert not dropped(tmp_path / "again")


@pytest.mark.slow
def test_features_of_frames_can_be_prepared(tmp_path: Path) -> None:
    rows = [{"video": make_video(tmp_path / f"{k}.mp4", 20 + k).name, "conversations": turns()} for k in range(8)]
    flags = ["--data.train", rows_of(tmp_path, rows), "--data.max_length", "1000", "--trainer.logger", "false"]
    flags += ["--trainer.limit_val_batches", "0"]
    online = tiny_fit(tmp_path, "online", "0_align", *flags, recipe="vila15")
    configs = find_recipe("vila15").configs("0_align", "tiny", "single")
    words = [word for path in configs for word in ("--config", str(path.resolve()))]
    lit_vlm(tmp_path, "prepare", "targets", *words, *flags, "--trainer.accelerator", "cpu",
            "--of", "encoder", "--out", "features")  # fmt: skip
    flags += ["--data.prepared.encoder", "features"]
    cached = tiny_fit(tmp_path, "cached", "0_align", *flags, recipe="vila15")
    assert cached.keys() == online.keys()
    assert not dropped(tmp_path / "cached")
    for key, value in online.items():
        torch.testing.assert_close(cached[key], value, atol=2e-3, rtol=0)  # features are kept in bf16


def dropped(run: Path) -> set[tuple[str, str, str]]:
    """Ids, reasons and details of the samples that a run could not use."""
    file = run / "bad_samples.jsonl"
    listed = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {(one["id"], one["reason"], one["detail"]) for one in listed if one["dropped"]}
