"""Reporting to MLflow: names that it takes, stores that are new, gone, or come back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2

from lit_vlm import mlflow_run
from lit_vlm.commands.cli import main
from lit_vlm.core.metric_names import safe_name
from lit_vlm.training.mlflow_run import UNSENT, MLflowRun, known_run
from lit_vlm.training.mlflow_store import absolute_uri, busy, connect, may_pass
from tests.forkserver import interpreter
from tests.runs import environment, one_step

ONE_RUN = """
from lit_vlm.training.mlflow_run import MLflowRun
run = MLflowRun("sqlite:///mlflow.db", "lit-vlm", "together", {})
for step in range(5):
    run.metrics({"a": float(step)}, step)
run.end("FINISHED")
"""


def unsent(folder: Path) -> list[Path]:
    """The files of what could not be sent."""
    return sorted(folder.glob(UNSENT.format("*")))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with MLflow's tables, which take seconds to make."""
    file = tmp_path_factory.mktemp("store") / "m.db"
    assert MLflowRun(f"sqlite:///{file}", "e", None, {}).open()
    return file


@pytest.fixture
def uri(tmp_path: Path, tables: Path) -> str:
    """A store of this test alone."""
    return f"sqlite:///{shutil.copy(tables, tmp_path / 'm.db')}"


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("val/loss_next_token", "val/loss_next_token"),
        ("data.mixture.weights.mix (1)", "data.mixture.weights.mix _1_"),
        ("data/samples/训练集", "data/samples/训练集"),
        ("data/samples/", "data/samples/_"),
        ("loss/..", "loss/__"),
        ("./x", "_/x"),
        ("a@b%", "a_b_"),
    ],
)
def test_names_become_such_as_mlflow_takes(uri: str, name: str, safe: str) -> None:
    assert safe_name(name) == safe
    run = MLflowRun(uri, "e", None, {})
    run.metrics({name: 2.0}, 3)
    run.params({name: "value"})
    found = MlflowClient(run.uri).get_run(run.run_id).data
    assert (found.metrics, found.params) == ({safe: 2.0}, {safe: "value"})


def test_a_relative_store_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri(f"sqlite:///{tmp_path}/mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("sqlite:///mlflow.db?timeout=60") == f"sqlite:///{tmp_path}/mlflow.db?timeout=60"
    assert absolute_uri("http://host:5000") == "http://host:5000"


def test_a_store_may_have_options(tmp_path: Path, tables: Path) -> None:
    shutil.copy(tables, tmp_path / "m.db")
    run = MLflowRun(f"sqlite:///{tmp_path}/m.db?timeout=60", "e", None, {})
    run.metrics({"a": 1.0}, 0)
    assert run.run_id is not None
    assert MlflowClient(f"sqlite:///{tmp_path}/m.db").get_run(run.run_id).data.metrics == {"a": 1.0}
    assert [file.name for file in tmp_path.iterdir()] == ["m.db"]


def test_runs_that_start_together_in_a_new_folder_all_get_a_run(tmp_path: Path) -> None:
    """As the tasks of a job array do, on machines that share this folder and no other."""
    (tmp_path / "one_run.py").write_text(ONE_RUN)
    command = [interpreter(), "-m", "one_run"]
    tasks = []
    for number in range(8):
        own = tmp_path / f"machine{number}"
        own.mkdir()
        variables = environment(tmp_path) | {"LIT_VLM_CACHE": str(own), "TMPDIR": str(own)}
        tasks.append(subprocess.Popen(command, cwd=tmp_path, env=variables))
    assert [process.wait() for process in tasks] == [0] * 8
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("lit-vlm").experiment_id])
    assert [(run.info.status, run.data.metrics) for run in runs] == [("FINISHED", {"a": 4.0})] * 8
    for run in runs:
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, "a")] == [0, 1, 2, 3, 4]
    assert not list(tmp_path.glob(".mlflow.db*"))


def test_a_store_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", killed)
        with pytest.raises(KeyboardInterrupt):
            connect(f"sqlite:///{tmp_path}/m.db")
    assert not list(tmp_path.iterdir())
    assert MLflowRun(f"sqlite:///{tmp_path}/m.db", "e", None, {}).open()


