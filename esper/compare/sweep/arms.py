"""The settings that vary in a sweep: seeds make pairs, ``task`` and ``model`` make blocks, everything else makes arms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from esper.config import did_you_mean, listing, or_list
from esper.errors import UserError

SEED = "seed"
#: Groups and keys that belong to a sweep as a whole, with all keys below them.
WHOLE = ("compare", "tracking", "output", "resume", "name", "tags")


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its number in the sweep, its overrides, and where it belongs."""

    number: int
    overrides: tuple[str, ...]
    arm: str
    block: str
    seed: int

    @property
    def label(self) -> str:
        """A name that a person can read, like ``linear digits seed=3``."""
        return " ".join(part for part in (self.arm, self.block, f"seed={self.seed}") if part)


@dataclass(frozen=True)
class Layout:
    """All jobs of a sweep, with the arms, blocks and seeds in the order in which they were given."""

    jobs: tuple[Job, ...]
    arms: tuple[str, ...]
    blocks: tuple[str, ...]
    seeds: tuple[int, ...]


def lay_out(job_overrides: Sequence[Sequence[str]], blocks: Sequence[str], seed: int = 0) -> Layout:
    """Sort the jobs of a sweep into arms, blocks and seeds.

    Args:
        job_overrides: ``key=value`` texts, one list a job.
        blocks: keys that make blocks (``compare.block``), with all keys below them.
        seed: the seed of jobs that set none.

    Raises:
        UserError: several values of a setting that belongs to the whole sweep.
    """
    settings = [dict(text.partition("=")[::2] for text in overrides) for overrides in job_overrides]
    values: dict[str, set[str]] = {}
    for one in settings:
        for key, value in one.items():
            values.setdefault(key.lstrip("+"), set()).add(value)
    varying = [key for key, found in values.items() if len(found) > 1 and key != SEED and not key.startswith("hydra.")]
    for key in varying:
        if is_below(key, WHOLE):
            raise UserError(
                f"{key} has several values in this sweep; {listing(WHOLE)} belong to a sweep as a whole and make no arms: "
                f"{or_list(key + '=' + ','.join(sorted(values[key])))}give one value of {key}, or start a sweep for each."
            )
    blocked = [key for key in varying if is_below(key, blocks)]
    armed = [key for key in varying if key not in blocked]
    jobs = []
    for number, (overrides, one) in enumerate(zip(job_overrides, settings, strict=True)):
        plain = {key.lstrip("+"): value for key, value in one.items()}
        job = Job(number, tuple(overrides), _name(plain, armed), _name(plain, blocked), _seed(plain.get(SEED), seed))
        jobs.append(job)
    distinct = (tuple(dict.fromkeys(getattr(job, part) for job in jobs)) for part in ("arm", "block", "seed"))
    return Layout(tuple(jobs), *distinct)


def refuse_unknown_blocks(blocks: Sequence[str], settings: Iterable[str]) -> None:
    """Refuse a name in ``compare.block`` that is not a key of any job: the intended key would make arms instead.

    Args:
        blocks: ``compare.block``.
        settings: the dotted keys of all jobs' configurations.

    Raises:
        UserError: naming the key, and the nearest that there is.
    """
    known = {".".join(parts[:depth]) for parts in (key.split(".") for key in settings) for depth in range(1, len(parts) + 1)}
    for key in blocks:
        if key == SEED:
            raise UserError("compare.block names seed, and seeds pair the arms: take it out of compare.block.")
        if key not in known:
            raise UserError(
                f"There is no key {key} in this sweep, and compare.block=[{','.join(blocks)}] asks to judge its values apart"
                f"{did_you_mean(key, sorted(known))}"
            )


def refuse_repeated(layout: Layout) -> None:
    """Refuse a sweep in which a run occurs twice: both would count as pairs.

    Raises:
        UserError: naming the run and its two jobs.
    """
    first: dict[tuple[str, str, int], Job] = {}
    for job in layout.jobs:
        same = first.setdefault((job.arm, job.block, job.seed), job)
        if same is not job:
            raise UserError(
                f"Jobs {same.number} and {job.number} of the sweep are the same run ({' '.join(job.overrides)}); "
                "give every value once, also every seed: a pair that is counted twice is no evidence."
            )


def refuse_own_seed(job: Job, seed: int) -> None:
    """Refuse a job whose seed is not the pair's: an arm's file that sets one would pair runs that share nothing.

    Raises:
        UserError: naming the job and both seeds.
    """
    if seed != job.seed:
        raise UserError(
            f"{job.label} would run with seed={seed}: an arm's file sets a seed, but seeds pair the arms and every arm has the same; "
            "take it out of the file (for an A/A test there is compare.fresh_seeds)."
        )


def is_below(key: str, owners: Sequence[str]) -> bool:
    """Whether a key is one of the owners, or below one."""
    return any(key == owner or key.startswith(f"{owner}.") for owner in owners)


def _seed(text: str | None, default: int) -> int:
    return int(text) if text is not None else default


def _name(settings: dict[str, str], keys: Sequence[str]) -> str:
    """The value alone where one key varies; ``key=value`` pairs where several do."""
    if len(keys) == 1:
        return settings.get(keys[0], "default")
    return " ".join(f"{key}={settings.get(key, 'default')}" for key in keys)
