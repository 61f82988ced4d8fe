"""One run as an MLflow run: parameters, tags, data set, metrics, files and the final model."""

from __future__ import annotations

import contextlib
import getpass
import glob
import json
import math
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.lifecycle.stages import Stage
from esper.messages import Alert, Message, Metrics, RunStarted, Telemetry
from esper.tracking.config import MlflowConfig, tracking_uri
from esper.tracking.run_info import RunInfo
from esper.tracking.run_page import Point, SeedAverages, final_values, main_points, main_values, page_description

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

BATCH = 1000  # MLflow's own limit of metrics in a call
NAMES = 100  # and of parameters or tags
LONGEST_NAME, LONGEST_VALUE, LONGEST_TAG = 250, 500, 5000  # characters that every version since 3.10 and every store takes
NOTE_TAG = "mlflow.note.content"  # the description on top of a page
NOTE = "mlflow.json"
ASIDE = ".attempt"  # and a number: suffix of the folder of an earlier attempt
KEPT = ("*.parquet", "*.log", "*.json", "*.jsonl", "*.csv", "*.yaml")
STAGES = {stage.name.lower(): int(stage) for stage in Stage}


class MlflowRun:
    """Writes to the store itself: seconds of import and of Python, so it belongs in its own process.

    Timestamps are the run's start plus the tick in milliseconds: a value sent twice is stored once. NaN is stored as
    NaN, infinities too (the store would turn them into 1.8e308); ``metrics.parquet`` keeps the values.
    """

    wants_model: bool

    def __init__(self, config: MlflowConfig) -> None:
        self.config = config
        self.wants_model = config.model
        self._prepared = False

    def prepare(self, outputs: str, folder: str) -> None:
        """Open the store, and check that it accepts the run in this folder.

        Raises:
            UserError: it does not, with the remedy.
        """
        from esper.tracking.mlflow_store import experiment_id, living_run, quiet_client

        self._uri = tracking_uri(self.config, outputs)
        self._client: MlflowClient = quiet_client(self._uri)
        self._experiment = experiment_id(self._client, self._uri, self.config.experiment)
        self._known = _noted(folder, self._uri)
        if self._known:
            living_run(self._client, self._uri, self._known, "This run's", f"or remove {Path(folder) / NOTE} to begin another")
        self._prepared = True

    def open(self, info: RunInfo) -> None:
        """Create the MLflow run, or continue the one that this folder's run has already."""
        from esper.tracking.mlflow_store import start_monitor

        if not self._prepared:
            self.prepare(info.outputs, info.folder)
        self._info = info
        self._averages = SeedAverages(self.config.points)
        self._waiting: dict[tuple[int, str], float] = {}
        self._tick, self._not_finite = 0, ""
        self._alerts: Counter[str] = Counter()
        known = self._known or self._unnoted(self._experiment)
        self._before: EarlierValues | None = None
        if known:
            self._continue(known)
        else:
            self._create(self._experiment)
        try:
            self._describe()
        except BaseException:
            if not known:  # a run that cannot begin leaves nothing behind
                self._client.delete_run(self.run_id)
                (Path(info.folder) / NOTE).unlink()
            raise
        self._monitor = start_monitor(self.run_id, self._uri, self.config.system_s, resumed=bool(known))

    def _create(self, experiment: str) -> None:
        info = self._info
        tags = {key: fitted(value, LONGEST_TAG) for key, value in info.tags.items()}
        tags |= {"esper.run": info.run, "esper.folder": info.folder} | _source(info)
        if info.parent:
            tags["mlflow.parentRunId"] = info.parent
        run = self._client.create_run(experiment, start_time=info.started_ms, tags=tags, run_name=info.name)
        self.run_id, self._started_ms = run.info.run_id, run.info.start_time
        note = {"uri": self._uri, "experiment": experiment, "run": self.run_id}
        path = Path(info.folder) / NOTE
        beside = path.with_name(f".{NOTE}.{os.getpid()}")
        beside.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        beside.replace(path)

    def _unnoted(self, experiment: str) -> str:
        """The MLflow run that a process created for this run but was killed before noting it in the folder; empty if none.

        Runs that ended and runs of attempts that were set aside do not count.
        """
        info = self._info
        quote = '"' if "'" in info.run else "'"
        found = self._client.search_runs([experiment], f"tags.`esper.run` = {quote}{info.run}{quote}", max_results=1000)
        earlier = _set_aside(info.folder)
        open_ = [run for run in found if run.info.status not in ("FINISHED", "FAILED") and run.info.run_id not in earlier]
        same = [run for run in open_ if run.data.tags.get("esper.folder") == info.folder]
        return same[0].info.run_id if same else ""

    def _continue(self, run_id: str) -> None:
        run = self._client.get_run(run_id)
        self.run_id, self._started_ms = run_id, run.info.start_time
        self._client.update_run(run_id, status="RUNNING")
        self._before = EarlierValues(self._client, run_id)

    def _describe(self) -> None:
        """Parameters, data set and the full config; a continued run sends only new ones."""
        from mlflow.entities import Param

        info, client = self._info, self._client
        before = client.get_run(self.run_id)
        said = {legal(key): fitted(value, LONGEST_VALUE) for key, value in sorted((info.chosen | info.changed).items())}
        new = [Param(key, value) for key, value in said.items() if key not in before.data.params]
        for start in range(0, len(new), NAMES):
            client.log_batch(self.run_id, params=new[start : start + NAMES])
        if info.dataset and not (before.inputs and before.inputs.dataset_inputs):
            self._log_dataset()
        if info.config:
            client.log_dict(self.run_id, info.config, "config.yaml")

    def _log_dataset(self) -> None:
        """The data set, an entry that every run of an experiment shares.

        MLflow looks for the entry and then adds it, so of two runs that begin at the same moment the later one is refused;
        its second attempt finds the entry of the other.
        """
        from mlflow.entities import Dataset, DatasetInput
        from mlflow.exceptions import MlflowException

        data = self._info.dataset
        assert data is not None
        # MLflow keeps 36 characters of a digest; the source holds all of it
        source = json.dumps({"description": data.description, "sha256": data.digest})
        profile = json.dumps(data.sizes)
        entry = Dataset(data.name, data.digest[:36], "local", source, profile=profile)
        try:
            self._client.log_inputs(self.run_id, [DatasetInput(entry, [])])
        except MlflowException:
            self._client.log_inputs(self.run_id, [DatasetInput(entry, [])])

    def record(self, messages: Sequence[Message]) -> None:
        """Send metrics unchanged, telemetry as aggregates and alerts as a count; everything else is in the files."""
        for message in messages:
            match message:
                case Metrics():
                    self._note((message.tick, name, value) for name, value in message.values.items() if self._is_news(message.tick, name))
                    self._note(main_points(message, self._info.primary))
                case Telemetry():
                    self._note(self._averages.points(message))
                case RunStarted():
                    self._averages.set_length(message.total_ticks)
                    if self._before is not None:
                        self._averages.go_on(self._before.seeds_until(message.tick))
                        self._alerts.update(self._before.alerts_until(message.tick))
                case Alert():
                    self._alerts[message.level] += 1
                    self._note([(message.tick, f"alerts/{message.level}", float(self._alerts[message.level]))])
            self._tick = max(self._tick, getattr(message, "tick", 0))
        if len(self._waiting) >= BATCH:
            self.flush()

    def _note(self, points: Iterable[Point]) -> None:
        """Note values to be sent, one for each name and tick, the last: MLflow would keep several and show the largest."""
        self._waiting |= {(tick, name): value for tick, name, value in points}

    def _is_news(self, tick: int, name: str) -> bool:
        """Whether a value is to be sent: of a measured time that a resumed run sends again, the first value stands."""
        return self._before is None or "second" not in name.rsplit("/", 1)[-1] or tick > self._before.last_tick(legal(name))

    def flush(self) -> None:
        """Send all waiting values, at most 1000 a call."""
        from mlflow.entities import Metric

        waiting, self._waiting = list(self._waiting.items()), {}
        for start in range(0, len(waiting), BATCH):
            batch = []
            for (tick, name), value in waiting[start : start + BATCH]:
                if not math.isfinite(value):
                    self._note_not_finite(tick, name)
                    value = math.nan
                batch.append(Metric(legal(name), value, self._started_ms + tick, tick))
            self._client.log_batch(self.run_id, metrics=batch)

    def _note_not_finite(self, tick: int, name: str) -> None:
        if not self._not_finite:
            self._not_finite = f"{name} at tick {tick}"
            self._client.set_tag(self.run_id, "not_finite", self._not_finite)

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """Log final values, figures, files and the model, then end the run with ``status``."""
        try:
            self._note((self._tick, name, value) for name, value in final_values(summary) + main_values(summary))
            self.flush()
            self._client.set_tag(self.run_id, NOTE_TAG, fitted(page_description(summary), LONGEST_TAG))
            self._log_files()
            if self.config.model:
                self._log_model()
        except BaseException:
            status = "FAILED"
            raise
        finally:
            if self._monitor:
                self._monitor.finish()
            self._client.set_terminated(self.run_id, status, end_time=int(time.time() * 1000))

    def _log_files(self) -> None:
        folder = Path(self._info.folder)
        if self.config.figures:
            from esper.tracking.figures import drawn

            drawn(folder)
        for pattern in KEPT:
            for path in sorted(folder.glob(pattern)):
                said = path.name == NOTE or (path.name == "config.yaml" and self._info.config)
                if not said and path.stat().st_size:
                    self._client.log_artifact(self.run_id, str(path))
        if (folder / "figures").is_dir():
            self._client.log_artifacts(self.run_id, str(folder / "figures"), "figures")

    def _log_model(self) -> None:
        from esper.tracking.final_model import PROGRAM, log_model

        folder = Path(self._info.folder)
        if (folder / PROGRAM).exists():
            log_model(self._client, self._experiment, self.run_id, folder)