@pytest.mark.slow
def test_reports_to_a_file_that_others_write_come_later(tmp_path: Path, uri: str) -> None:
    run = MLflowRun(uri, "e", None, {}, tmp_path)
    assert run.open()
    other = sqlite3.connect(tmp_path / "m.db", check_same_thread=False)
    other.execute("begin exclusive")
    release = threading.Timer(22, other.rollback)  # MLflow itself waits for 20 s
    release.start()
    run.metrics({"a": 1.0}, 0)
    assert run.unsent is not None
    assert len(run.unsent.read_text().splitlines()) == 2  # the run, and the report
    run.end("FINISHED")
    release.join()
    found = MlflowClient(uri).get_run(run.run_id)
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"a": 1.0})
    assert not run.unsent.exists()


def test_a_file_that_others_write_is_told_from_one_that_cannot_be_opened(tmp_path: Path, uri: str) -> None:
    with sqlite3.connect(tmp_path / "m.db") as other, sqlite3.connect(tmp_path / "m.db", timeout=0) as own:
        other.execute("begin exclusive")
        with pytest.raises(sqlite3.OperationalError) as locked:
            own.execute("begin exclusive")
        other.rollback()
    wrapped = MlflowException("of MLflow")
    wrapped.__cause__ = locked.value
    assert busy(locked.value)
    assert busy(wrapped)
    with pytest.raises(sqlite3.OperationalError) as absent:
        connect(f"sqlite:///{tmp_path}/nowhere/m.db")
    assert not busy(absent.value)
    assert not busy(MlflowException("of MLflow"))


