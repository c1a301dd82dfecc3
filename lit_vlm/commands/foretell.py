"""What `lit-vlm run` says of a stage on several GPUs before it starts: one line of its plan, kept in plan.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from lit_vlm.checkpoints.folder import PLAN_FILE
from lit_vlm.commands.fit import Checked
from lit_vlm.commands.runs import RunState
from lit_vlm.core.devices import known_card, short_name

LONGEST = 300
"""Seconds that a plan may take; a stage starts without one after that."""


def foretell(state: RunState, stage: str, folder: Path, checked: Checked, console: Console) -> None:
    """Plan a stage in a process of its own and print a line; where that fails, say why and go on.

    Args:
        state: recipe, scale, strategy and flags of the run.
        stage: the stage.
        folder: its folder, which gets plan.json for the callback that logs plan and outcome side by side.
        checked: the GPUs that it runs on.
        console: where the line is printed.
    """
    card = known_card(checked.gpu, checked.gpu_bytes)
    if card is None:
        console.print(f"[dim]no plan: {checked.gpu} is no GPU that lit-vlm plan knows[/]", highlight=False)
        return
    words = ["plan", state.recipe, "--stages", stage, "--strategy", state.strategy, "--json"]
    words += ["--scale", state.scale] if state.scale else []
    words += ["--devices", str(checked.gpus), "--per-node", str(checked.per_node), "--device", short_name(card)]
    words += ["--plugins", ",".join(state.plugins)] if state.plugins else []
    command = [sys.executable, "-P", "-m", "lit_vlm", *words, *state.flags]
    try:
        # Simulated, as the GPUs are about to be used.
        variables = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LONGEST, check=False)
        plan: dict[str, Any] = json.loads(done.stdout)[0]
    except subprocess.TimeoutExpired:
        console.print(f"[dim]no plan: it took more than {LONGEST} s[/]", highlight=False)
        return
    except (json.JSONDecodeError, IndexError):
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        why = lines[-1].removeprefix("error: ") if lines else f"lit-vlm plan ended with exit code {done.returncode}"
        console.print(f"[dim]no plan: {why}[/]", highlight=False, soft_wrap=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PLAN_FILE).write_text(json.dumps(plan, indent=1), encoding="utf-8")
    console.print(f"planned: {one_line(plan)}\n", highlight=False, soft_wrap=True)


def one_line(plan: dict[str, Any]) -> str:
    """A plan in one line, from its JSON."""
    memory, batch = plan["memory_gib"], plan["batch"]
    text = (
        f"peak {memory['peak']:.1f} of {memory['room']:.1f} GiB per GPU, {plan['seconds']['step']:.1f} s per step of "
        f"{batch['samples_per_step']:.0f} samples, {plan['steps']:,} steps, {plan['hours']:.1f} h"
    )
    if plan["fits"]:
        return text
    change = f"; it would with {' and '.join(plan['changes'])}" if plan["changes"] else ""
    return f"{text}. It does not fit{change}"
