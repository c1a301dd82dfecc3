"""Lightning callbacks that a recipe names."""

from callbacks.checkpoint import Checkpoint
from callbacks.evaluate import Evaluate
from callbacks.freeze_guard import FreezeGuard
from callbacks.gradient_monitor import GradientMonitor
from callbacks.held_out import HeldOut
from callbacks.memory import Memory
from callbacks.planned import Planned
from callbacks.predictions import Predictions
from callbacks.preemption import Preemption
from callbacks.progress import Progress
from callbacks.pruning import Pruning
from callbacks.sources import Sources
from callbacks.stragglers import Stragglers
from callbacks.throughput import Throughput
from callbacks.watchdog import Watchdog

__all__ = [
    "Checkpoint",
    "Evaluate",
    "FreezeGuard",
    "GradientMonitor",
    "HeldOut",
    "Memory",
    "Planned",
    "Predictions",
    "Preemption",
    "Progress",
    "Pruning",
    "Sources",
    "Stragglers",
    "Throughput",
    "Watchdog",
]
