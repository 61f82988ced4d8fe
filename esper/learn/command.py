"""``esper learn [runs …] to=policy.safetensors``: a policy from recorded runs."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from esper.errors import UserError
from esper.inventory.entries import SWEEP, Entry
from esper.inventory.find import find, read_targets
from esper.inventory.list_command import known
from esper.inventory.store import store_of

if TYPE_CHECKING:
    from esper.learn.examples import Example

USAGE = """\
usage: esper learn [run or sweep …] [to=policy.safetensors] [output=…] [uri=…] [seed=0]   a policy from recorded runs

  Every run or sweep is named by its folder, its name or its id, as esper list shows them; a sweep stands for its jobs. Without a name all
  finished runs are read, whatever controller they had: what it did is imitated, and then weighted by what it earned. A run whose folder is
  gone is read from the store. A fifth of the runs is held out to say how well the policy predicts.

  to       the file of the policy, for esper controller=policy controller.weights=<file>
  output   folder of all outputs (default: outputs)
  uri      tracking URI of an MLflow store; empty: mlflow.db in the folder of output; none: the folder alone
  seed     draws the first weights and the runs that are held out"""
KEYS = ("to", "output", "uri", "seed")
DEFAULT = "policy.safetensors"
LEAST_GROWTHS, LEAST_RUNS = 8, 2
"""Germinations, and runs with any, from which something can be learnt and still be checked."""
ENDING = ".safetensors"
MOST_NAMED = 3


@dataclass(frozen=True, eq=False)
class Learnt:
    """The decisions of one run."""

    name: str
    examples: list[Example]


def main(words: Sequence[str]) -> int:
    """Learn, report and write; exit code 0."""
    if {"--help", "-h"} & set(words):
        print(USAGE, flush=True)
        return 0
    names, given = read_targets(words, "esper learn", sys.maxsize, KEYS)
    target, seed = _target(given), _seed(given)
    runs, left_out = decisions(chosen(names, given), given)
    print("\n".join(learn(runs, left_out, target, seed)), flush=True)
    return 0


def _target(given: Mapping[str, str]) -> Path:
    """The file to write, tried now. Raises UserError where it cannot be."""
    if given.get("output", "").endswith(ENDING):
        raise UserError(f"output={given['output']}: output is the folder of all outputs; name the policy's file by to={given['output']}.")
    text = given.get("to", DEFAULT)
    place = Path(text).expanduser()
    if place.suffix != ENDING or place.is_dir():
        raise UserError(f"to={text} is not accepted: name a file that ends in {ENDING}, as in to={DEFAULT}.")
    if not place.parent.is_dir() or not os.access(place.parent, os.W_OK):
        raise UserError(f"to={text}: there is no folder {place.parent} that could be written to; make it, or name another.")
    return place


def _seed(given: Mapping[str, str]) -> int:
    text = given.get("seed", "0")
    if not text.isdecimal():
        raise UserError(f"seed={text} is not accepted: give a whole number, as in seed=0.")
    return int(text)


def chosen(names: Sequence[str], given: Mapping[str, str]) -> list[Entry]:
    """The runs that the words name, sweeps as their jobs; all finished ones where none is named. Raises UserError for none at all."""
    everything = known(given) if not names or any(not Path(name).is_dir() for name in names) else []
    if not names:
        runs = [entry for entry in everything if entry.kind != SWEEP and entry.status == "FINISHED"]
        if not runs:
            raise UserError(f"There is no finished run in {given.get('output', 'outputs')}; train some first, or name others: output=….")
        return sorted(runs, key=lambda entry: (entry.id, entry.store_id))
    runs = []
    for name in names:
        entry = find(name, given)
        runs += _jobs(entry, everything) if entry.kind == SWEEP else [entry]
    return list({(entry.folder, entry.store_id): entry for entry in runs}.values())


def _jobs(sweep: Entry, everything: list[Entry]) -> list[Entry]:
    from esper.inventory.folder import entries

    found = everything if sweep.folder is None else entries(sweep.folder)
    jobs = [entry for entry in found if entry.kind != SWEEP and (sweep.folder is not None or entry.sweep == sweep.id)]
    return sorted(jobs, key=lambda entry: (entry.id, entry.store_id))


def decisions(found: Sequence[Entry], given: Mapping[str, str]) -> tuple[list[Learnt], list[str]]:
    """The decisions of these runs, and a sentence for each that holds none that could be learnt from."""
    runs: list[Learnt] = []
    left_out: list[str] = []
    for entry in found:
        try:
            examples = _read(entry, given)
        except UserError as error:
            left_out.append(f"{entry.folder or entry.store_id}: {error}")
            continue
        runs.append(Learnt(entry.name, examples))
    return runs, left_out


def _read(entry: Entry, given: Mapping[str, str]) -> list[Example]:
    from esper.learn.examples import Replay
    from esper.learn.recorded import started, ticks

    if entry.status != "FINISHED":
        raise UserError(f"it is {entry.status.lower()}, and what its branches came to is not known")
    if entry.folder is not None:
        return Replay(started(entry.folder)).of(ticks(entry.folder))
    uri = store_of(Path(given.get("output", "outputs")), given.get("uri", ""))[0]
    with tempfile.TemporaryDirectory(prefix="esper-") as place:
        folder = _downloaded(entry, uri, Path(place))
        return Replay(started(folder)).of(ticks(folder))


def _downloaded(entry: Entry, uri: str, place: Path) -> Path:
    """The tables of a run that the store alone has, in ``place``. Raises UserError where it lacks some."""
    from esper.learn.recorded import FILES
    from esper.tracking.mlflow_store import quiet_client

    client = quiet_client(uri, "uri", "or name another store with uri=…")
    for name in FILES:
        try:
            client.download_artifacts(entry.store_id, name, str(place))
        except Exception as error:  # whatever the store's kind of files raises
            raise UserError(f"its folder is gone, and the store has no {name} of it") from error
    return place


def learn(runs: list[Learnt], left_out: list[str], target: Path, seed: int) -> list[str]:
    """Train on most runs, measure on the others, train on all, write; the lines of the report.

    Raises:
        UserError: too little to learn from.
    """
    from esper.controllers.policy.network import GERMINATE
    from esper.controllers.policy.weights import packed, write
    from esper.learn.examples import RENT, TREND
    from esper.learn.training import counts, held_out, tensors, train, words_of

    everything = [example for run in runs for example in run.examples]
    growing = [run for run in runs if any(example.kind == GERMINATE for example in run.examples)]
    rewards = [example.reward for example in everything if example.kind == GERMINATE]
    if len(rewards) < LEAST_GROWTHS or len(growing) < LEAST_RUNS:
        raise UserError(_too_little(len(rewards), len(growing), left_out))
    apart = _apart(growing, seed)
    words = words_of([example for run in runs if run not in apart for example in run.examples])
    kept = [example for run in runs if run not in apart for example in run.examples]
    unseen = [example for run in apart for example in run.examples if example.kind != GERMINATE or _known(example, words)]
    if not any(example.kind == GERMINATE for example in unseen):
        raise UserError(
            f"What grew in {', '.join(run.name for run in apart[:MOST_NAMED])} grew nowhere else, so nothing says how well a policy "
            "predicts that learnt from the others: learn from more runs of the same kind, or have others held out, seed=…."
        )
    first = tensors(kept, words)
    mean = float(first.reward[first.grown].mean())
    imitating, improved = train(first, words, seed)
    held = held_out(imitating, improved, tensors(unseen, words), mean)
    words = words_of(everything)
    whole = tensors(everything, words)
    _, network = train(whole, words, seed)
    learnt = {"runs": len(runs), "decisions": len(whole), "error": held.error, "rent": RENT, "trend": TREND}
    policy = packed(network, learnt)
    write(policy, target)
    kinds, paid = counts(whole), sum(reward > 0.0 for reward in rewards)
    shares = ", ".join(f"{number} {name}" for name, number in kinds.items())
    return [
        f"runs          {len(runs)}, {len(apart)} of them held out for the figures below" + _left_out(left_out),
        f"decisions     {len(whole)}: {shares}",
        f"rewards       {sum(rewards) / len(rewards):.4f} a germination; {paid} of {len(rewards)} earned something",
        f"held out      log-probability {held.imitated:.3f} a decision after imitation, {held.improved:.3f} after improvement; "
        f"{held.uniform:.3f} by lot",
        f"predictions   off by {held.error:.4f} (RMS); the mean of the others is off by {held.mean_error:.4f}"
        + (": learn from more runs, for these predict nothing" if held.error >= held.mean_error else ""),
        f"knows         {', '.join(words.blueprint)} by {', '.join(words.strategy)}; objectives {', '.join(words.objective)}",
        f"policy        {target} ({policy.digest}); use it: esper controller=policy controller.weights={target}",
    ]


def _known(example: Example, words: object) -> bool:
    return all(word in getattr(words, key) for word, key in zip(example.words, ("blueprint", "strategy", "objective"), strict=True))


def _apart(growing: list[Learnt], seed: int) -> list[Learnt]:
    """A fifth of the runs that grew something, at least one, drawn by lot."""
    import torch

    from esper.randomness import generator

    order = torch.randperm(len(growing), generator=generator(seed, "held out")).tolist()
    return [growing[place] for place in order[: max(1, len(growing) // 5)]]


def _too_little(growths: int, runs: int, left_out: list[str]) -> str:
    found = f"{growths} germination{'s' * (growths != 1)} by a controller in {runs} run{'s' * (runs != 1)}"
    return (
        f"There is too little to learn from: {found}, and a policy needs {LEAST_GROWTHS} in {LEAST_RUNS} runs at least. "
        f"Train more, for example esper -m controller=random seed='range(0,10)'{_left_out(left_out)}."
    )


def _left_out(left_out: list[str]) -> str:
    """How many runs were left out, and why the first of them."""
    if not left_out:
        return ""
    some = "; ".join(left_out[:MOST_NAMED]) + ("; …" if len(left_out) > MOST_NAMED else "")
    return f" ({len(left_out)} left out: {some})"
