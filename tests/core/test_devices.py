from __future__ import annotations

import pytest

from lit_vlm.core.devices import CARDS, GIB, known_card


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40-pcie"),
        ("NVIDIA A100 80GB PCIe", "a100-80-pcie"),
        ("NVIDIA A800-SXM4-80GB", "a800"),
        ("NVIDIA A800 80GB PCIe", "a800-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA GeForce RTX 3090", "3090"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 5090", "5090"),
        ("NVIDIA RTX 6000 Ada Generation", "6000-ada"),
        ("Tesla V100-SXM2-16GB", "v100-16"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("Tesla V100-PCIE-32GB", "v100-pcie"),
        ("Tesla T4", "t4"),
        ("AMD Instinct MI300X OAM", "mi300x"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM-64GB", None),
        ("NVIDIA A1000", None),
    ],
)
def test_a_card_goes_by_its_exact_name(device: str, key: str | None) -> None:
    assert known_card(device) == (CARDS[key] if key else None)


@pytest.mark.parametrize(
    ("device", "gib", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H100 NVL", 93.1, "h100-nvl"),
        ("NVIDIA A100", 39.4, "a100-40"),
        ("NVIDIA A100", 79.2, "a100-80"),
        ("Tesla T4", 14.6, "t4"),
        ("NVIDIA A10", 22.1, "a10"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA H100 80GB HBM3", 39.5, None),
    ],
)
def test_the_size_of_its_memory_tells_cards_of_one_name_apart(device: str, gib: float, key: str | None) -> None:
    assert known_card(device, int(gib * GIB)) == (CARDS[key] if key else None)


@pytest.mark.parametrize("key", CARDS)
def test_every_row_is_possible(key: str) -> None:
    card = CARDS[key]
    assert 0.9 * card.marketed <= card.memory / GIB < card.marketed
    assert 50e12 < card.flops < 3e15
    assert 0.2e12 < card.bandwidth < 10e12
    assert 15e9 < card.link <= 900e9
    assert 35 < card.flops / card.bandwidth < 450
    assert card.source
