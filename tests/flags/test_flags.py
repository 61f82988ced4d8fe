"""Feature flags: which of their rules holds, what the environment says, and what a failure turns off."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from esper.cli.compose import compose
from esper.config import config_hash
from esper.errors import UserError
from esper.feature_flags import FEATURES, VARIABLE, Flags, FlagsConfig, GrowthFlag, KernelFlag, chosen_by_hash

PINNED = [2, 6, 8, 11, 17]
SITES = [f"blocks.{n}" for n in range(400)]


def growth(**settings: object) -> Flags:
    return Flags(FlagsConfig(growth=GrowthFlag(**settings)), "CNN")  # type: ignore[arg-type]


def on(flags: Flags, feature: str = "growth") -> set[str]:
    return {site for site in SITES if flags.on(feature, site)}


@pytest.mark.usefixtures("processes")
def test_a_fraction_is_the_same_everywhere_and_for_ever():
    """Values of SHA-256, so of no process, machine or version; Python's own hash differs in every process."""
    assert [n for n in range(20) if chosen_by_hash("growth", f"blocks.{n}", 0.25)] == PINNED
    code = "from esper.feature_flags import chosen_by_hash as c; print([n for n in range(20) if c('growth', f'blocks.{n}', 0.25)])"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout) == PINNED


def test_a_larger_share_contains_a_smaller_one_and_every_feature_has_its_own_cohort():
    shares = [on(growth(percent=percent)) for percent in (0.0, 10.0, 50.0, 100.0)]
    assert shares[0] == set() and shares[0] < shares[1] < shares[2] < shares[3] == set(SITES)
    assert 20 < len(shares[1]) < 60 and 150 < len(shares[2]) < 250
    kernels = on(Flags(FlagsConfig(kernels=KernelFlag(percent=50.0))), "kernels")
    assert 60 < len(kernels & shares[2]) < 140


def test_block_beats_allow_and_allow_beats_percent():
    flags = growth(percent=0.0, allow=["blocks.1*"], block=["blocks.1?"])
    assert flags.on("growth", "blocks.1") and flags.on("growth", "blocks.123") and not flags.on("growth", "blocks.12")
    assert not flags.on("growth", "blocks.2")
    reasons = [flags.verdict("growth", site).why for site in ("blocks.1", "blocks.12", "blocks.2")]
    assert reasons == ["flags.growth.allow names blocks.1*", "flags.growth.block names blocks.1?", "flags.growth.percent=0"]


@pytest.mark.parametrize(
    ("pattern", "there"), [("cnn/blocks.3", True), ("CNN/blocks.*", True), ("c*/*", True), ("mlp/blocks.3", False), ("cnn/blocks.4", False)]
)
def test_a_pattern_may_mean_one_model_alone(pattern: str, there: bool):
    assert growth(percent=0.0, allow=[pattern]).on("growth", "blocks.3") is there


def test_a_pattern_that_matches_no_site_of_its_model_is_refused():
    growth(allow=["mlp/fc9"], block=["cnn/blocks.7"]).refuse_unmatched(SITES)
    with pytest.raises(UserError, match=r"flags.growth.block=\[cnn/fc9\] matches no site of the CNN; there are blocks.0, "):
        growth(block=["cnn/fc9"]).refuse_unmatched(SITES)


def test_failures_turn_off_the_site_or_everything_and_travel_with_the_run():
    flags = Flags(FlagsConfig(growth=GrowthFlag(failures=2), kernels=KernelFlag(failures=2)))
    assert [flags.fail("growth", site) for site in "abaa"] == [False, False, True, False]
    assert not flags.on("growth", "a") and flags.on("growth", "b")
    assert flags.verdict("growth", "a").why == "it failed 3 times, and flags.growth.failures=2"
    assert [flags.fail("kernels", "a"), flags.fail("kernels", "b")] == [False, True] and not flags.on("kernels", "c")
    again = Flags()
    again.load(json.loads(json.dumps(flags.state())))
    assert again.failed == flags.failed and not again.on("kernels", "c")
    never = growth(failures=0)
    assert not any(never.fail("growth", "a") for _ in range(9)) and never.on("growth", "a")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("growth=off", (0.0, [], 100.0)),
        ("growth=on", (100.0, ["fc1"], 100.0)),
        ("growth=25%, kernels=off", (25.0, ["fc1"], 0.0)),
        ("", (5.0, ["fc1"], 100.0)),
    ],
)
def test_the_environment_has_the_last_word(said: str, expected: tuple[float, list[str], float], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, said)
    config = FlagsConfig(growth=GrowthFlag(percent=5.0, allow=["fc1"], block=["fc2"]))
    assert (config.growth.percent, config.growth.allow, config.kernels.percent) == expected
    assert config.growth.block == ["fc2"], "what is blocked stays so"
    assert Flags(config).verdict("growth", "fc3").why.startswith(f"{VARIABLE} sets " if "growth" in said else "flags.growth")


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("grow=off", "says 'grow=off', and there is no feature 'grow': there are kernels and growth; did you mean growth"),
        ("growth", "says 'growth'; a feature is on, off, or on at a share of the sites, as in growth=25%"),
        ("growth=25", "as in growth=25%"),
        ("growth=101%", "as in growth=25%"),
        ("growth=nan%", "as in growth=25%"),
    ],
)
def test_an_environment_that_cannot_be_meant_is_refused(said: str, text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, said)
    with pytest.raises(UserError, match=text):
        FlagsConfig()


def test_what_the_environment_says_is_in_the_configuration_of_the_run(monkeypatch: pytest.MonkeyPatch):
    plain, typed = compose([]), compose(["flags.growth.percent=25"])
    monkeypatch.setenv(VARIABLE, "growth=25%")
    said = compose([])
    assert said.flags == typed.flags and config_hash(said) == config_hash(typed) != config_hash(plain)


def test_every_feature_has_its_settings():
    assert FEATURES == ("kernels", "growth")
    with pytest.raises(UserError, match=r"flags\.growth\.percent=101 is not accepted: .* takes a finite number from 0\.0 to 100\.0"):
        compose(["flags.growth.percent=101"])
    with pytest.raises(UserError, match=r"no key flags.growth.blok.*did you mean flags.growth.block"):
        compose(["flags.growth.blok=[fc1]"])
