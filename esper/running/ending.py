"""The end of a run, finished, interrupted or failed: its summary is written, its trackers are closed, and its bus is let go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from esper.bus.trainer.bus_port import ControllerSilent
from esper.config import RootConfig, config_hash
from esper.distributed import is_sharded
from esper.errors import Pruned, TrackerError
from esper.report.summary_file import BranchSummary, CompilerSummary, GateSummary, SecondsSummary, SeedsSummary, Summary, write_summary
from esper.running.callbacks import TRACE
from esper.running.connections import Connections, Setup, let_payloads_go, let_them_read
from esper.running.provenance import environment, sessions
from esper.trainer.evaluation import fingerprint
from esper.trainer.trainer import Trainer

#: Exceptions after which a run can go on where it was stopped.
STOPPED = (KeyboardInterrupt, ControllerSilent, Pruned)


class Ending:
    """Brings a run to its end, whether finished, interrupted or failed; ``summary`` is there once the training has ended."""

    def __init__(self, setup: Setup, links: Connections) -> None:
        self.setup, self.links = setup, links
        self.summary: Summary | None = None

    @contextmanager
    def of_failed_start(self) -> Iterator[None]:
        """Context of a run's start: if it fails or is interrupted, no tracker stays open."""
        try:
            yield
        except BaseException as error:
            with _quietly(True):
                for tracker in (self.links.progress, self.links.trackers):
                    tracker.close("KILLED" if isinstance(error, STOPPED) else "FAILED")
            raise

    @contextmanager
    def of_training(self, trainer: Trainer) -> Iterator[None]:
        """Context of the training: however it ends, its summary is written and published, and the trackers are told its status."""
        links, status, interrupted = self.links, "FINISHED", True
        try:
            yield
            interrupted = False
        except STOPPED:
            status = "KILLED"
            raise
        except BaseException:
            status = "FAILED"
            raise
        finally:
            if status == "FINISHED" and links.trackers.error is not None:  # the model's program, say: the trackers shall know how it ended
                status = "FAILED"
            if self.summary is None or interrupted:
                self.summarize(trainer, status)
            self._publish(trainer, status, interrupted)

    def summarize(self, trainer: Trainer, status: str) -> Summary:
        """Make the summary of the training so far."""
        self.summary = summarize(self.setup.config, trainer, self.setup.folder, self.links.info.run, status, self.links.port.alerts)
        return self.summary

    def _publish(self, trainer: Trainer, status: str, interrupted: bool) -> None:
        links, summary = self.links, self.summary
        assert summary is not None
        summary["status"] = status
        summary["bus"] = links.port.counts()
        try:
            self.setup.lock.refuse_removed()
            write_summary(summary, self.setup.folder)
            self.setup.lock.end()
        except OSError:  # for example a full disk: the trackers are closed all the same
            status = summary["status"] = "FAILED" if status == "FINISHED" else status
            raise
        finally:
            trainer.grow.close(status, dict(summary))
            try:
                with _quietly(interrupted):
                    links.progress.close(status)
                    links.trackers.close(status)
            except TrackerError:
                self._failed()
                raise

    def disconnect(self) -> None:
        """Let go of the bus, after the parts in other processes have read the last messages."""
        config, links = self.setup.config, self.links
        try:
            tracked = let_them_read(config, links.bus, links.info.run, links.port, self.setup.quiet)
            let_payloads_go(links.bus, links.info.run, links.port, tracked)
            links.controller.close()
            links.bus.close()
            self._count_unsent()
        except Exception:
            self._failed()
            raise

    def _count_unsent(self) -> None:
        """Add the number of unsent messages to the summary; it is known only once the bus is closed."""
        counts = self.links.port.counts()
        if self.summary is not None and counts.get("waiting"):
            self.summary["bus"] = counts
            write_summary(self.summary, self.setup.folder)

    def _failed(self) -> None:
        """Correct the summary if something failed after it was written as FINISHED."""
        if self.summary is not None and self.summary["status"] == "FINISHED":
            self.summary["status"] = "FAILED"
            write_summary(self.summary, self.setup.folder)


@contextmanager
def _quietly(other: bool) -> Iterator[None]:
    """Context in which a tracker's failure, which the log has already, does not hide the ``other`` reason for the run's end."""
    try:
        yield
    except TrackerError:
        if not other:
            raise


def summarize(config: RootConfig, trainer: Trainer, folder: Path, run: str, status: str, alerts: list[dict[str, Any]]) -> Summary:
    """Everything but the controls, which are made afterwards."""
    grow, outcome = trainer.grow, trainer.outcome
    grown = {} if is_sharded(grow.registry.model) else grow.export().state_dict()  # ended early: its parts are on many processes
    registry = grow.registry
    gates = {
        name: GateSummary(closest=gate.closest, threshold=gate.threshold, asked=gate.asked, passed=gate.passed)
        for name, gate in grow.gates.counts.items()
    }
    spent = grow.clock.seconds
    seconds = SecondsSummary(total=grow.clock.total, shadow=spent.get("shadow", 0.0), judge=spent.get("judge", 0.0))
    primary = trainer.task.primary
    summary = Summary(
        run=run,
        name=config.name,
        status=status,
        primary=f"validation/{primary}",
        direction=trainer.task.metrics[primary].direction,
        ticks=grow.tick_number,
        steps=outcome.steps,
        metrics={"final": outcome.final, "best": outcome.best},
        seeds=cast(SeedsSummary, dict(grow.transitions.counts)),
        branches=cast("list[BranchSummary]", grow.observer.branch_cards()),
        gates=gates,
        refusals=dict(grow.executor.refusals),
        parameters={"before": trainer.host_parameters, "after": trainer.parameters},
        macs=grow.meter.total,
        macs_by_pass=dict(sorted(grow.meter.spent.items())),
        seconds=seconds,
        stages=registry.table.counts(),
        environment=environment(trainer.device),
        environments=sessions(folder),
        fingerprint=fingerprint(grown, outcome.history),
        alerts=alerts,
        output=str(folder),
        **({"trace": str(folder / TRACE)} if (folder / TRACE).exists() else {}),
        config_hash=config_hash(config),
        data=trainer.task.digest,
        seed=config.seed,
    )
    if config.trainer.compile:
        summary["compiler"] = CompilerSummary(graphs=grow.compiling.graphs, seconds=grow.compiling.seconds)
    return summary