@pytest.mark.parametrize("gone", ["deleted", "store"])
def test_a_run_that_is_gone_is_replaced_by_a_new_one(
    tmp_path: Path, tables: Path, uri: str, gone: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = MLflowRun(uri, "e", "stage", {"mlflow.parentRunId": "p"}, tmp_path)
    first.owns_folder()
    first.metrics({"a": 1.0}, 0)
    if gone == "deleted":
        MlflowClient(uri).delete_run(first.run_id)
    else:
        uri = f"sqlite:///{shutil.copy(tables, tmp_path / 'new.db')}"
        known = json.loads((tmp_path / "mlflow.json").read_text())
        (tmp_path / "mlflow.json").write_text(json.dumps(known | {"tracking_uri": uri}))
    second = MLflowRun.of_folder(tmp_path)
    assert second.resumed
    second.metrics({"a": 2.0}, 1)
    assert not second.resumed
    assert second.run_id != first.run_id
    assert f"has no run {first.run_id} any more" in caplog.text
    found = MlflowClient(uri).get_run(second.run_id)
    assert found.data.tags["mlflow.parentRunId"] == "p"
    assert found.info.run_name == "stage"


def test_the_experiment_is_one_of_training_runs(uri: str) -> None:
    kind = {"mlflow.experimentKind": "custom_model_development"}
    client = MlflowClient(uri)
    assert MLflowRun(uri, "new", None, {}).open()
    assert client.get_experiment_by_name("new").tags == kind
    client.create_experiment("earlier")
    client.create_experiment("chosen", tags={"mlflow.experimentKind": "genai_development"})
    for name in ("earlier", "chosen"):
        assert MLflowRun(uri, name, None, {}).open()
    assert client.get_experiment_by_name("earlier").tags == kind
    assert client.get_experiment_by_name("chosen").tags == {"mlflow.experimentKind": "genai_development"}


@pytest.mark.parametrize("sent", ["at once", "later"])
def test_a_run_that_finished_keeps_no_failure(tmp_path: Path, uri: str, sent: str) -> None:
    first = MLflowRun(uri, "e", None, {}, tmp_path)
    first.owns_folder()
    first.tag("failure", "a cable was pulled")
    first.end("FAILED")
    client = MlflowClient(uri)
    assert client.get_run(first.run_id).data.tags["failure"] == "a cable was pulled"
    second = MLflowRun.of_folder(tmp_path)
    if sent == "later":
        (tmp_path / "m.db").rename(tmp_path / "away.db")
        (tmp_path / "m.db").mkdir()
    second.tag("failure", "another one")  # of a second attempt, which waits as well
    second.end("FAILED")
    second.end("FINISHED")
    if sent == "later":
        (file,) = unsent(tmp_path)
        (tmp_path / "m.db").rmdir()
        (tmp_path / "away.db").rename(tmp_path / "m.db")
        assert MLflowRun.of_unsent(file).flush() == 0
    found = client.get_run(first.run_id)
    assert (found.info.status, found.data.tags["state"]) == ("FINISHED", "FINISHED")
    assert "failure" not in found.data.tags


def test_tags_that_mlflow_would_refuse_are_made_such_as_it_takes(uri: str) -> None:
    run = MLflowRun(uri, "e", None, {"a@b": "x" * 6000})
    run.tag("c@d", "y")
    tags = MlflowClient(run.uri).get_run(run.run_id).data.tags
    assert (len(tags["a_b"]), tags["c_d"]) == (5000, "y")


def test_what_is_refused_does_not_hold_up_the_rest(tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    run = MLflowRun(uri, "e", None, {}, tmp_path)
    run.params({"lr": "1"})
    run.params({"lr": "2"})  # MLflow never takes a second value
    run.file(tmp_path / "absent.png")
    run.metrics({"a": 1.0}, 0)
    assert caplog.text.count("a report is left out") == 2
    assert MlflowClient(run.uri).get_run(run.run_id).data.metrics == {"a": 1.0}
    assert not unsent(tmp_path)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """A real MLflow server on loopback that can be ended and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        self.process = subprocess.Popen(
            [*command, *store], cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0
        )
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2)
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("the server did not start")

    def end(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.end()


@pytest.mark.slow
def test_reports_wait_for_a_server_that_goes_and_comes_back(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder = tmp_path / "run"
    before = MLflowRun(server.uri, "e", "early", {"tag": "kept"}, folder)
    before.owns_folder()
    before.metrics({"a": 0.0}, 0)  # nobody is there yet
    assert before.run_id is None
    server.start()
    run = MLflowRun.of_folder(folder)
    run.metrics({"a": 1.0}, 1)
    client = MlflowClient(server.uri)
    assert [metric.step for metric in client.get_metric_history(run.run_id, "a")] == [0, 1]
    server.end()
    start = time.perf_counter()
    run.metrics({"a": 2.0}, 2)
    first = time.perf_counter() - start
    start = time.perf_counter()
    for step in range(3, 60):
        run.metrics({"a": float(step)}, step)
    assert time.perf_counter() - start < max(5.0, 3 * first), "a server that is gone was asked again for each report"
    run.end("FINISHED")
    (file,) = unsent(folder)
    whose, *kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert whose["run_id"] == run.run_id
    assert [entry["kind"] for entry in kept] == ["metrics"] * 58 + ["tag", "status"]
    with pytest.raises(SystemExit):
        main(["sync", str(tmp_path)])
    assert "60 reports could not be sent" in capsys.readouterr().err
    server.start()
    main(["sync", str(tmp_path)])
    assert not unsent(folder)
    found = client.get_run(run.run_id)
    assert (found.info.status, found.data.metrics["a"], found.data.tags["tag"]) == ("FINISHED", 59.0, "kept")
    main(["sync", str(tmp_path)])
    assert "nothing waits" in capsys.readouterr().out


def test_a_folder_that_belongs_to_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no mlflow.json that tells"):
        MLflowRun.of_folder(tmp_path)


def test_a_store_that_never_answers_does_not_end_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mlflow_run, "FIRST_WAIT", 0.0)
    run = MLflowRun(dead(tmp_path), "e", None, {}, tmp_path)
    run.metrics({"a": 1.0}, 0)
    run.end("FINISHED")
    assert run.run_id is None
    assert "does not answer" in caplog.text
    assert f"lit-vlm sync {tmp_path}" in caplog.text
    (file,) = unsent(tmp_path)
    assert len(file.read_text().splitlines()) == 4  # whose they are, a metric, the state and the status


def dead(tmp_path: Path) -> str:
    """A store that cannot be opened."""
    (tmp_path / "folder.db").mkdir(exist_ok=True)
    return f"sqlite:///{tmp_path}/folder.db"


def test_reports_of_several_runs_in_one_folder_stay_apart(tmp_path: Path, uri: str) -> None:
    # An evaluation whose store was gone, and the next one into the same folder.
    MLflowRun(dead(tmp_path), "e", "first", {}, tmp_path).metrics({"score": 11.0}, 0)
    second = MLflowRun(uri, "e", "second", {}, tmp_path)
    second.metrics({"score": 99.0}, 0)
    history = MlflowClient(uri).get_metric_history(second.run_id, "score")
    assert [metric.value for metric in history] == [99.0]
    (file,) = unsent(tmp_path)
    assert json.loads(file.read_text().splitlines()[0])["name"] == "first"
    assert not (tmp_path / "mlflow.json").exists()  # the folder belongs to whoever says so


def test_what_waits_is_sent_whoever_it_was_of(tmp_path: Path, uri: str) -> None:
    MLflowRun(dead(tmp_path), "e", "early", {"tag": "kept"}, tmp_path / "run").metrics({"a": 1.0}, 0)
    (file,) = unsent(tmp_path / "run")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"tracking_uri": uri}), *lines[1:]]) + "\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / UNSENT.format("0")).write_text('{"kind": "met')  # torn, and first by name
    with pytest.raises(SystemExit):
        main(["sync", str(tmp_path)])
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    (found,) = [run for run in runs if run.info.run_name == "early"]
    assert (found.data.metrics, found.data.tags["tag"]) == ({"a": 1.0}, "kept")
    assert not unsent(tmp_path / "run")


def test_torn_files_end_nothing(tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    run = MLflowRun(uri, "e", None, {}, tmp_path, key="k")
    (tmp_path / UNSENT.format("k")).write_text('{"tracking_uri": "x"}\n{"kind": "metrics", "values": {"a": 1.0}\n')
    again = MLflowRun(uri, "e", None, {}, tmp_path, key="k")
    assert "line 2 is no whole report" in caplog.text
    again.metrics({"b": 1.0}, 0)
    (tmp_path / "mlflow.json").write_text("")
    with pytest.raises(ValueError, match="has no mlflow.json that tells"):
        MLflowRun.of_folder(tmp_path)
    assert known_run(tmp_path, None) is None
    assert "a new run goes on from here" in caplog.text
    assert run.key == again.key


def test_a_full_disk_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    run = MLflowRun(dead(tmp_path), "e", None, {}, tmp_path)
    run.owns_folder()
    run.metrics({"a": 1.0}, 0)
    run.end("FAILED")
    assert "cannot be written: [Errno 28]" in caplog.text


@pytest.mark.parametrize(
    ("code", "waits"),
    [
        ("INVALID_PARAMETER_VALUE", False),
        ("INTERNAL_ERROR", True),
        ("PERMISSION_DENIED", True),
        ("UNAUTHENTICATED", True),
    ],
)
def test_only_what_is_wrong_itself_is_left_out(code: str, waits: bool) -> None:
    error = MlflowException("no", getattr(databricks_pb2, code))
    assert may_pass(error, "metrics") == waits
    assert not may_pass(TypeError("a bug"), "metrics")


class ClientError(Exception):
    """As that of S3's client, which derives from no other: expired credentials, or an address that does not answer."""


@pytest.mark.parametrize("kind", ["file", "text"])
def test_files_wait_for_a_store_of_artifacts_that_does_not_answer(kind: str) -> None:
    assert may_pass(ClientError("ExpiredToken"), kind)
    assert may_pass(ConnectionError("no route"), kind)
    assert not may_pass(FileNotFoundError("report.md"), kind)
    assert not may_pass(PermissionError("mlruns"), kind)
    assert not may_pass(MlflowException("no", databricks_pb2.INVALID_PARAMETER_VALUE), kind)


def test_a_folder_that_holds_a_run_takes_no_other_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_step(tmp_path, "llava15", "1_align")
    with pytest.raises(SystemExit):
        one_step(tmp_path, "llava15", "2_sft")
    told = capsys.readouterr().err
    assert f"{tmp_path} holds a run already" in told
    assert f"--ckpt_path {tmp_path}" in told
    assert "name: align" in (tmp_path / "config.yaml").read_text()
