"""What is between machines, judged: clocks, links, and what the environment says of the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

from lit_vlm.cluster.judge import GIB, Judgement, Places, level_of, node_name, odd, where
from lit_vlm.cluster.links import Clock, Speed
from lit_vlm.cluster.nodes import Facts

SLOW_LINK = 0.6
"""Share of the usual bandwidth below which a node, or a single pair of nodes, is called slow."""
APART = 1.0
"""Seconds that clocks may differ by; times in MLflow and of files on shared folders are compared with each other."""
OPEN_FILES = 1024
"""Files that a process should be allowed to have open: loader workers pass one per tensor."""
SLOWING = ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE")
"""Variables that switch a fast way off when they are 1."""

Pairs = Mapping[tuple[int, int], Speed]


def clocks(found: Mapping[int, Clock], places: Places) -> list[Judgement]:
    """Clocks that are too far from the first machine's."""
    judged = []
    for rank, clock in found.items():
        error = clock.round_trip / 2
        if abs(clock.offset) - error > APART:
            side = "ahead of" if clock.offset > 0 else "behind"
            text = f"the clock of {node_name(rank, places)} is {abs(clock.offset):.1f} s {side} that of "
            text += f"{node_name(0, places)} (± {error:.3f} s): does it follow a time server?"
            judged.append(Judgement("warning", "clocks", text, (rank,)))
    if judged or not found:
        return judged
    most = max(abs(clock.offset) + clock.round_trip / 2 for clock in found.values())
    return [Judgement("well", "clocks", f"{len(found)} within {most * 1e3:.1f} ms of that of {node_name(0, places)}")]


def pairs(found: Pairs, places: Places) -> list[Judgement]:
    """Pairs of nodes that do not answer, nodes that are slow in all their pairs, and single slow pairs.

    A node is measured by its best pair, as each pair is as slow as its slower node.
    """
    failed = {pair: speed for pair, speed in found.items() if speed.failure}
    judged = [_failed(pair, speed, places) for pair, speed in failed.items()]
    good = {pair: speed for pair, speed in found.items() if not speed.failure}
    if not good:
        return judged
    best: dict[int, float] = {}
    for pair, speed in good.items():
        for rank in pair:
            best[rank] = max(best.get(rank, 0.0), speed.bandwidth)
    usual = median(best.values())
    slow = {rank for rank, bandwidth in best.items() if bandwidth < SLOW_LINK * usual}
    for rank in sorted(slow, key=lambda rank: best[rank]):
        share = best[rank] / usual
        text = f"the network of {where([rank], places)} carries {_rate(best[rank])} with the best of its peers, "
        text += f"{share:.0%} of the median of {len(best)} nodes ({_rate(usual)})"
        judged.append(Judgement(level_of(share), "links", text, (rank,)))
    judged += _slow_pairs(good, best, slow, places)
    rates = [speed.bandwidth for speed in good.values()]
    latency = median(speed.latency for speed in good.values())
    spread = _rate(min(rates)) if len(rates) == 1 else f"{_rate(min(rates))} to {_rate(max(rates))}"
    many = "1 pair" if len(good) == 1 else f"{len(good)} pairs"
    text = f"all-reduce of {many} of nodes at {spread}, {_short(latency)} for a single number"
    return judged or [Judgement("well", "links", text)]


def _failed(pair: tuple[int, int], speed: Speed, places: Places) -> Judgement:
    first, second = (where([rank], places) for rank in pair)
    return Judgement("error", "links", f"{first} and {second} do not reach each other: {speed.failure}", pair)


def _slow_pairs(good: Pairs, best: Mapping[int, float], slow: set[int], places: Places) -> Iterator[Judgement]:
    for pair, speed in good.items():
        own = min(best[rank] for rank in pair)
        if not slow & set(pair) and speed.bandwidth < SLOW_LINK * own:
            text = (
                f"{node_name(pair[0], places)} and {node_name(pair[1], places)} reach {_rate(speed.bandwidth)} between "
            )
            yield Judgement("warning", "links", f"{text}them, and each {_rate(own)} or more with another node", pair)


def together(found: Mapping[str, list[Speed]], size: int, count: int) -> list[Judgement]:
    """Collectives of all processes.

    Args:
        found: name of a collective → what each process measured.
        size: bytes of its tensor.
        count: number of processes.
    """
    judged = []
    for name, speeds in found.items():
        if failure := next((speed.failure for speed in speeds if speed.failure), ""):
            judged.append(Judgement("error", name, f"it fails among all {count} processes: {failure}"))
            continue
        rate, latency = min(speed.bandwidth for speed in speeds), max(speed.latency for speed in speeds)
        text = f"{size / 2**20:g} MiB among {count} processes, {_rate(rate)} from each, "
        judged.append(Judgement("well", name, f"{text}{_short(latency)} for a single number"))
    return judged


def environment(facts: Mapping[int, Facts], places: Places) -> list[Judgement]:
    """Variables that differ or slow down, interfaces that are not there, and limits that are too low."""
    judged = []
    for name in sorted({name for fact in facts.values() for name in fact.variables}):
        said = {rank: fact.variables.get(name, "not set") for rank, fact in facts.items()}
        judged += [one._replace(level="warning") for one in odd("environment", name, said, places)]
        if name in SLOWING and (off := [rank for rank, value in said.items() if value == "1"]):
            text = f"{name}=1 on {where(off, places)}: NCCL leaves a fast way unused"
            judged.append(Judgement("warning", "environment", text, tuple(off)))
    several = len({place.host for place in places.values()}) > 1
    for problem, ranks in _by_problem(facts, several).items():
        judged.append(Judgement("warning", "environment", f"{where(ranks, places)}: {problem}", tuple(ranks)))
    return judged or [Judgement("well", "environment", f"nothing odd in {len(facts)} processes")]


def _by_problem(facts: Mapping[int, Facts], several: bool) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, fact in facts.items():
        for problem in _problems(fact, several):
            found.setdefault(problem, []).append(rank)
    return found


def _problems(fact: Facts, several: bool) -> Iterator[str]:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = fact.variables.get(name, "")
        wanted = [] if value.startswith("^") else [word for word in value.removeprefix("=").split(",") if word]
        if wanted and not any(own.startswith(word) for word in wanted for own in fact.interfaces):
            yield f"{name}={value}, and the interfaces are {', '.join(fact.interfaces)}"
    if several and "GLOO_SOCKET_IFNAME" not in fact.variables and (not fact.address or fact.address.startswith("127.")):
        meaning = f"stands for {fact.address}" if fact.address else "is not resolved"
        yield f"its own name {meaning}, which gloo takes for its address: set GLOO_SOCKET_IFNAME"
    if 0 <= fact.open_files < OPEN_FILES:
        yield f"{fact.open_files} files may be open, which loader workers exceed: ulimit -n {OPEN_FILES} or more"
    if fact.infiniband and 0 <= fact.locked < GIB:
        yield f"{fact.locked / 1024:.0f} KiB may be locked (ulimit -l), and InfiniBand wants no limit"


def _rate(bandwidth: float) -> str:
    return f"{bandwidth / GIB:,.2f} GiB/s" if bandwidth >= GIB / 10 else f"{bandwidth / 2**20:,.1f} MiB/s"


def _short(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.0f} µs"
