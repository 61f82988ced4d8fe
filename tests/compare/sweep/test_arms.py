"""What varies makes the arms; what an arm sets may not be overridden."""

import pytest

from esper.compare.sweep.arms import lay_out, refuse_own_seed, refuse_repeated, refuse_unknown_blocks
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
    with pytest.raises(UserError, match=r"no key modle in this sweep, and compare.block=\[task,modle\] .*; did you mean model\?$"):
        refuse_unknown_blocks(["task", "modle"], settings)
    with pytest.raises(UserError, match=r"no key model.widht in this sweep.*; did you mean model.width\?$"):
        refuse_unknown_blocks(["model.widht"], settings)
    with pytest.raises(UserError, match="seeds pair the arms"):
        refuse_unknown_blocks(["seed"], settings)


@pytest.mark.parametrize("key", ["compare.alpha", "compare", "tracking.uri", "tracking", "output", "name", "tags", "resume"])
def test_several_values_of_what_belongs_to_the_whole_sweep_are_refused(key: str) -> None:
    with pytest.raises(
        UserError,
        match=f"^{key} has several values in this sweep; .* make no arms: (write tracking=.a,b. for all .*, or )?give one value of {key}",
    ):
        lay_out(jobs(f"{key}=a seed=0", f"{key}=b seed=0"), [])
    assert lay_out(jobs(f"{key}=a seed=0", f"{key}=a seed=1"), []).arms == ("",)


def test_a_seed_of_its_own_in_an_arms_file_is_refused() -> None:
    (job,) = lay_out(jobs("arm=b seed=3"), []).jobs
    refuse_own_seed(job, 3)
    with pytest.raises(UserError, match=r"^seed=3 would run with seed=5: an arm's file sets a seed"):
        refuse_own_seed(job, 5)
