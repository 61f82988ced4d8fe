"""The studies under conf/experiment can show what they ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from esper.cli import conf
from esper.cli.compose import compose
from esper.running.run import run


def experiment(name: str) -> dict[str, Any]:
    return yaml.safe_load((conf.folder() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.e2e
def test_no_strategy_of_the_grafting_study_does_what_linear_does(tmp_path: Path) -> None:
    """In a twelfth of the study's length, so with a twelfth of its signals."""
    paths: dict[str, tuple[Any, ...]] = {}
    for arm in experiment("ab_grafting")["hydra"]["sweeper"]["params"]["grafting"].split(","):
        words = ["trainer.steps=120", "telemetry.every=5", "trainer.governor=false", "trainer.save=false", "trainer.checkpoint_every=''"]
        run(compose(["experiment=ab_grafting", f"grafting={arm}", *words, "tracking=none"]), tmp_path / arm, quiet=True)
        seen = pd.read_parquet(tmp_path / arm / "seeds.parquet")
        blending = seen[(seen.stage_name == "GRAFTING") & (seen.alpha > 0.0)]
        assert len(blending) > 10
        paths[arm] = tuple(blending.set_index(["site", "seed", "tick"]).alpha.items())
    assert len(paths) == 7
    assert [arm for arm, path in paths.items() if arm != "linear" and path == paths["linear"]] == []


def test_a_study_gives_every_ramp_the_time_that_holding_may_cost_it() -> None:
    config = compose(["experiment=ab_grafting", "grafting=drift"])
    ramp, limit = (float(text.rstrip("%")) for text in (config.grafting.ramp, config.lifecycle.grafting_max))
    assert limit >= ramp * (1.0 + config.grafting.max_hold)
