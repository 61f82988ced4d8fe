"""Bands: far above the usual is out, but what the run itself did at its start never is."""

from __future__ import annotations

import math

from esper.trainer.governor import WARM, WINDOW, Band


def learnt_by_heart() -> Band:
    """A loss that began at 2.3 and has been about a thousandth for longer than the window."""
    band = Band(spreads=8.0, factor=3.0)
    for step in range(WARM + 2 * WINDOW):
        band.accept(max(2.3 * 0.9**step, 1e-3 + 1e-5 * (step % 7)))
    return band


def test_one_mistake_of_a_host_that_knows_its_data_is_no_anomaly():
    assert not learnt_by_heart().out(0.4)


def test_worse_than_at_the_start_is_out_of_band():
    band = learnt_by_heart()
    assert band.out(2.4) and band.out(math.nan) and band.out(math.inf)


def test_a_saved_band_judges_as_before():
    band, again = learnt_by_heart(), Band(spreads=8.0, factor=3.0)
    again.load(band.state())
    assert [again.out(value) for value in (0.4, 2.2, 2.4)] == [band.out(value) for value in (0.4, 2.2, 2.4)] == [False, False, True]
