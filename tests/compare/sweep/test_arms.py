"""What varies makes the arms; what an arm sets may not be overridden."""

from pathlib import Path

import pytest

from esper.compare.sweep.arms import arm_keys, lay_out, refuse_overridden_arm, refuse_own_seed, refuse_repeated, refuse_unknown_blocks
from esper.errors import UserError


def jobs(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


def test_what_varies_besides_the_seed_makes_the_arms() -> None:
    layout = lay_out(jobs("grafting=linear seed=0", "grafting=linear seed=1", "grafting=drift seed=0", "grafting=drift seed=1"), [])
    assert (layout.arms, layout.blocks, layout.seeds) == (("linear", "drift"), ("",), (0, 1))
    assert [job.label for job in layout.jobs[:2]] == ["linear seed=0", "linear seed=1"]


def test_task_and_model_are_blocks_and_so_are_the_keys_below_them() -> None:
    layout = lay_out(jobs("arm=a task=digits model.width=8", "arm=b task=mnist1d model.width=16"), ["task", "model"], seed=7)
    assert layout.arms == ("a", "b")
    assert layout.blocks == ("task=digits model.width=8", "task=mnist1d model.width=16")
    assert layout.seeds == (7,)


def test_several_varying_keys_are_named_and_constant_ones_are_not() -> None:
    layout = lay_out(jobs("+x=1 optimizer.lr=1 grafting=linear", "+x=1 optimizer.lr=2 grafting=drift"), [])
    assert layout.arms == ("optimizer.lr=1 grafting=linear", "optimizer.lr=2 grafting=drift")


def test_a_sweep_over_seeds_alone_has_one_arm() -> None:
    assert lay_out(jobs("seed=0", "seed=1"), []).arms == ("",)


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (("x=a seed=0", "x=a seed=0", "x=b seed=0", "x=b seed=0"), r"Jobs 0 and 1 of the sweep are the same run \(x=a seed=0\)"),
        (("x=a seed=0", "x=a seed=1", "x=a seed=0", "x=a seed=1"), r"Jobs 0 and 2 .* \(x=a seed=0\)"),
        (("task=a x=1", "task=b x=1", "task=a x=1", "task=b x=1"), r"Jobs 0 and 2 .* \(task=a x=1\)"),
    ],
)
def test_a_run_that_occurs_twice_is_refused_by_its_jobs(texts: tuple[str, ...], told: str) -> None:
    with pytest.raises(UserError, match=told):
        refuse_repeated(lay_out(jobs(*texts), ["task"]))
    refuse_repeated(lay_out(jobs("x=a seed=0", "x=a seed=1", "x=b seed=0", "x=b seed=1"), ["task"]))


def test_a_block_that_is_no_key_is_refused_with_the_nearest_that_is() -> None:
    settings = ["task.name", "model.name", "model.width", "grafting.threshold", "seed"]
    refuse_unknown_blocks(["task", "model", "model.width", "grafting.threshold"], settings)
    refuse_unknown_blocks([], settings)
    with pytest.raises(UserError, match=r"no key modle in this sweep, and compare.block=\[task,modle\] .*; did you mean model\.$"):
        refuse_unknown_blocks(["task", "modle"], settings)
    with pytest.raises(UserError, match=r"no key model.widht in this sweep.*; did you mean model.width\.$"):
        refuse_unknown_blocks(["model.widht"], settings)
    with pytest.raises(UserError, match="seeds pair the arms"):
        refuse_unknown_blocks(["seed"], settings)


@pytest.mark.parametrize("key", ["compare.alpha", "compare", "tracking.uri", "tracking", "output", "name", "tags", "resume"])
def test_several_values_of_what_belongs_to_the_whole_sweep_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"^{key} has several values in this sweep; .* make no arms: give one value of {key}"):
        lay_out(jobs(f"{key}=a seed=0", f"{key}=b seed=0"), [])
    assert lay_out(jobs(f"{key}=a seed=0", f"{key}=a seed=1"), []).arms == ("",)


def test_an_override_of_what_an_arm_sets_is_refused_naming_key_and_arm(tmp_path: Path) -> None:
    text = "# @package _global_\ndefaults:\n  - override /grafting: drift\noptimizer:\n  lr: 0.1\n"
    (tmp_path / "fast.yaml").write_text(text)
    assert arm_keys({"defaults": [{"override /grafting": "drift"}], "optimizer": {"lr": 0.1}}) == [
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


def test_a_seed_of_its_own_in_an_arms_file_is_refused() -> None:
    (job,) = lay_out(jobs("arm=b seed=3"), []).jobs
    refuse_own_seed(job, 3)
    with pytest.raises(UserError, match=r"^seed=3 would run with seed=5: an arm's file sets a seed"):
        refuse_own_seed(job, 5)
