"""The jobs of a sweep on disk: config, folder, what an earlier start left there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.compare.results.mlflow_records import run_of_summary
from esper.compare.results.runs import Run
from esper.compare.sweep.arms import Job
from esper.config import PRESETS, RootConfig, config_hash, plain
from esper.report.summary_file import NAME as SUMMARY
from esper.report.summary_file import read_summary
from esper.tracking.mlflow_run import ASIDE

JOB = "job.json"


@dataclass(frozen=True)
class Prepared:
    """A job with its checked config and its own folder."""

    job: Job
    config: RootConfig
    choices: dict[str, str]
    folder: Path

    def request(self, ask: str) -> dict[str, Any]:
        """What a worker is told."""
        return {"ask": ask, "config": _tree(self.config), "choices": self.choices, "folder": str(self.folder)}

    @property
    def summary(self) -> dict[str, Any]:
        """What the job left, empty where it left nothing or was another config's."""
        if not (self.folder / SUMMARY).exists():
            return {}
        found = read_summary(self.folder)
        return found if found.get("config_hash") == config_hash(self.config) else {}

    @property
    def error(self) -> str:
        """Why an earlier attempt failed; empty where none did."""
        path = self.folder / JOB
        note = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return note.get("error", "") if note.get("config_hash") == config_hash(self.config) else ""


def _tree(config: RootConfig) -> dict[str, Any]:
    """The config as a worker builds it again: preset names are no settings, and some groups have no options yet."""
    return {key: value for key, value in plain(config).items() if value is not None and key not in PRESETS}


def set_aside(folder: Path) -> None:
    """Keep what an unfinished attempt left, under another name: a retry starts in an empty folder."""
    if folder.exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}{ASIDE}{number}")).exists():
            number += 1
        folder.rename(aside)


def note(one: Prepared, answer: Mapping[str, Any]) -> None:
    note = {"config_hash": config_hash(one.config), **answer}
    one.folder.mkdir(parents=True, exist_ok=True)
    (one.folder / JOB).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def runs_of(jobs: Sequence[Prepared], metric: str) -> list[Run]:
    """The jobs that have ended, finished or failed."""
    found = []
    for one in jobs:
        summary, error = one.summary, one.error
        if not summary and not error:
            continue
        status = "FAILED" if error else summary.get("status", "FAILED")
        job = one.job
        found.append(run_of_summary({**summary, "status": status}, metric, job.arm, job.block, job.seed, str(one.folder)))
    return found
