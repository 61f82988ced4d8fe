"""The keys that a preset's file sets, and the overrides that are refused beside an arm's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.cli.preset_files import keys_in, refuse_overridden_arm
from esper.errors import UserError


def test_an_override_of_what_an_arm_sets_is_refused_naming_key_and_arm(tmp_path: Path) -> None:
    text = "# @package _global_\ndefaults:\n  - override /grafting: drift\noptimizer:\n  lr: 0.1\n"
    (tmp_path / "fast.yaml").write_text(text)
    assert keys_in({"defaults": [{"override /grafting": "drift"}], "optimizer": {"lr": 0.1}}) == [
        "grafting",
        "optimizer.lr",
    ]
    for typed in ("grafting", "optimizer.lr", "grafting.ramp"):
        with pytest.raises(UserError, match=rf"{typed} is set .* arm 'fast'"):
            refuse_overridden_arm([typed], "fast", [tmp_path])
    refuse_overridden_arm(["optimizer.weight_decay", "task", "optimizer"], "fast", [tmp_path])


def test_what_an_arm_takes_in_from_another_file_or_puts_into_a_package_is_its_own_too(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("# @package _global_\noptimizer: {lr: 0.1}\n")
    (tmp_path / "child.yaml").write_text("# @package _global_\ndefaults: [base, _self_]\noptimizer: {weight_decay: 0.2}\n")
    (tmp_path / "packed.yaml").write_text("# @package grafting\nramp: 3%\n")
    for key, arm, file in (
        ("optimizer.lr", "child", "base"),
        ("optimizer.weight_decay", "child", "child"),
        ("grafting.ramp", "packed", "packed"),
    ):
        with pytest.raises(UserError, match=rf"{key} is set .* arm '{arm}' \(conf/arm/{file}.yaml sets {key}\)"):
            refuse_overridden_arm([key], arm, [tmp_path])
    refuse_overridden_arm(["grafting.ramp"], "child", [tmp_path])
    refuse_overridden_arm(["optimizer.lr", "ramp"], "packed", [tmp_path])
