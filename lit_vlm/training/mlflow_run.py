"""One run of MLflow. Reports wait while its store does not answer, and no failed report ends the training.

Reports that cannot be sent are kept in the file `mlflow_unsent-KEY.jsonl` of the run's folder, whose first line names
their MLflow run. They are sent again after a while, at the end, by `lit-vlm sync FOLDER`, and when the run is resumed.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_vlm.core.metric_names import safe_name, safe_names
from lit_vlm.training.mlflow_store import (
    absolute_uri,
    busy,
    connect,
    deliver,
    experiment_id,
    first_line,
    has_run,
    may_pass,
    read_lines,
    write_lines,
)

PARENT_RUN = "LIT_VLM_PARENT_RUN"
"""Environment variable: the MLflow run that `lit-vlm run` opened for all stages."""
RUN_FILE, UNSENT = "mlflow.json", "mlflow_unsent-{}.jsonl"
FIRST_WAIT, LONGEST_WAIT = 30.0, 600.0
"""Seconds before a store that did not answer is asked again; the wait doubles."""
BUSY_WAIT, BUSY_TRIES = 1.0, 6
"""Seconds before a SQLite file is asked again that others were writing for 20 s, and how often at a run's end."""
QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""Environment variables of MLflow: a server that is gone holds training up for seconds, not for four minutes."""
STATE, PREEMPTED = "state", "PREEMPTED"
"""Tag: RUNNING, FINISHED, FAILED, KILLED, or PREEMPTED for a run that left in order and can go on."""
MOST_PARAMS, MOST_LETTERS = 100, 5000

log = logging.getLogger(__name__)


class MLflowRun:
    """A run of MLflow that is opened when something is first reported.

    Args:
        uri: URI of the store.
        experiment: name of the experiment, which is made if the store has none of that name.
        name: name of the run, if a new one is opened.
        tags: tags of the run, if a new one is opened.
        folder: where unsent reports are kept; None keeps them in memory only.
        run_id: go on with this run, if the store still has it.
        key: names the file of unsent reports; default: a random one.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        name: str | None,
        tags: Mapping[str, str],
        folder: Path | None = None,
        run_id: str | None = None,
        key: str | None = None,
    ) -> None:
        for variable, value in QUICK.items():
            os.environ.setdefault(variable, value)
        self.uri, self.experiment, self.name, self.tags = absolute_uri(uri), experiment, name, dict(tags)
        self.folder, self.run_id, self.key = folder, run_id, key or uuid.uuid4().hex[:12]
        self.resumed = run_id is not None
        self._client: Any = None
        self._owns_folder = False
        self._pending = read_lines(self.unsent)[1:] if self.unsent is not None else []
        self._wait, self._again, self._busy = FIRST_WAIT, 0.0, False

    @property
    def unsent(self) -> Path | None:
        """The file of unsent reports; None without a folder."""
        return None if self.folder is None else self.folder / UNSENT.format(self.key)

    @staticmethod
    def of_folder(folder: Path) -> MLflowRun:
        """The run that a folder belongs to, with its unsent reports.

        Raises:
            ValueError: when the folder does not tell its run.
        """
        found = read_lines(folder / RUN_FILE)
        if not found or not {"tracking_uri", "run_id"} <= found[0].keys():
            raise ValueError(f"{folder} has no {RUN_FILE} that tells its MLflow run")
        run = _run_of(found[0], folder)
        run._owns_folder = True
        return run

    @staticmethod
    def of_unsent(file: Path) -> MLflowRun:
        """The run whose reports a file `mlflow_unsent-KEY.jsonl` keeps.

        Raises:
            ValueError: when the first line of the file names no run.
        """
        found = read_lines(file)
        if not found or "tracking_uri" not in found[0]:
            raise ValueError(f"{file}: its first line does not tell whose reports it keeps")
        run = _run_of(found[0], file.parent)
        owner = read_lines(file.parent / RUN_FILE)
        run._owns_folder = bool(owner) and owner[0].get("key") == run.key
        return run

    def owns_folder(self) -> None:
        """Write into the folder that it belongs to this run; `of_folder` finds the run by it."""
        self._owns_folder = True
        self._remember()

    # ------------------------------------------------------------------ reports

    def params(self, values: Mapping[str, Any]) -> None:
        """Report parameters; MLflow refuses a new value for a parameter that the run has."""
        named = [[key, str(value)[:MOST_LETTERS]] for key, value in safe_names(values).items()]
        for start in range(0, len(named), MOST_PARAMS):
            self._send({"kind": "params", "values": named[start : start + MOST_PARAMS]})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Report metrics of one step."""
        named = {key: float(value) for key, value in safe_names(values).items()}
        self._send({"kind": "metrics", "values": named, "step": step, "time": int(time.time() * 1000)})

    def tag(self, key: str, value: str) -> None:
        """Report one tag."""
        self._send({"kind": "tag", "key": safe_name(key), "value": value[:MOST_LETTERS]})

    def text(self, text: str, file: str) -> None:
        """Report a text, as a file of this name among the run's artifacts."""
        self._send({"kind": "text", "text": text, "file": file})

    def file(self, path: Path) -> None:
        """Report a file, under its own name among the run's artifacts."""
        self._send({"kind": "file", "path": str(path.absolute())})

    def going_on(self) -> None:
        """Report that the run is running."""
        self.tag(STATE, "RUNNING")
        self._send({"kind": "status", "status": "RUNNING"})

    def preempted(self, reason: str) -> None:
        """Report that the run leaves in order and can go on, for which MLflow has no status: a tag says so."""
        self.tag("preempted", reason)
        self._end("KILLED", PREEMPTED)

    def end(self, status: str) -> None:
        """Report the last status (FINISHED, FAILED or KILLED), and try once more to send waiting reports.

        A run that finished keeps no tag `failure` of an earlier attempt.
        """
        self._end(status, status)

    def _end(self, status: str, state: str) -> None:
        self._again = 0.0
        self.tag(STATE, state)
        self._send({"kind": "status", "status": status, "time": int(time.time() * 1000)})
        for _ in range(BUSY_TRIES):
            if not (self._pending and self._busy):
                break
            time.sleep(BUSY_WAIT * random.uniform(1, 2))  # else those that end together meet again
            self.flush()
        if self._pending:
            kept = f"are kept: lit-vlm sync {self.folder} sends them" if self.folder else "are lost"
            log.warning("MLflow: %d reports could not be sent to %s and %s", len(self._pending), self.uri, kept)

    # ------------------------------------------------------------------ sending

    def open(self) -> bool:
        """Try to open the run, or a new one where the store no longer has it. Returns whether the store answered."""
        if self._client is not None:
            return True
        try:
            self._open()
        except Exception as error:
            self._fail(error)
            return False
        return True

    def flush(self) -> int:
        """Try now to send waiting reports. Returns how many still wait."""
        self._again = 0.0
        self._deliver_all()
        return len(self._pending)

    def _send(self, entry: dict[str, Any]) -> None:
        self._pending.append(entry)
        if self._deliver_all() == 0 and self._pending:
            self._keep(entry)

    def _deliver_all(self) -> int:
        """Send waiting reports in order while the store answers. Returns how many were sent or refused."""
        done = 0
        if time.monotonic() >= self._again and self.open():
            for entry in self._pending:
                try:
                    deliver(self._client, self.run_id, entry)
                except Exception as error:  # no failed report may end the training
                    if may_pass(error, entry["kind"]):
                        self._fail(error)
                        break
                    log.warning("MLflow: a report is left out (%s): %s", entry["kind"], first_line(error))
                done += 1
            del self._pending[:done]
            if not self._pending:
                self._wait = FIRST_WAIT
        if done and self.unsent is not None and self.unsent.exists():
            self._write()
        return done

    def _fail(self, error: Exception) -> None:
        """Note that the store does not answer, and when to ask it again."""
        self._busy = busy(error)
        if self._busy:
            self._again = time.monotonic() + BUSY_WAIT
            return
        if self._wait == FIRST_WAIT:
            log.warning("MLflow: %s does not answer (%s); work goes on, reports wait", self.uri, first_line(error))
        self._again = time.monotonic() + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT)

    def _open(self) -> None:
        from mlflow.tracking.context.registry import resolve_tags

        client = connect(self.uri)
        if self.run_id is not None and not has_run(client, self.run_id):
            log.warning("MLflow: %s has no run %s any more; a new one goes on from here", self.uri, self.run_id)
            self.run_id, self.resumed = None, False
        if self.run_id is None:
            experiment = experiment_id(client, self.experiment)
            tags = {safe_name(key): value[:MOST_LETTERS] for key, value in self.tags.items()}
            tags = resolve_tags(tags)  # adds user and source, as MLflow's start_run does
            self.run_id = client.create_run(experiment, run_name=self.name, tags=tags).info.run_id
        self._client = client
        self._remember()

    def _identity(self) -> dict[str, Any]:
        return {
            "tracking_uri": self.uri,
            "run_id": self.run_id,
            "experiment": self.experiment,
            "name": self.name,
            "tags": self.tags,
            "key": self.key,
        }

    def _remember(self) -> None:
        """Write the run's identity into the folder's file and into the first line of unsent reports."""
        if self.folder is not None and self._owns_folder:
            write_lines(self.folder / RUN_FILE, [self._identity()])
        if self._pending and self.unsent is not None and self.unsent.exists():
            self._write()

    def _keep(self, entry: Mapping[str, Any]) -> None:
        """Add a report that could not be sent to the file of unsent reports."""
        if self.unsent is None:
            return
        if not self.unsent.exists():
            self._write()
            return
        try:
            with self.unsent.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", self.unsent, error)

    def _write(self) -> None:
        """Write the file of unsent reports anew; remove it if none is left."""
        assert self.unsent is not None
        if self._pending:
            write_lines(self.unsent, [self._identity(), *self._pending])
        else:
            self.unsent.unlink(missing_ok=True)


def known_run(folder: Path, given: str | None) -> MLflowRun | None:
    """The MLflow run that a folder belongs to, to go on with; None, with a warning, where another store is named.

    Args:
        folder: folder of the run that goes on.
        given: URI of the store that a flag or the environment names; None if neither does.
    """
    if not (folder / RUN_FILE).is_file():
        return None
    try:
        known = MLflowRun.of_folder(folder)
    except ValueError as error:
        log.warning("MLflow: %s; a new run goes on from here", error)
        return None
    if given is None or absolute_uri(given) == known.uri:
        return known
    log.warning("MLflow: this run began in %s; a new one goes on in %s", known.uri, absolute_uri(given))
    return None


def _run_of(known: Mapping[str, Any], folder: Path) -> MLflowRun:
    run_id = known.get("run_id")
    return MLflowRun(
        known["tracking_uri"],
        known.get("experiment", "lit-vlm"),
        known.get("name"),
        known.get("tags", {}),
        folder,
        run_id,
        known.get("key") or (run_id and run_id[:12]),
    )
