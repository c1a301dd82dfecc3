"""Stores of MLflow: their URIs and clients, their errors, and files of JSON lines for unsent reports."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_vlm.core.written import write_whole

DEFAULT_URI = "sqlite:///mlflow.db"
SQLITE = "sqlite:///"
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")
"""Error codes by which MLflow refuses a report for good; other errors, such as expired credentials, may pass."""
FAILURE = "failure"
"""Tag: why a run ended before its end."""
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tag of an experiment: MLflow's pages open its table of training runs, and not that of traces of a language model."""

log = logging.getLogger(__name__)


def default_uri(uri: str | None = None) -> str:
    """The given URI, or `MLFLOW_TRACKING_URI`, or mlflow.db in the current folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def absolute_uri(uri: str) -> str:
    """A URI that names the same store from any working folder: a SQLite file by its absolute path."""
    if not uri.startswith(SQLITE) or uri.startswith(f"{SQLITE}/"):
        return uri
    _, mark, options = uri.partition("?")
    return f"{SQLITE}{sqlite_file(uri).absolute()}{mark}{options}"


def sqlite_file(uri: str) -> Path:
    """The file of a SQLite store, whose URI may have options, such as `?timeout=60`."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0])


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; an incomplete line is left out, with a warning."""
    found = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read: %s", file, error)
        lines = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            log.warning("%s, line %d is no whole report and is left out", file, number)
    return found


def write_lines(file: Path, values: Sequence[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines, whole or not at all; a file that cannot be written is only warned of."""
    try:
        write_whole(file, "".join(json.dumps(value) + "\n" for value in values))
    except OSError as error:
        log.warning("%s cannot be written: %s", file, error)


def may_pass(error: Exception, kind: str) -> bool:
    """Whether the store may take this report later; one that it refuses for good must not hold up the others."""
    if (code := getattr(error, "error_code", None)) is not None:
        return code not in REFUSED
    if kind in ("file", "text"):  # stores of artifacts, such as S3, have errors of their own
        return not isinstance(error, FileNotFoundError | PermissionError)
    return isinstance(error, OSError)  # as those of requests are


def first_line(error: Exception) -> str:
    """Class and first line of an error, at most 200 characters, for a warning."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def connect(uri: str) -> Any:
    """The client of a store; a SQLite file that is not there yet is made.

    Raises:
        Exception: whatever MLflow, or SQLite, raises where the store does not answer.
    """
    from mlflow import MlflowClient

    if uri.startswith(SQLITE):
        file = sqlite_file(uri)
        if not file.exists():
            _make(file)
        # Fails at once where the file cannot be opened, which MLflow tries for minutes.
        sqlite3.connect(file).close()
    return MlflowClient(uri)


def _make(file: Path) -> None:
    """Make a SQLite store, whole or not at all.

    MLflow makes the tables in a hundred steps, in which processes that start together, such as the tasks of a job
    array, disturb each other for good, as one that is killed does. So each makes a file of its own, and the first to be
    done gives it its name: without a lock, as those of shared disks may not hold between machines.

    Raises:
        Exception: as of `connect`.
    """
    scratch = file.with_name(f".{file.name}-{uuid.uuid4().hex[:12]}")
    sqlite3.connect(scratch).close()
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    try:
        store = SqlAlchemyStore(f"{SQLITE}{scratch}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
        store.engine.dispose()
        with suppress(FileExistsError):  # another process was faster
            _link(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)


def _link(scratch: Path, file: Path) -> None:
    """Give a file a second name, or another one where the file system has no links.

    Raises:
        FileExistsError: where the name is taken.
    """
    try:
        os.link(scratch, file)
    except FileExistsError:
        raise
    except OSError:
        if file.exists():
            raise FileExistsError(str(file)) from None
        scratch.rename(file)


def busy(error: BaseException | None) -> bool:
    """Whether an error is, or stems from, a SQLite file that another process is writing, which passes soon."""
    while error is not None:
        if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 255 in (
            sqlite3.SQLITE_BUSY,
            sqlite3.SQLITE_LOCKED,
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def has_run(client: Any, run_id: str) -> bool:
    """Whether the store has an active run of this id.

    Raises:
        MlflowException: where the store does not answer.
    """
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code in (*REFUSED, "RESOURCE_DOES_NOT_EXIST"):
            return False
        raise


def experiment_id(client: Any, name: str) -> str:
    """The id of an experiment of training runs, which is made if there is none, or restored if it was deleted.

    Raises:
        MlflowException: where the store does not answer.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, tags=KIND))
        except MlflowException:  # another run may have made it at the same time
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        log.warning("MLflow: the experiment '%s' was deleted; it is restored for the new run", name)
        client.restore_experiment(found.experiment_id)
    for key, value in KIND.items():
        if key not in found.tags:
            with suppress(MlflowException):  # a server may refuse changes to an experiment of somebody else
                client.set_experiment_tag(found.experiment_id, key, value)
    return str(found.experiment_id)


def deliver(client: Any, run_id: str | None, entry: Mapping[str, Any]) -> None:
    """Send one report of a run.

    Raises:
        Exception: whatever MLflow raises where the store does not answer, or refuses the report.
    """
    from mlflow.entities import Metric, Param

    match entry["kind"]:
        case "params":
            client.log_batch(run_id, params=[Param(key, value) for key, value in entry["values"]])
        case "metrics":
            when, step = entry["time"], entry["step"]
            metrics = [Metric(key, value, when, step) for key, value in entry["values"].items()]
            client.log_batch(run_id, metrics=metrics)
        case "tag":
            client.set_tag(run_id, entry["key"], entry["value"])
        case "text":
            client.log_text(run_id, entry["text"], entry["file"])
        case "file":
            client.log_artifact(run_id, entry["path"])
        case "status" if "time" in entry:
            if entry["status"] == "FINISHED" and FAILURE in client.get_run(run_id).data.tags:
                client.delete_tag(run_id, FAILURE)  # of an earlier attempt
            client.set_terminated(run_id, entry["status"], entry["time"])
        case "status":
            client.update_run(run_id, entry["status"])