class EarlierValues:
    """Steps and values of a run's metrics as an earlier session left them; read once, when the run is continued."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        names = client.get_run(run_id).data.metrics
        ends = {name: name.rsplit("/", 1)[-1] for name in names}
        wanted = [n for n, end in ends.items() if n.startswith("alerts/") or end.startswith("seeds_") or "second" in end]
        self._steps = {name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)] for name in wanted}

    def last_tick(self, name: str) -> int:
        """The last tick of a metric, −1 where there is none."""
        return max((step for step, _ in self._steps.get(name, [])), default=-1)

    def seeds_until(self, tick: int) -> dict[str, tuple[int, set[int]]]:
        """By site: the last tick, up to ``tick``, at which ``sites/<site>/seeds_<stage>`` was given, and the stages known by then."""
        found: dict[str, tuple[int, set[int]]] = {}
        for name, points in self._steps.items():
            steps = [step for step, _ in points if step <= tick]
            site, _, kind = name.removeprefix("sites/").rpartition("/")
            if name.startswith("sites/") and kind.startswith("seeds_") and steps:
                stage = kind.removeprefix("seeds_")
                last, stages = found.get(site, (-1, set()))
                found[site] = (max(last, *steps), stages | {STAGES[stage]})
        return found

    def alerts_until(self, tick: int) -> dict[str, int]:
        """How many alerts of each level there were up to ``tick``."""
        counts: dict[str, int] = {}
        for name, points in self._steps.items():
            values = [int(value) for step, value in points if step <= tick]
            if name.startswith("alerts/") and values:
                counts[name.removeprefix("alerts/")] = max(values)
        return counts


def _source(info: RunInfo) -> dict[str, str]:
    """Tags for MLflow's own columns *User*, *Source* and *Version*."""
    tags = {"mlflow.source.name": "esper", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(KeyError, OSError):  # a user without a name
        tags["mlflow.user"] = getpass.getuser()
    if "git_commit" in info.tags:
        tags["mlflow.source.git.commit"] = info.tags["git_commit"].partition("+")[0]
    return tags


def legal(name: str) -> str:
    """``name`` in the form that MLflow accepts: letters, digits and ``_-. :/``, a path within its folder, not too long."""
    parts = [part for part in re.sub(r"[^\w\-. :/]", "_", name).split("/") if part]
    plain = "/".join("_" if part in (".", "..") else part for part in parts) or "_"
    return plain if len(plain) <= LONGEST_NAME else f"{plain[: LONGEST_NAME - 9]}_{zlib.crc32(plain.encode()):08x}"


def fitted(text: str, most: int) -> str:
    """The text, cut to the longest that the store takes; the run's folder has all of it."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _noted(folder: str, uri: str) -> str:
    """The MLflow run that the folder's notes name for this store; empty if none."""
    path = Path(folder) / NOTE
    if not path.exists():
        return ""
    note = json.loads(path.read_text(encoding="utf-8"))
    return note["run"] if note["uri"] == uri else ""


def _set_aside(folder: str) -> set[str]:
    """The MLflow runs of earlier attempts in this folder."""
    path = Path(folder)
    notes = path.parent.glob(f"{glob.escape(path.name)}{ASIDE}*/{NOTE}")
    return {json.loads(note.read_text(encoding="utf-8"))["run"] for note in notes}
