"""What a cluster asks of every job: partition, account, modules, containers; one YAML file per user."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from lit_vlm.core.settings import StrictYaml, checked, read_mapping
from lit_vlm.core.times import seconds_of

VARIABLE = "LIT_VLM_CLUSTER"
"""Environment variable: the file, in place of the user's own."""
NULL = "tag:yaml.org,2002:null"


class _Words(StrictYaml):
    """Reads values as they are written, as YAML would take 24:00:00 for the number 86400, and `on` for true."""


_Words.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag == NULL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class Site(BaseModel):
    """Settings of a cluster; flags of `lit-vlm submit` come before them.

    Attributes:
        partition: partition of the jobs.
        account: account that they are charged to.
        qos: quality of service.
        time: limit, as SLURM writes it: minutes, HH:MM:SS or D-HH.
        cpus_per_gpu: processor cores of each process, of which there is one per GPU.
        mem: memory of a node, as SLURM writes it: 200G; 0 for all.
        signal_before: seconds before the limit at which a run saves and leaves, to go on in the next job.
        container: program that runs containers: pyxis (a plugin of srun) or apptainer.
        mounts: folders of the host that containers see, besides the working folder.
        prologue: lines of shell at the beginning of the job script, such as `module load`.
        environment: environment variables; $NAME in a value is filled in on the node.
        local_cache: folder on a disk of the node, for what compilers keep; $NAME is filled in on the node.
        sbatch: further options of sbatch, such as --constraint=h100.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    cpus_per_gpu: int | None = Field(default=None, ge=1)
    mem: str | None = None
    signal_before: int = Field(default=180, ge=1, le=65535)
    container: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: tuple[str, ...] = ()
    prologue: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    local_cache: str | None = None
    sbatch: tuple[str, ...] = ()

    @field_validator("sbatch")
    @classmethod
    def _options(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        if bad := [line for line in lines if not line.startswith("-") or "\n" in line]:
            raise ValueError(f"these are options of sbatch, such as --constraint=h100, unlike {bad[0]!r}")
        return lines

    @field_validator("environment")
    @classmethod
    def _names(cls, variables: dict[str, str]) -> dict[str, str]:
        if bad := [name for name in variables if not re.fullmatch(r"[A-Za-z_]\w*", name)]:
            raise ValueError(f"{bad[0]!r} is no name of an environment variable")
        return variables


def site_file() -> Path:
    """The file of the settings, whether it exists or not."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser()
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "lit-vlm" / "cluster.yaml"


def read_site(file: Path | None = None) -> Site:
    """The settings of this cluster; the defaults where the user has no file.

    Args:
        file: the file; default: that of `LIT_VLM_CLUSTER`, or cluster.yaml among the user's settings.

    Raises:
        ValueError: for a file that is named and missing or cannot be read, an unknown key or a wrong value.
    """
    path = file or site_file()
    if not path.exists() and file is None and not os.environ.get(VARIABLE):
        return Site()
    content = read_mapping(path, "settings of a cluster, such as 'partition: gpu'", _Words, VARIABLE)
    site = checked(Site, content, str(path))
    if site.time is not None:
        check_time(site.time, site.signal_before, f"{path}: time")
    return site


def check_time(time: str, signal_before: int, where: str) -> None:
    """Refuse a limit that SLURM would refuse, or that leaves no time to train.

    Args:
        time: the limit.
        signal_before: seconds before it at which a run leaves.
        where: flag or key, for messages.

    Raises:
        ValueError: for such a limit.
    """
    seconds = seconds_of(time)
    if seconds is None:
        raise ValueError(
            f"{where} {time!r} is no length of time: write minutes (90), hours (24:00:00), or days and hours (2-12)"
        )
    if seconds <= signal_before + 60:  # SLURM sends a signal up to a minute early
        raise ValueError(
            f"{where} {time} is {seconds} s, and a run is told to save {signal_before} s before the end, or up to 60 s "
            "earlier: ask for more time, or lower signal_before of the site file"
        )
