"""Where the jobs of a sweep run: how many processes, and which GPU each of them sees."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from esper.compare import launch, workers
from esper.compare.workers import Workers, _gpus, environments

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("asked", "seen"), [(0, ["0", "1"]), (1, ["0"]), (2, ["0", "1"]), (5, ["0", "1", "0", "1", "0"])], ids=lambda value: str(value)
)
def test_workers_take_the_gpus_in_turn_and_by_default_one_each(asked: int, seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_gpus", lambda: ["0", "1"])
    found = environments(asked, threads=3)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == seen
    assert all(one["OMP_NUM_THREADS"] == one["MKL_NUM_THREADS"] == one["OPENBLAS_NUM_THREADS"] == "3" for one in found)


def test_without_a_gpu_or_without_use_for_one_there_is_a_worker_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_gpus", lambda: ["0", "1", "2"])
    assert len(environments(0, 1, gpu=False)) == CORES
    assert not any("CUDA_VISIBLE_DEVICES" in one for one in environments(7, 1, gpu=False))
    monkeypatch.setattr(workers, "_gpus", list)
    assert len(environments(0, 1)) == CORES
    assert not any("CUDA_VISIBLE_DEVICES" in one for one in environments(7, 1))


@pytest.mark.parametrize(("device", "gpu"), [("cpu", False), ("auto", True)])
def test_a_sweep_on_the_cpu_leaves_the_gpus_alone(device: str, gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from esper.app import main

    asked: list[Any] = []
    monkeypatch.setattr(launch, "environments", lambda *given: asked.append(given) or [{}])
    monkeypatch.setattr(launch, "run_sweep", lambda sweep, environments: None)
    monkeypatch.chdir(tmp_path)
    main(["-m", "seed=0,1", "tracking=none", f"trainer.device={device}", "hydra.launcher.workers=5", "hydra.launcher.threads=2"])
    assert asked == [(2, 2, gpu)]


def environment_of(process: int) -> list[bytes]:
    """The variables that a process was started with, once its program has begun."""
    while not (read := Path(f"/proc/{process}/environ").read_bytes()):
        time.sleep(0.01)
    return read.split(b"\0")


def test_every_worker_process_sees_the_gpu_that_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_gpus", lambda: ["4", "GPU-7f"])
    with Workers(environments(0, 2)) as running:
        variables = [environment_of(one._process.pid) for one in running._workers]
    assert [[v for v in one if v.startswith(b"CUDA_VISIBLE_DEVICES=")] for one in variables] == [
        [b"CUDA_VISIBLE_DEVICES=4"],
        [b"CUDA_VISIBLE_DEVICES=GPU-7f"],
    ]
    assert all(b"OMP_NUM_THREADS=2" in one for one in variables)


@pytest.mark.parametrize(
    ("visible", "count", "found"),
    [
        (None, 2, ["0", "1"]),
        (None, 0, []),
        ("", 0, []),
        ("-1", 0, []),
        ("-1", 2, []),
        ("NoDevFiles", 2, []),
        ("0, 1", 2, ["0", "1"]),
        ("3,1", 2, ["3", "1"]),
        ("1,-1,0", 1, ["1"]),
        ("0,9", 1, ["0"]),
        ("GPU-8932f937-d72c, MIG-56c30", 2, ["GPU-8932f937-d72c", "MIG-56c30"]),
    ],
)
def test_gpus_are_read_as_cuda_reads_them(
    visible: str | None, count: int, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "DRIVER", tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _gpus() == found


def test_without_a_driver_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "DRIVER", tmp_path / "nothing")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert _gpus() == []
