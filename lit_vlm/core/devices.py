"""What accelerators can do, from their makers' data sheets.

Peaks are dense, without sparsity, in bf16 with sums in fp32; in fp16 for the two that have no bf16 (V100, T4). NVIDIA's
data sheets since Ampere print figures with sparsity, which are twice as high. Links are those between the cards of a
usual node: NVLink or Infinity Fabric where all cards have it, else PCIe, of which every card has 16 lanes; bridges,
which join two to four PCIe cards, are left out. They are per direction, where makers print both directions together.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lit_vlm.core.launcher import Launch

GIB = 2**30
TERA, GIGA = 1e12, 1e9
PCIE3, PCIE4, PCIE5 = 16 * GIGA, 32 * GIGA, 64 * GIGA


@dataclass(frozen=True)
class Card:
    """An accelerator.

    Attributes:
        name: as people call it.
        driver: what its driver calls it, in lower case, without maker, series, and kind and size of memory.
        marketed: size of its memory, as it is sold, in GiB.
        flops: dense peak of matrix products in bf16, FLOP/s.
        bandwidth: of its memory, bytes/s.
        link: to the other cards of a node, bytes/s in each direction.
        capability: CUDA's compute capability; None for other makers.
        source: where the figures are from.
        inline_ecc: whether error correction takes its bits out of the memory that is sold (GDDR in servers).
    """

    name: str
    driver: str
    marketed: int
    flops: float
    bandwidth: float
    link: float
    capability: tuple[int, int] | None
    source: str
    inline_ecc: bool = False

    @property
    def memory(self) -> int:
        """Bytes that a process can use, as a rule: 98 % of what is sold, 92 % with error correction inside of it."""
        return int((0.92 if self.inline_ecc else 0.98) * self.marketed * GIB)


def _card(
    name: str,
    driver: str,
    marketed: int,
    tera_flops: float,
    giga_bytes: float,
    link: float,
    capability: tuple[int, int] | None,
    source: str,
    inline_ecc: bool = False,
) -> Card:
    return Card(name, driver, marketed, tera_flops * TERA, giga_bytes * GIGA, link, capability, source, inline_ecc)


VOLTA, TURING, AMPERE, GA10X, ADA, HOPPER = (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)
A100, A800 = "NVIDIA A100 data sheet", "NVIDIA A800 data sheet"
H100, H800, H200 = "NVIDIA H100 data sheet", "NVIDIA H800 data sheet", "NVIDIA H200 data sheet"
V100, GA102 = "NVIDIA V100 data sheet", "NVIDIA GA102 architecture white paper"

CARDS: dict[str, Card] = {
    "a100-40": _card("A100 SXM 40 GB", "a100", 40, 312, 1555, 300 * GIGA, AMPERE, A100),
    "a100-80": _card("A100 SXM 80 GB", "a100", 80, 312, 2039, 300 * GIGA, AMPERE, A100),
    "a100-40-pcie": _card("A100 PCIe 40 GB", "a100 pcie", 40, 312, 1555, PCIE4, AMPERE, A100),
    "a100-80-pcie": _card("A100 PCIe 80 GB", "a100 pcie", 80, 312, 1935, PCIE4, AMPERE, A100),
    "a800": _card("A800 SXM 80 GB", "a800", 80, 312, 2039, 200 * GIGA, AMPERE, A800),
    "a800-pcie": _card("A800 PCIe 80 GB", "a800 pcie", 80, 312, 1935, PCIE4, AMPERE, A800),
    "h20": _card("H20 96 GB", "h20", 96, 148, 4000, 450 * GIGA, HOPPER, "NVIDIA H20 data sheet"),
    "h100": _card("H100 SXM", "h100", 80, 989, 3350, 450 * GIGA, HOPPER, H100),
    "h100-pcie": _card("H100 PCIe", "h100 pcie", 80, 756, 2000, PCIE5, HOPPER, H100),
    "h100-nvl": _card("H100 NVL", "h100 nvl", 94, 835, 3900, PCIE5, HOPPER, H100),
    "h200": _card("H200 SXM", "h200", 141, 989, 4800, 450 * GIGA, HOPPER, H200),
    "h200-nvl": _card("H200 NVL", "h200 nvl", 141, 835, 4800, PCIE5, HOPPER, H200),
    "h800": _card("H800 SXM", "h800", 80, 989, 3350, 200 * GIGA, HOPPER, H800),
    "h800-pcie": _card("H800 PCIe", "h800 pcie", 80, 756, 2000, PCIE5, HOPPER, H800),
    "gh200": _card("GH200 96 GB", "gh200", 96, 989, 4000, 450 * GIGA, HOPPER, "NVIDIA GH200 data sheet"),
    "b200": _card("B200", "b200", 180, 2250, 8000, 900 * GIGA, (10, 0), "NVIDIA HGX B200 data sheet"),
    "v100": _card("V100 SXM 32 GB", "v100", 32, 125, 900, 150 * GIGA, VOLTA, V100),
    "v100-16": _card("V100 SXM 16 GB", "v100", 16, 125, 900, 150 * GIGA, VOLTA, V100),
    "v100-pcie": _card("V100 PCIe 32 GB", "v100 pcie", 32, 112, 900, PCIE3, VOLTA, V100),
    "v100-16-pcie": _card("V100 PCIe 16 GB", "v100 pcie", 16, 112, 900, PCIE3, VOLTA, V100),
    "t4": _card("T4", "t4", 16, 65, 300, PCIE3, TURING, "NVIDIA T4 data sheet", inline_ecc=True),
    "a10": _card("A10", "a10", 24, 125, 600, PCIE4, GA10X, "NVIDIA A10 data sheet", inline_ecc=True),
    "a30": _card("A30", "a30", 24, 165, 933, PCIE4, AMPERE, "NVIDIA A30 data sheet"),
    "a40": _card("A40", "a40", 48, 149.7, 696, PCIE4, GA10X, "NVIDIA A40 data sheet", inline_ecc=True),
    "l4": _card("L4", "l4", 24, 121, 300, PCIE4, ADA, "NVIDIA L4 data sheet", inline_ecc=True),
    "l40": _card("L40", "l40", 48, 181, 864, PCIE4, ADA, "NVIDIA L40 data sheet", inline_ecc=True),
    "l40s": _card("L40S", "l40s", 48, 362, 864, PCIE4, ADA, "NVIDIA L40S data sheet", inline_ecc=True),
    "3090": _card("RTX 3090", "rtx 3090", 24, 71, 936, PCIE4, GA10X, GA102),
    "4090": _card("RTX 4090", "rtx 4090", 24, 165.2, 1008, PCIE4, ADA, "NVIDIA Ada architecture white paper"),
    "5090": _card("RTX 5090", "rtx 5090", 32, 209.5, 1792, PCIE5, (12, 0), "NVIDIA RTX Blackwell white paper"),
    "6000-ada": _card("RTX 6000 Ada", "rtx 6000 ada", 48, 364, 960, PCIE4, ADA, "NVIDIA RTX 6000 Ada data sheet"),
    "mi300x": _card("MI300X", "mi300x", 192, 1307, 5300, 448 * GIGA, None, "AMD Instinct MI300X data sheet"),
    "mi325x": _card("MI325X", "mi325x", 256, 1307, 6000, 448 * GIGA, None, "AMD Instinct MI325X data sheet"),
}
"""Short name → card. MI300X and MI325X have seven links of 64 GB/s in each direction."""

PLAIN = re.compile(r"nvidia|amd|geforce|tesla|instinct|generation|sxm\d?|oam|hbm\de?|\d+gb")
SIZE = re.compile(r"(\d+)gb")
OFF = 0.1
"""Share by which the memory that a driver reports may differ from what is sold."""


def known_card(name: str, memory: int | None = None) -> Card | None:
    """The card behind a device's name.

    Args:
        name: as `torch.cuda.get_device_name` gives it, `NVIDIA A100-SXM4-80GB`.
        memory: bytes of the device, which tell apart cards that are sold with several sizes; default: the size that the
            name carries, if it does.

    Returns:
        None for a card that is not in the table, a slice of one (MIG), or one whose size is none that is sold.
    """
    words = re.split(r"[\s-]+", name.lower())
    driver = " ".join(word for word in words if not PLAIN.fullmatch(word))
    cards = [card for card in CARDS.values() if card.driver == driver]
    sizes = list(_sizes(words)) if memory is None else [memory / GIB]
    if len(cards) > 1 or memory is not None:
        fitting = [card for card in cards if any(_fits(card, size) for size in sizes)]
        return fitting[0] if len(fitting) == 1 else None
    return cards[0] if cards else None


def card_of(device: torch.device) -> Card | None:
    """The card of a GPU of this machine; None of one that is not in the table, and of other devices."""
    import torch  # late, as who asks about cards alone loads no PyTorch

    if device.type != "cuda":
        return None
    return known_card(torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory)


def short_name(card: Card) -> str:
    """The name of a card in the table."""
    return next(name for name, one in CARDS.items() if one is card)


def _sizes(words: list[str]) -> Iterator[float]:
    for word in words:
        if found := SIZE.fullmatch(word):
            yield float(found[1])


def _fits(card: Card, size: float) -> bool:
    return abs(size / card.marketed - 1) <= OFF


def visible_gpus() -> tuple[str, ...]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them; none on a machine without."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return tuple(given.split(",")[:count] if given else map(str, range(count)))


def own_devices(started: Launch) -> list[str]:
    """Devices of a process: its share of those it sees, which are the machine's or only its own; at least one."""
    import torch

    seen = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    share = seen[started.local_rank :: started.per_node] if started.per_node else []  # 0: not alike on all machines
    return share or [seen[started.local_rank % len(seen)]]


def cores() -> list[int]:
    """Numbers of the cores that this process may use; a job's task is often given a part of its machine's."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
