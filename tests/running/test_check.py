"""``esper check``: what a run would do, said beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from esper.app import main
from esper.cli.compose import compose
from esper.config import config_hash
from esper.errors import UserError
from esper.lifecycle import Stage
from esper.report.number_format import duration, short
from esper.running.builders import build_trainer
from esper.running.check import check
from esper.running.cost_estimate import cost_of

SHORT = "trainer.steps=300"


def _said(*words: str) -> str:
    return check(compose(list(words)))


def _row(text: str, *parts: str) -> list[str]:
    """The cells of the first table row that holds all these words."""
    for line in text.splitlines():
        if line.startswith("│") and all(part in line for part in parts):
            return [cell.strip() for cell in line.strip("│").split("│")]
    raise AssertionError(f"no row holds {parts}:\n{text}")


def test_every_site_is_listed_with_what_may_grow_there_and_what_it_would_cost() -> None:
    words = (SHORT, "model.width=7", "sites.match=[fc*]", "sites.per_site=2", "blueprint=mlp", "blueprint.receptive_field=layer")
    text = _said(*words, "blueprint.hidden=5")
    assert "device: cpu" in text and "handwritten digits" in text and "Sites: 2 with 4 seeds" in text
    cells = _row(text, "fc1 (Linear)")
    assert cells[:5] == ["fc*", "fc1 (Linear)", "7", "7 in chunks of 3 to 4", "2"]
    assert cells[5:] == ["mlp (chosen)", str(7 * 5 + 5 + 5 * 4 + 4), str(7 * 5 + 5 * 4)]
    assert "│ block" not in text and "│ conv" not in text, "they do not fit a linear layer that others share"
    assert "664 parameters" not in text and f"{65 * 7 + 8 * 7 + 8 * 10} parameters" in text


def test_what_is_announced_is_what_a_germinated_branch_has() -> None:
    config = compose([SHORT, "sites.per_site=3", "sites.match=[fc1]"])
    text = check(config)
    trainer = build_trainer(config, config.task.build(), torch.device("cpu"))
    branch = trainer.grow.registry.germinate(0, config.blueprint.name, "linear")
    cells = _row(text, "fc1 (Linear)")
    assert cells[-2:] == [str(branch.parameters), str(branch.macs)]


def test_the_stages_are_given_in_steps() -> None:
    words = [SHORT, "grafting.ramp=10step", "lifecycle=reference", "trainer.steps=2000", "lifecycle.training_min=100step"]
    config = compose(words)
    path = build_trainer(config, config.task.build(), torch.device("cpu")).grow.settings.ages.path()
    text = check(config)
    for stage, earliest, latest in path:
        assert _row(text, stage.name)[1:3] == [str(earliest), str(latest)]
    assert f"germinate by step {2000 - path[-1][1]} to be" in " ".join(text.split())


def test_epochs_as_a_clock_are_steps_too() -> None:
    text = _said("lifecycle.clock=epoch", "trainer.epochs=60", "trainer.steps=0", "trainer.batch_size=100")
    assert "The run has 600 steps" in text
    assert all(int(number) % 10 == 0 for number in _row(text, "STABILIZATION")[1:])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("model=cnn", "task=mnist1d", "blueprint=conv"), ("conv (chosen)", "8×20", "Residual blocks", "ConvBlock")),
        (("model=cnn", "task=mnist1d", "blueprint=block", "sites.per_site=1"), ("block (chosen)", "stages.0.blocks.0", "7680")),
        (
            ("model=transformer", "task=text", "model.width=16", "model.depth=1", "model.heads=2", "trainer.batch_size=4"),
            ("mlp (chosen)", "Residual blocks"),
        ),
        (("task=mnist1d", "trainer.control=true", "optimizer=sgd", "telemetry.every=3"), ("two controls", "MNIST-1D")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and "=" in value[0] else "",
)
@pytest.mark.slow
def test_hosts_and_tasks(words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    text = _said(SHORT, *words)
    for part in (*parts, "training MACs", "time (estimate)", "memory (estimate)", "FOSSILIZED"):
        assert part in text
    assert max(len(line) for line in text.splitlines() if line[:1] in "│┏└") <= 140


def test_the_estimate_covers_validation_shadow_passes_and_judging(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["trainer.steps=1000", "trainer.validate_every=10%", "trainer.control=true", "lifecycle.judge_every=1%"]
    config = compose(words)
    trainer = build_trainer(config, config.task.build(), torch.device("cpu"))
    cost, ages, seeds = cost_of(trainer), trainer.grow.settings.ages, trainer.grow.registry.table.rows
    assert min(cost.step_s, cost.validation_s, cost.judge_s) > 0.0 and trainer.grow.meter.spent["judge"] > 0
    monkeypatch.setattr("esper.running.check.cost_of", lambda trainer: replace(cost, step_s=0.1, validation_s=2.0, judge_s=0.5))
    looks = [2 + sum((ages.maximum[s] - ages.minimum[s]) // 10 for s in (Stage.EVALUATING, Stage.FINE_TUNING) if most) for most in (0, 1)]
    least, most = (age[Stage.TRAINING] * 0.1 + count * 1.0 for age, count in zip((ages.minimum, ages.maximum), looks, strict=True))
    text = check(config)
    assert "about 2:04 where nothing grows: 1000 steps of 100 ms, 12 looks at the validation set of 2 s" in text
    assert f"about {duration(124 + seeds * most)} where all {seeds} seeds grow and take longest" in text
    assert f"a seed adds {short(least, 3)} s to {short(most, 3)} s: " in text and f"{looks[0]} to {looks[1]} looks at the judge set" in text
    assert "about 4:08 more for the two controls" in text


@pytest.mark.parametrize(
    ("words", "site"),
    [
        (["sites.match=mlp_hidden"], "fc1 (Linear)"),
        (["sites.match=residual", "model=cnn", "task=mnist1d"], "stages.0.blocks.0 (ConvBlock)"),
        (["sites.match=conv_out", "model=cnn", "task=mnist1d"], "stem (Conv1d)"),
    ],
    ids=["mlp_hidden", "residual", "conv_out"],
)
@pytest.mark.slow
def test_a_role_is_named_on_the_command_line_as_it_is(words: list[str], site: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", SHORT, *words]) == 0
    printed = capsys.readouterr()
    role = words[0].partition("=")[2]
    assert _row(printed.out, site)[0] == role and printed.err == ""
    assert config_hash(compose(words)) == config_hash(compose([f"sites.match=[{role}]", *words[1:]]))


@pytest.mark.slow
def test_memory_and_macs_follow_the_host() -> None:
    small, large = (_said(SHORT, f"model.width={width}", "trainer.batch_size=50") for width in (8, 512))
    assert "KiB beside program and data" in small and "MiB beside program and data" in large
    samples, width = 50, 8
    forward = 64 * width + width * width + width * 10
    backward = 2 * forward - 64 * width  # nobody asks for the gradient of the inputs
    assert f"{samples * (forward + backward) / 1e3:.3g} K a step" in small


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["sites.match=[fc9]"], ["fc9", "there are", "fc1"]),
        (["sites.match=[fc1]", "sites.per_site=7"], ["sites.per_site=7", "6 features", "fc1"]),
        (["blueprint=conv"], ["blueprint 'conv' fits none", "convolution"]),
        (["lifecycle.training_max=1step", "lifecycle.training_min=9step"], ["TRAINING can never be left"]),
        (["trainer.steps=20", "lifecycle=reference"], ["can never be left"]),
        (["model=transformer"], ["needs characters", "use model=mlp"]),
        (["trainer.precision=fp16", "trainer.device=cpu"], ["needs a GPU"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else "",
)
def test_what_a_run_would_refuse_is_refused_in_one_sentence(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("esper: ") and printed.err.count("\n") == 1
    for part in parts:
        assert part in printed.err


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", SHORT]) == 0
    assert "Sites:" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_controller_that_could_never_do_anything_is_refused_here_too() -> None:
    with pytest.raises(UserError, match=r"germinate_at=99% is tick 297, and nothing germinates after tick 150"):
        _said(SHORT, "controller.germinate_at=99%")


def test_a_run_of_the_host_alone_may_be_shorter_than_any_lifecycle() -> None:
    with pytest.raises(UserError, match="The run has 5 ticks"):
        _said("trainer.steps=5")
    assert "The run has 5 steps" in _said("trainer.steps=5", "controller=none")
    with pytest.raises(UserError, match="The run has 5 ticks"):
        _said("trainer.steps=5", "controller=none", "bus=embedded")  # over a server anybody may let a seed germinate


@pytest.mark.slow
def test_what_is_on_where_is_shown_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (SHORT, "model.width=7", "model.depth=2", "sites.match=[fc*]")
    assert _row(_said(*words), "growth")[1:3] == ["all sites", "–"]
    cells = _row(_said(*words, "flags.growth.block=[mlp/fc2]", "kernel=torch"), "growth")
    assert cells == ["growth", "fc1", "fc2", "fc1 on: flags.growth.percent=100; fc2 off: flags.growth.block names mlp/fc2"]
    monkeypatch.setenv("ESPER_FLAGS", "growth=off,kernels=0%")
    text = _said(*words, "controller=none", "kernel=torch")
    assert _row(text, "growth") == ["growth", "no site", "fc1, fc2", "fc1, fc2 off: ESPER_FLAGS sets flags.growth.percent=0"]
    assert "kernel=torch takes plain torch everywhere here" in text
