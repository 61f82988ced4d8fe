"""Which of many proposals to grant under several budgets: the knapsack problem of many dimensions, solved well and fast.

Exactly for few proposals; for more by greedy fillings in order of value per priced cost (a budget that binds gets dearer: Lagrange
multipliers, as in Pirkul 1987), the best of which is improved by exchanges.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import numpy as np

EXACT = 12
"""Up to so many proposals all subsets are looked at."""
ROUNDS = 16
FORCED = 12
"""The most valuable proposals, with and without each of which a filling is tried."""
STARTS, FEW_STARTS, MANY = 12, 2, 200
"""Fillings that exchanges improve: the best twelve different ones, of more than 200 proposals the best two."""
EXCHANGES = 30
"""Proposals left out that are tried in the place of one or two that were granted, the most valuable first."""
_SLACK = 1e-9


def allocate(value: np.ndarray, cost: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Which proposals to grant, bool ``[n]``, so that the sum of ``value`` ``[n]`` is large and no budget is overdrawn.

    Args:
        value: what each is worth; one that is worth nothing, or not finite, is not granted.
        cost: ``[n, budgets]``, at least 0.
        left: ``[budgets]``; infinite where there is no limit.
    """
    granted = np.zeros(len(value), bool)
    bounded = np.isfinite(left)
    left = np.maximum(0.0, left[bounded])
    scale = np.where(left > 0.0, left, 1.0)
    share, left = cost[:, bounded] / scale, np.where(left > 0.0, 1.0, 0.0) + _SLACK
    useful = np.flatnonzero(np.isfinite(value) & (value > 0.0) & (share <= left).all(1))
    if len(useful):
        chosen = _exact if len(useful) <= EXACT else _filled
        granted[useful[chosen(value[useful], share[useful], left)]] = True
    return granted


def _exact(value: np.ndarray, share: np.ndarray, left: np.ndarray) -> np.ndarray:
    """The best of all subsets, as positions."""
    subsets = (np.arange(1 << len(value))[:, None] >> np.arange(len(value))) & 1
    worth = np.where((subsets @ share <= left).all(1), subsets @ value, -1.0)
    return np.flatnonzero(subsets[int(worth.argmax())])


def _filled(value: np.ndarray, share: np.ndarray, left: np.ndarray) -> np.ndarray:
    """The best of several fillings: at other prices, then with each of the largest forced in or out; improved by exchanges."""
    price, tried = np.ones(len(left)), []
    for _ in range(ROUNDS):
        order = np.argsort(-value / (share @ price + _SLACK), kind="stable")
        found = _fill(order, share, left)
        tried.append((float(value[found].sum()), order, found))
        used = share[found].sum(0)
        price = np.maximum(1e-3, price * np.exp(2.0 * (used - used.mean())))
    tried.sort(key=lambda one: -one[0])
    order = tried[0][1]
    for forced in _forced(value, order):
        found = _fill(forced, share, left)
        tried.append((float(value[found].sum()), order, found))
    tried.sort(key=lambda one: -one[0])
    starts = {found.tobytes(): found for _, _, found in ((worth, order, np.sort(found)) for worth, order, found in tried)}
    improved = [_exchanged(found, value, share, left) for found in list(starts.values())[: FEW_STARTS if len(value) > MANY else STARTS]]
    return max(improved, key=lambda found: float(value[found].sum()))


def _forced(value: np.ndarray, order: np.ndarray) -> Iterator[np.ndarray]:
    """The order with each of the largest first, or left out; of few proposals also with two of them first, or one in and one out."""
    largest = np.argsort(-value, kind="stable")[:FORCED].tolist()
    pairs = permutations(largest, 2) if len(value) <= MANY else ()
    for first, out in [*((one, -1) for one in largest), *((-1, one) for one in largest), *pairs]:
        kept = order[(order != out) & (order != first)]
        yield kept if first < 0 else np.concatenate([[first], kept])
        if first >= 0 and out >= 0 and first < out:
            yield np.concatenate([[first, out], kept])


def _fill(order: np.ndarray, share: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Grant in this order everything that still fits."""
    left, taken = left.copy(), []
    while len(order):
        fits = (np.cumsum(share[order], 0) <= left).all(1)
        count = len(order) if fits.all() else int(fits.argmin())
        taken.append(order[:count])
        left = left - share[order[:count]].sum(0)
        order = order[count + 1 :]
        order = order[(share[order] <= left).all(1)]
    return np.concatenate(taken) if taken else order


def _exchanged(chosen: np.ndarray, value: np.ndarray, share: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Put one that was left out in the place of one or two of smaller worth together, and fill what that frees, while it pays."""
    inside = np.zeros(len(value), bool)
    inside[chosen] = True
    outside = np.flatnonzero(~inside)
    for new in outside[np.argsort(-value[outside], kind="stable")][:EXCHANGES]:
        room = left - share[inside].sum(0)
        members = np.flatnonzero(inside)
        gone = _cheapest(members, value, share, room - share[new], value[new])
        if gone is None:
            continue
        inside[gone] = False
        inside[new] = True
        others = np.flatnonzero(~inside)
        order = others[np.argsort(-value[others], kind="stable")]
        inside[_fill(order, share, left - share[inside].sum(0))] = True
    return np.flatnonzero(inside)


def _cheapest(members: np.ndarray, value: np.ndarray, share: np.ndarray, room: np.ndarray, worth: float) -> list[int] | None:
    """Of the members the one, or the two, of least worth without which the room is not negative, if they are worth less than ``worth``."""
    enough = (room + share[members] >= 0.0).all(1) & (value[members] < worth)
    if enough.any():
        possible = members[enough]
        return [int(possible[value[possible].argmin()])]
    cheap = members[np.argsort(value[members], kind="stable")][:40]
    pairs = value[cheap][:, None] + value[cheap]
    fits = (room + share[cheap][:, None] + share[cheap][None] >= 0.0).all(2) & (pairs < worth) & ~np.eye(len(cheap), dtype=bool)
    if not fits.any():
        return None
    one, other = np.unravel_index(int(np.where(fits, pairs, np.inf).argmin()), fits.shape)
    return [int(cheap[one]), int(cheap[other])]
