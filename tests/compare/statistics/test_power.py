"""Statements of power against the library that defines it, and against the test itself."""

import numpy as np
import pytest
from statsmodels.stats.power import TTestPower

from esper.compare.statistics.power import detectable, fewest_pairs, needed_pairs, power
from esper.compare.statistics.random_draws import centred, common_step, generator
from esper.compare.statistics.sequential import crossing_look, look_pairs


def test_fifteen_pairs_find_eight_tenths_with_eighty_percent() -> None:
    assert power(15, 0.8, 0.05) == pytest.approx(0.8, abs=0.03)
    assert detectable(15, 0.8, 0.05) == pytest.approx(0.78, abs=0.02)


def test_power_beyond_the_simulated_pairs_is_that_of_the_t_test() -> None:
    assert power(25, 0.5, 0.05, 3) == pytest.approx(TTestPower().power(0.5, 25, 0.05 / 3), abs=1e-6)


def test_needed_pairs_are_the_first_that_have_the_power() -> None:
    needed = needed_pairs(0.6, 0.8, 0.05, 2)
    assert power(needed, 0.6, 0.05, 2) >= 0.8 > power(needed - 1, 0.6, 0.05, 2)


def test_more_comparisons_need_more_pairs() -> None:
    assert [fewest_pairs(0.05, k) for k in (1, 2, 5)] == [6, 7, 8]
    assert needed_pairs(0.8, 0.8, 0.05, 5) > needed_pairs(0.8, 0.8, 0.05, 1)
    assert power(5, 9.0, 0.05) == 0.0
    assert detectable(5, 0.8, 0.05) == np.inf


def test_power_at_small_levels_is_a_number_that_grows_with_the_effect() -> None:
    found = [power(33, effect, 1e-4, 2) for effect in np.arange(0.1, 3.0, 0.1)]
    assert np.isfinite(found).all() and found == sorted(found)


@pytest.mark.parametrize(("pairs", "comparisons", "wanted"), [(10, 1, 0.8), (20, 1, 0.8), (30, 3, 0.9), (60, 1, 0.7)])
def test_stated_power_of_a_sequential_sweep_is_the_power_it_has(pairs: int, comparisons: int, wanted: float) -> None:
    effect = detectable(pairs, wanted, 0.05, comparisons, (), 3)
    data = generator("looked").standard_normal((pairs, 2_000)) + effect
    found = crossing_look(data, look_pairs(pairs, 3, fewest_pairs(0.05, comparisons)), pairs, 0.05 / comparisons, flips=1_999) >= 0
    assert found.mean() == pytest.approx(wanted, abs=0.03)


def test_a_heavy_tailed_pilot_states_more_power() -> None:
    pilot = tuple(generator("test").standard_t(3, 4_000).tolist())
    assert power(10, 1.0, 0.05, 1, pilot) > power(10, 1.0, 0.05) + 0.02


def test_a_pilots_ties_are_kept_when_power_is_stated_from_it() -> None:
    rng = generator("test")
    counts = rng.binomial(360, 0.95, (2, 400)) / 360
    tied, smooth = counts[1] - counts[0], rng.normal(0.0, 0.016, 400)
    assert common_step(tied) == pytest.approx(1 / 360)
    assert common_step(smooth) == 0.0
    assert common_step(np.zeros(0)) == common_step(np.zeros(3)) == 0.0
    np.testing.assert_allclose(np.round(centred(tied + 0.0123) * 360, 6) % 1, np.round((centred(tied + 0.0123) * 360)[0] % 1, 6))
    coarse = tuple((np.round(tied * 360 / 12) * 12 / 360).tolist())
    effect = detectable(8, 0.8, 0.05, 2)
    assert power(8, effect, 0.05, 2, coarse) < power(8, effect, 0.05, 2, tuple(smooth.tolist())) - 0.1
