"""From what processes said to what is well, what is odd and what is wrong, with numbers, and naming who it is.

Functions of this module only compare: `nodes` and `links` find out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Literal, NamedTuple

from lit_vlm.cluster.nodes import Device, Facts, Folder, Machine, Place

GIB = 2**30
SLOW_DEVICE = 0.8
"""Share of the usual speed below which a device is called slow."""
HALF = 0.5
"""Share below which that is an error: a job waits for its slowest part at every step, and would take twice as long."""
LITTLE, NEXT_TO_NOTHING = 10 * GIB, GIB
"""Free bytes of a folder below which there is a warning, and an error."""
SHARED_MEMORY = GIB
"""Free bytes of /dev/shm that loader workers should find; containers have 64 MiB unless told otherwise."""
IN_USE = 2 * GIB
"""Memory of a card in use before training; a process takes up to 1 GiB for being there."""
WHY_SLOW = "other work, a cap on power, heat, or fewer threads"


class Judgement(NamedTuple):
    """A sentence about one thing that was checked.

    Attributes:
        level: `well`; `warning`, with which a job may start; `error`, with which it must not.
        subject: what was checked.
        text: what was found, with numbers and names.
        ranks: processes that it is about; empty for all.
    """

    level: Literal["well", "warning", "error"]
    subject: str
    text: str
    ranks: tuple[int, ...] = ()


Places = Mapping[int, Place]


def where(ranks: Iterable[int], places: Places) -> str:
    """Names of processes: `n2 (rank 4), n3 (ranks 6-7)`."""
    by_node: dict[str, list[int]] = defaultdict(list)
    for rank in sorted(ranks):
        by_node[node_name(rank, places)].append(rank)
    return ", ".join(f"{node} ({_numbers(found)})" for node, found in by_node.items())


def missing(silent: Iterable[int], places: Places, nodes: Sequence[str], timeout: float) -> list[Judgement]:
    """Who never came.

    Args:
        silent: their ranks.
        places: of those that came.
        nodes: names of all machines, where they are known.
        timeout: seconds that were waited.
    """
    ranks = tuple(sorted(silent))
    if not ranks:
        return []
    empty = [node for node in nodes if node not in {place.node for place in places.values()}]
    text = f"{_numbers(ranks)} of {len(ranks) + len(places)} processes did not come within {timeout:.0f} s"
    text += f"; nobody came from {', '.join(empty)}" if empty else ""
    return [Judgement("error", "processes", f"{text}; there are {where(places, places)}", ranks)]


def lost(silent: Iterable[int], places: Places, when: str) -> list[Judgement]:
    """Who stopped answering in the middle.

    Args:
        silent: their ranks.
        places: of all processes.
        when: what was asked.
    """
    return [
        Judgement("error", "processes", f"{where([rank], places)} stopped answering at the check of {when}", (rank,))
        for rank in sorted(silent)
    ]


def versions(facts: Mapping[int, Facts], places: Places) -> list[Judgement]:
    """Packages, system and code of the kit: what most have is right."""
    names = dict.fromkeys(name for fact in facts.values() for name in fact.versions)
    found = []
    for name in names:
        said = {rank: fact.versions.get(name, "missing") for rank, fact in facts.items()}
        found += odd("versions", name, said, places)
    files = _odd_files(facts, places)
    first = next(iter(facts.values()))
    same = f"{len(names)} versions (Python {first.versions['Python']}, torch {first.versions['torch']}, lit-vlm "
    same += f"{first.versions['lit-vlm']}) and {len(first.sources)} files of the kit"
    return [*found, *files] or [Judgement("well", "versions", f"{same}{_alike(facts)}")]


def _odd_files(facts: Mapping[int, Facts], places: Places) -> list[Judgement]:
    wholes = {
        rank: "\n".join(f"{name} {fact.sources[name]}" for name in sorted(fact.sources)) for rank, fact in facts.items()
    }
    usual, others = _usual(wholes)
    right = next(facts[rank].sources for rank in facts if wholes[rank] == usual)
    found = []
    for ranks in others.values():
        own = facts[ranks[0]].sources
        differ = sorted(name for name in {*own, *right} if own.get(name) != right.get(name))
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        text = f"the code of {where(ranks, places)} differs from the others' in {', '.join(differ[:3])}{more}"
        found.append(Judgement("error", "versions", text, tuple(ranks)))
    return found


def devices(facts: Mapping[int, Facts], places: Places) -> list[Judgement]:
    """Kinds of devices, cards that two processes share, and memory that is taken already."""
    own = {rank: fact.device for rank, fact in facts.items()}
    found = odd("devices", "the kind of device", {rank: device.kind for rank, device in own.items()}, places)
    if not found:
        names = {rank: device.name for rank, device in own.items()}
        found = [one._replace(level="warning") for one in odd("devices", "the name of the device", names, places)]
    by_id: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, device in own.items():
        if device.id:
            by_id[places[rank].host, device.id].append(rank)
    shared = {rank for ranks in by_id.values() if len(ranks) > 1 for rank in ranks}
    for ranks in by_id.values():
        if len(ranks) > 1:
            text = f"{where(ranks, places)} share one card: give each its own (--gpus-per-task, CUDA_VISIBLE_DEVICES)"
            found.append(Judgement("error", "devices", text, tuple(ranks)))
    for rank, device in own.items():
        if device.used > IN_USE and rank not in shared:
            text = f"{device.used / GIB:.1f} GiB of the card of {where([rank], places)} are in use by others"
            found.append(Judgement("warning", "devices", text, (rank,)))
    kinds = Counter(device.name for device in own.values())
    counts = ", ".join(f"{count} × {name}" for name, count in kinds.items())
    return found or [Judgement("well", "devices", counts)]


def speeds(rates: Mapping[int, float], devices: Mapping[int, Device], places: Places) -> list[Judgement]:
    """Matrix products: slow devices among equal ones, the slowest first.

    Args:
        rates: rank → FLOP/s.
        devices: rank → what it is measured on.
        places: of all processes.
    """
    found: list[Judgement] = []
    for name in dict.fromkeys(devices[rank].name for rank in rates):
        equal = {rank: rate for rank, rate in rates.items() if devices[rank].name == name}
        usual = median(equal.values())
        for rank, rate in sorted(equal.items(), key=lambda item: item[1]):
            if (share := rate / usual) < SLOW_DEVICE:
                text = (
                    f"the {name} of {where([rank], places)} multiplies matrices at {_flops(rate)}, {share:.0%} of the "
                )
                text += f"median of {len(equal)} ({_flops(usual)}): {WHY_SLOW}?"
                found.append(Judgement(level_of(share), "matrix products", text, (rank,)))
    low, high = min(rates.values()), max(rates.values())
    text = _flops(high) if len(rates) == 1 else f"{_flops(low)} to {_flops(high)} on {len(rates)} devices"
    return found or [Judgement("well", "matrix products", text)]


def processors(facts: Mapping[int, Facts], places: Places) -> list[Judgement]:
    """Processors per process: one for itself, the others for loader workers."""
    by_node: dict[str, list[int]] = defaultdict(list)
    for rank in facts:
        by_node[places[rank].node].append(rank)
    found, each = [], []
    for ranks in by_node.values():
        count = len({number for rank in ranks for number in facts[rank].cpus})
        each.append(count // len(ranks))
        if count < len(ranks):
            text = f"{where(ranks, places)} have {count} processors for {len(ranks)} processes (--cpus-per-task)"
            found.append(Judgement("warning", "processors", text, tuple(ranks)))
    text = f"{min(each)} or more per process: room for data.num_workers up to {max(0, min(each) - 1)}"
    return found or [Judgement("well", "processors", text)]


def data(machines: Mapping[int, Machine], places: Places) -> list[Judgement]:
    """Whether all machines see the same under each path."""
    found = []
    paths = next(iter(machines.values())).data
    for path, first in paths.items():
        said = {rank: machine.data[path] for rank, machine in machines.items()}
        if set(said.values()) == {"nothing"}:
            found.append(Judgement("error", "data", f"{path} exists nowhere"))
        else:
            differing = odd("data", path, said, places)
            found += differing or [Judgement("well", "data", f"{path} is {first}{_alike(machines, 'nodes')}")]
    return found


def shared(seen: Mapping[int, float | None], folder: str, limit: float, places: Places) -> list[Judgement]:
    """Whether a file that the first process wrote is seen by all.

    Args:
        seen: rank → seconds until it was; None where it was not.
        folder: where it was written.
        limit: seconds that were waited.
        places: of all processes.
    """
    blind = tuple(rank for rank, seconds in seen.items() if seconds is None)
    if blind:
        text = f"{where(blind, places)} do not see within {limit:.0f} s what rank 0 wrote to {folder}: --out must be a "
        return [Judgement("error", "--out", f"{text}folder that all nodes share", blind)]
    latest = max(seconds or 0.0 for seconds in seen.values())
    return [Judgement("well", "--out", f"all nodes see what rank 0 wrote to {folder}, the last after {latest:.1f} s")]


def room(machines: Mapping[int, Machine], places: Places) -> list[Judgement]:
    """Folders that take files, free disk and shared memory."""
    found = []
    for rank, machine in machines.items():
        found += [one for use, folder in machine.folders.items() for one in _folder(rank, use, folder, places)]
        if machine.shared_memory is not None and machine.shared_memory < SHARED_MEMORY:
            text = f"{machine.shared_memory / 2**20:.0f} MiB are free in /dev/shm of {where([rank], places)}: loader "
            text += "workers die of a bus error without it (--shm-size, or data.num_workers 0)"
            found.append(Judgement("warning", "shared memory", text, (rank,)))
    least = {
        use: min(machine.folders[use].free for machine in machines.values()) / GIB
        for use in next(iter(machines.values())).folders
    }
    sizes = [machine.shared_memory for machine in machines.values() if machine.shared_memory is not None]
    texts = [f"at least {free:,.0f} GiB free for {use}" for use, free in least.items()]
    texts += [f"{min(sizes) / GIB:,.1f} GiB in /dev/shm"] if sizes else []
    return found or [Judgement("well", "room", ", ".join(texts))]


def _folder(rank: int, use: str, folder: Folder, places: Places) -> Iterator[Judgement]:
    name = f"{use} folder {folder.path}" if use == "cache" else f"{use} {folder.path}"
    if folder.problem is not None:
        text = f"{where([rank], places)} cannot write to the {name}: {folder.problem}"
        yield Judgement("error", "room", text, (rank,))
    elif folder.free < LITTLE:
        text = f"{folder.free / GIB:.1f} GiB are free in the {name} of {where([rank], places)}"
        yield Judgement("error" if folder.free < NEXT_TO_NOTHING else "warning", "room", text, (rank,))


# ----- words -----


def _usual(said: Mapping[int, str]) -> tuple[str, dict[str, list[int]]]:
    """What most say, of equals what the first says; and who says something else."""
    usual = Counter(said[rank] for rank in sorted(said)).most_common(1)[0][0]
    others: dict[str, list[int]] = defaultdict(list)
    for rank, word in said.items():
        if word != usual:
            others[word].append(rank)
    return usual, others


def odd(subject: str, what: str, said: Mapping[int, str], places: Places) -> list[Judgement]:
    """An error for each that says something else than most do.

    Args:
        subject: that the judgement is about.
        what: is compared.
        said: rank → what it is there.
        places: of all processes.
    """
    usual, others = _usual(said)
    right = [rank for rank, word in said.items() if word == usual]
    rest = where(right, places) if len(right) <= 2 else f"the {len(right)} others"
    return [
        Judgement("error", subject, f"{what}: {word} on {where(ranks, places)}, {usual} on {rest}", tuple(ranks))
        for word, ranks in others.items()
    ]


def node_name(rank: int, places: Places) -> str:
    """Name of the machine of a process; its number and name where the launcher only numbers machines."""
    place = places[rank]
    return f"node {place.node} ({place.host})" if place.node.isdigit() else place.node


def _numbers(ranks: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    text = ", ".join("-".join(map(str, span)) for span in spans)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def _alike(said: Mapping[int, object], of: str = "processes") -> str:
    return f", alike in {len(said)} {of}" if len(said) > 1 else ""


def level_of(share: float) -> Literal["warning", "error"]:
    """How bad it is that something has this share of the usual speed."""
    return "error" if share < HALF else "warning"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.1f} GFLOP/s"
