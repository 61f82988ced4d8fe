"""``esper clean``: what goes, and all that must not."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from esper.app import main
from esper.compare.sweep.resume import sweep_lock
from esper.errors import UserError
from esper.inventory import own_files
from esper.inventory.clean_rules import may_go, remove


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


def kinds(outputs: Path) -> dict[str, str]:
    return {str(item.place.relative_to(outputs)): item.kind for item in may_go(outputs)}


def ended(outputs: Path, name: str, status: str, **changed: object) -> Path:
    """A copy of the run, as if it had ended like that before its final test."""
    folder = Path(shutil.copytree(outputs / "day/run", outputs / name))
    summary = json.loads((folder / "summary.json").read_text())
    nothing = {"final": {}, "best": {}}
    (folder / "summary.json").write_text(json.dumps(summary | {"status": status, "metrics": nothing, **changed}))
    return folder


@pytest.fixture
def rich(outputs: Path) -> Path:
    """Also a failed and a stopped run, and an attempt that the sweep has set aside."""
    ended(outputs, "failed", "FAILED")
    ended(outputs, "stopped", "KILLED")
    ended(outputs, "s/1.attempt1", "FAILED")
    return outputs


def test_what_may_go_is_named_by_its_kind(rich: Path) -> None:
    assert kinds(rich) == {
        "failed": "failed",
        "stopped": "stopped",
        "s/1.attempt1": "attempts",
        "day/run/checkpoints": "checkpoints",
        **{f"s/{job}/checkpoints": "checkpoints" for job in range(4)},
    }


def test_every_file_of_a_real_run_is_known_as_esper_s_own(made: Path) -> None:
    for folder in (made / "day/run", *made.glob("s/*-*")):
        found = own_files.contents(folder)
        assert found.others == [] and found.size > 0 and len(found.own) == len(files(folder))


def test_by_default_failed_runs_and_attempts_go_and_nothing_else(rich: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(rich)
    assert main(["clean", f"output={rich}", "--yes"]) == 0
    said = capsys.readouterr().out
    assert "what=stopped would give" in said and "removed: 2, " in said
    assert before - files(rich) == {name for name in before if name.startswith(("failed/", "s/1.attempt1/"))}
    assert not (rich / "failed").exists()


def test_checkpoints_go_only_from_finished_runs_and_leave_their_results(rich: Path) -> None:
    before = files(rich)
    assert main(["clean", f"output={rich}", "what=checkpoints", "--yes"]) == 0
    gone = before - files(rich)
    assert gone and all("/checkpoints/" in name and not name.startswith(("failed", "stopped", "s/1.attempt1")) for name in gone)
    assert main(["show", str(rich / "day/run")]) == 0


def test_a_plan_a_comparison_and_the_runs_it_counts_stay_whatever_is_asked(outputs: Path) -> None:
    summary = json.loads((outputs / "s/2/summary.json").read_text())
    (outputs / "s/2/summary.json").write_text(
        json.dumps(summary | {"status": "FAILED", "metrics": {}})
    )  # the comparison counts it as failed
    before = files(outputs)
    assert main(["clean", f"output={outputs}", "what=all", "--yes"]) == 0
    assert {name for name in before - files(outputs) if "/checkpoints/" not in name} == set()


def test_a_run_that_has_its_result_and_failed_to_record_it_stays(outputs: Path) -> None:
    folder = outputs / "day/run"
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"status": "FAILED"}))
    assert "day/run" not in kinds(outputs)


def test_files_of_others_stay_and_so_do_links_and_what_they_lead_to(rich: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (rich / "failed/thesis.tex").write_text("mine")
    (rich / "failed/figures/mine").mkdir(parents=True)
    (rich / "failed/figures/mine/plot.png").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/manifest.json").write_text("mine")
    shutil.rmtree(rich / "failed/model", ignore_errors=True)
    (rich / "failed/model").symlink_to(tmp_path / "elsewhere")
    assert main(["clean", f"output={rich}", "--yes"]) == 0
    assert files(rich / "failed") == {"thesis.tex", "figures/mine/plot.png", "model"}
    assert (tmp_path / "elsewhere/manifest.json").exists()
    assert f"stays: {rich / 'failed/thesis.tex'}, which esper did not write" in capsys.readouterr().out


def test_nothing_of_a_run_or_sweep_under_way_may_go(rich: Path) -> None:
    (rich / "stopped/run.lock").write_text('{"config_hash": "x"}\n')
    places = [rich / "stopped/run.lock", rich / "s/sweep.lock"]
    code = "import sys; from esper.running.run_folder import try_lock; files = [open(name, 'a') for name in sys.argv[1:]]; "
    code += "print([try_lock(file) for file in files]); input()"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, places)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "[True, True]\n"
        assert kinds(rich) == {"failed": "failed", "day/run/checkpoints": "checkpoints"}
    finally:
        process.communicate("\n")
    assert "stopped" in kinds(rich)


def test_a_run_that_has_gone_on_since_it_was_listed_stays(rich: Path) -> None:
    (item,) = (item for item in may_go(rich) if item.kind == "stopped")
    summary = json.loads((item.folder / "summary.json").read_text())
    (item.folder / "summary.json").write_text(json.dumps(summary | {"status": "FINISHED"}))
    with pytest.raises(UserError, match="gone on meanwhile"):
        remove(item)
    assert (item.folder / "config.yaml").exists()


def test_a_stopped_run_whose_bus_has_a_server_still_stays(rich: Path) -> None:
    (rich / "stopped/bus/server").mkdir(parents=True)
    (item,) = (item for item in may_go(rich) if item.kind == "stopped")
    with (rich / "stopped/bus/server/lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="still runs"):
            remove(item)
    remove(item)
    assert not (rich / "stopped").exists()


def test_a_sweep_that_has_begun_to_go_on_keeps_its_attempts(rich: Path) -> None:
    (item,) = (item for item in may_go(rich) if item.kind == "attempts")
    lock = str(rich / "s/sweep.lock")
    code = f"from esper.running.run_folder import try_lock; f=open({lock!r},'a'); print(try_lock(f)); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        with pytest.raises(UserError, match="running in another process"):
            remove(item)
    finally:
        process.communicate("\n")
    with sweep_lock(rich / "s"):
        pass


@pytest.mark.parametrize(("answer", "left"), [("y", False), ("n", True), ("", True)])
def test_it_asks_on_a_terminal(rich: Path, checkout: Path, answer: str, left: bool) -> None:
    main_end, terminal = pty.openpty()
    command = [sys.executable, "-m", "esper", "clean", f"output={rich}"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    process = subprocess.Popen(command, stdin=terminal, stdout=subprocess.PIPE, text=True, env=environment)
    os.write(main_end, f"{answer}\n".encode())
    said, _ = process.communicate(timeout=60)
    os.close(main_end)
    os.close(terminal)
    assert process.returncode == 0 and "Remove these 2? [y/N]" in said
    assert (rich / "failed").exists() is left


def test_without_a_terminal_nothing_goes_unless_told(rich: Path, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(rich)
    command = [sys.executable, "-m", "esper", "clean", f"output={rich}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(checkout)})
    assert done.returncode == 1 and "--yes removes without asking" in done.stderr and files(rich) == before
    for words, said in ((["what=chekpoints"], "did you mean checkpoints?"), (["--force"], "'--force' is not accepted")):
        assert main(["clean", f"output={rich}", *words]) == 2
        assert said in capsys.readouterr().err


def test_what_cannot_be_removed_is_said_and_the_rest_goes(
    rich: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unlink = Path.unlink

    def refused(self: Path, missing_ok: bool = False) -> None:
        if self.parent == rich / "failed":
            raise PermissionError(13, "Permission denied", str(self))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    assert main(["clean", f"output={rich}", "--yes"]) == 1
    said = capsys.readouterr()
    assert "permission denied" in said.err and "removed: 1, " in said.out
    assert (rich / "failed").exists() and not (rich / "s/1.attempt1").exists()
