"""One run of MLflow, reported to whenever its store can be reached: reporting never ends the work it reports on.

What cannot be sent is kept in `mlflow_unsent.jsonl` of the run's folder, tried again after a while and at the end, and
sent by `lit-vlm sync FOLDER` or by whoever goes on with the run.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from lit_vlm.metric_names import safe_names
from lit_vlm.pretrained import cache_dir

DEFAULT_URI = "sqlite:///mlflow.db"
PARENT_RUN = "LIT_VLM_PARENT_RUN"
"""Environment variable: the MLflow run that `lit-vlm run` opened for all stages."""
RUN_FILE, UNSENT = "mlflow.json", "mlflow_unsent.jsonl"
SQLITE = "sqlite:///"
TRANSIENT = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
"""Error codes of MLflow that may be gone later; the others refuse what was sent."""
FIRST_WAIT, LONGEST_WAIT = 30.0, 600.0
"""Seconds before a store that did not answer is asked again; the wait doubles."""
QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""Training waits for a server that is gone: for seconds, not for the four minutes of MLflow's own defaults."""
MOST_PARAMS, MOST_LETTERS = 100, 5000

log = logging.getLogger(__name__)


def default_uri(uri: str | None = None) -> str:
    """The given URI, or `MLFLOW_TRACKING_URI`, or mlflow.db in the current folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def absolute_uri(uri: str) -> str:
    """The same store from any working folder: a relative SQLite file by its whole path."""
    if not uri.startswith(SQLITE) or uri.startswith(f"{SQLITE}/"):
        return uri
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"


class MLflowRun:
    """A run that is opened when something is first sent.

    Args:
        uri: of the store.
        experiment: its name; it is made if there is none.
        name: of a new run.
        tags: of a new run.
        folder: where `mlflow.json` and what could not be sent are kept; None keeps the latter in memory only.
        run_id: go on with this run, if the store still has it.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        name: str | None,
        tags: Mapping[str, str],
        folder: Path | None = None,
        run_id: str | None = None,
    ) -> None:
        for key, value in QUICK.items():
            os.environ.setdefault(key, value)
        self.uri, self.experiment, self.name, self.tags = absolute_uri(uri), experiment, name, dict(tags)
        self.folder, self.run_id = folder, run_id
        self.resumed = run_id is not None
        self._client: Any = None
        self._pending = self._read()
        self._kept = bool(self._pending)
        self._wait, self._again = FIRST_WAIT, 0.0

    @staticmethod
    def of_folder(folder: Path) -> MLflowRun:
        """The run that a folder belongs to.

        Raises:
            ValueError: when it belongs to none.
        """
        file = folder / RUN_FILE
        if not file.is_file():
            raise ValueError(f"{folder} has no {RUN_FILE}, so no MLflow run belongs to it")
        known = json.loads(file.read_text(encoding="utf-8"))
        return MLflowRun(
            known["tracking_uri"],
            known.get("experiment", "lit-vlm"),
            known.get("name"),
            known.get("tags", {}),
            folder,
            known["run_id"],
        )

    # ------------------------------------------------------------------ what is reported

    def params(self, values: Mapping[str, Any]) -> None:
        """Parameters; MLflow refuses other values for those that a run has."""
        named = [[key, str(value)[:MOST_LETTERS]] for key, value in safe_names(values).items()]
        for start in range(0, len(named), MOST_PARAMS):
            self._send({"kind": "params", "values": named[start : start + MOST_PARAMS]})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Metrics of one step."""
        named = {key: float(value) for key, value in safe_names(values).items()}
        self._send({"kind": "metrics", "values": named, "step": step, "time": int(time.time() * 1000)})

    def tag(self, key: str, value: str) -> None:
        """One tag."""
        self._send({"kind": "tag", "key": key, "value": value[:MOST_LETTERS]})

    def text(self, text: str, file: str) -> None:
        """A text as a file among the run's artifacts."""
        self._send({"kind": "text", "text": text, "file": file})

    def file(self, path: Path) -> None:
        """A file among the run's artifacts, under its own name."""
        self._send({"kind": "file", "path": str(path.absolute())})

    def going_on(self) -> None:
        """The run is running."""
        self._send({"kind": "status", "status": "RUNNING"})

    def end(self, status: str) -> None:
        """Set the last status (FINISHED, FAILED or KILLED), and try once more to send what is waiting."""
        self._again = 0.0
        self._send({"kind": "status", "status": status, "time": int(time.time() * 1000)})
        if self._pending:
            kept = f"are kept: lit-vlm sync {self.folder} sends them" if self.folder else "are lost"
            log.warning("MLflow: %d reports could not be sent to %s and %s", len(self._pending), self.uri, kept)

    # ------------------------------------------------------------------ how

    def open(self) -> bool:
        """Try to open the run; whether the store answered. A run that is gone is replaced by a new one."""
        if self._client is not None:
            return True
        try:
            self._open()
        except Exception as error:
            self._fail(error)
            return False
        return True

    def flush(self) -> int:
        """Send what is waiting, now; the number of reports that still wait."""
        self._again = 0.0
        self._deliver_all()
        return len(self._pending)

    def _send(self, entry: dict[str, Any]) -> None:
        self._pending.append(entry)
        if self._deliver_all() == 0 and self._pending:
            self._keep(entry)

    def _deliver_all(self) -> int:
        """Send what waits, in order, as long as the store answers; how many reports are done with."""
        done = 0
        if time.monotonic() >= self._again and self.open():
            for entry in self._pending:
                try:
                    self._deliver(entry)
                except Exception as error:  # whatever it is, it must not end the work
                    if _may_pass(error, entry["kind"]):
                        self._fail(error)
                        break
                    log.warning("MLflow: a report is left out (%s): %s", entry["kind"], _first_line(error))
                done += 1
            del self._pending[:done]
            if not self._pending:
                self._wait = FIRST_WAIT
        if done and self._kept:
            self._rewrite()
        return done

    def _fail(self, error: Exception) -> None:
        """Note that the store does not answer, and when to ask it again."""
        if self._wait == FIRST_WAIT:
            log.warning("MLflow: %s does not answer (%s); work goes on, reports wait", self.uri, _first_line(error))
        self._again = time.monotonic() + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT)

    def _open(self) -> None:
        from mlflow import MlflowClient
        from mlflow.tracking.context.registry import resolve_tags

        if self.uri.startswith(SQLITE):
            # MLflow tries for minutes to open a file that cannot be opened.
            sqlite3.connect(self.uri.removeprefix(SQLITE)).close()
        with _first_use(self.uri):
            client = MlflowClient(self.uri)
            if self.run_id is not None and not _has(client, self.run_id):
                log.warning("MLflow: %s has no run %s any more; a new one goes on from here", self.uri, self.run_id)
                self.run_id, self.resumed = None, False
            if self.run_id is None:
                experiment = _experiment(client, self.experiment)
                tags = resolve_tags(self.tags)  # with user and source, as MLflow's own start_run has them
                self.run_id = client.create_run(experiment, run_name=self.name, tags=tags).info.run_id
        self._client = client
        self.remember()

    def remember(self) -> None:
        """Write into the folder which run it belongs to."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            known = {
                "tracking_uri": self.uri,
                "run_id": self.run_id,
                "experiment": self.experiment,
                "name": self.name,
                "tags": self.tags,
            }
            (self.folder / RUN_FILE).write_text(json.dumps(known), encoding="utf-8")

    def _deliver(self, entry: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param

        client, run = self._client, self.run_id
        match entry["kind"]:
            case "params":
                client.log_batch(run, params=[Param(key, value) for key, value in entry["values"]])
            case "metrics":
                when, step = entry["time"], entry["step"]
                metrics = [Metric(key, value, when, step) for key, value in entry["values"].items()]
                client.log_batch(run, metrics=metrics)
            case "tag":
                client.set_tag(run, entry["key"], entry["value"])
            case "text":
                client.log_text(run, entry["text"], entry["file"])
            case "file":
                client.log_artifact(run, entry["path"])
            case "status" if "time" in entry:
                client.set_terminated(run, entry["status"], entry["time"])
            case "status":
                client.update_run(run, entry["status"])

    def _read(self) -> list[dict[str, Any]]:
        if self.folder is None or not (self.folder / UNSENT).is_file():
            return []
        lines = (self.folder / UNSENT).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def _keep(self, entry: Mapping[str, Any]) -> None:
        """Add what could not be sent to the file of the run's folder."""
        if self.folder is not None:
            self._kept = True
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with (self.folder / UNSENT).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                log.warning("%s cannot be written: %s", self.folder / UNSENT, error)

    def _rewrite(self) -> None:
        """Leave in the file what still waits; no file where nothing does."""
        assert self.folder is not None
        file = self.folder / UNSENT
        scratch = file.with_suffix(".partial")
        scratch.write_text("".join(json.dumps(entry) + "\n" for entry in self._pending), encoding="utf-8")
        scratch.replace(file)
        if not self._pending:
            file.unlink()
            self._kept = False


def _may_pass(error: Exception, kind: str) -> bool:
    """Whether the same report may be taken later; what is refused for itself must not hold up the others."""
    if (code := getattr(error, "error_code", None)) is not None:
        return code in TRANSIENT
    from requests import RequestException

    # A file that is not there, or a folder of artifacts that cannot be written, is no matter of waiting.
    return isinstance(error, RequestException) or kind not in ("file", "text")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@contextmanager
def _first_use(uri: str) -> Iterator[None]:
    """Runs that start together make the tables of a new SQLite file one after the other."""
    with FileLock(cache_dir() / "mlflow.lock") if uri.startswith(SQLITE) else nullcontext():
        yield


def _has(client: Any, run_id: str) -> bool:
    """Whether the store has an active run of this id; raises where it does not answer."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code in TRANSIENT:
            raise
        return False


def _experiment(client: Any, name: str) -> str:
    """The id of an experiment; of two runs that make it at the same time, one takes what the other made."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        log.warning("MLflow: the experiment '%s' was deleted; it is restored for the new run", name)
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)
