"""Made-up facts of a healthy cluster, which tests make sick."""

from __future__ import annotations

from lit_vlm.cluster.nodes import Device, Facts, Folder, Machine, Place

GIB = 2**30


def places(nodes: int = 4, each: int = 1) -> dict[int, Place]:
    return {
        rank: Place(rank=rank, node=f"n{rank // each + 1}", host=f"host{rank // each + 1}")
        for rank in range(nodes * each)
    }


def fact(rank: int = 0, **changed: object) -> Facts:
    usual = Facts(
        versions={"lit-vlm": "0.1.0", "Python": "3.11.7", "torch": "2.15.0"},
        sources={"lit_vlm/a.py": "aa", "lit_vlm/b.py": "bb", "callbacks/c.py": "cc"},
        device=card(rank),
        cpus=[4 * rank, 4 * rank + 1, 4 * rank + 2, 4 * rank + 3],
        variables={"MASTER_ADDR": "n1"},
        interfaces=["lo", "eth0", "ib0"],
        address=f"10.0.0.{rank}",
        open_files=65536,
        locked=-1,
        infiniband=True,
    )
    return usual.model_copy(update=changed)


def card(rank: int, **changed: object) -> Device:
    return Device(kind="cuda", name="NVIDIA H100", id=f"gpu-{rank}").model_copy(update=changed)


def machine(**changed: object) -> Machine:
    folders = {use: Folder(path=f"/{use}", free=500 * GIB, problem=None) for use in ("--out", "cache")}
    usual = Machine(data={"/data": "a folder of 3 entries (12ab)"}, folders=folders, shared_memory=64 * GIB)
    return usual.model_copy(update=changed)
