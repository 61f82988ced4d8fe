"""Reasoning primitives: copying, variable assignment of depth 0, 1 and 2, and sums, each answered in one forward pass.

After the synthetic primitives of Saunshi et al. 2024 (arXiv 2409.19044), in a form of a few bytes a problem: ``A3`` gives a variable its
value, or the name of another one. A marker says that an answer follows, one a kind of problem (``>`` below); in an assignment the
name that is asked for stands between the two::

    qwerty>qwerty
    A3;K7;>K7>K7
    B3;Q7;CQ;XB;>X3>C7
    H3;T7;ET;PH;MP;IP;>I3>M3
    07+58>065

The loss is over text and answers. What a problem states is drawn by lot, so there is nothing in it to be predicted.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from esper.errors import UserError
from esper.randomness import generator
from esper.tasks.base import SETS, Batch, Metric, Task, digest_of, logits, ready
from esper.tasks.config import PrimitivesConfig, TextConfig

BYTES = 256
DEPTHS = (0, 1, 2)
KINDS = ("copying", *(f"assignment_{depth}" for depth in DEPTHS), "adding")
"""In the order of their markers, tokens ``BYTES`` and up."""
LETTERS = 26
"""Words are of small ones, and variables have capitals for names."""
HELD_OUT_SUMS = 0.05
"""Share of all sums for each of judge, validation, test."""


class Primitives(Dataset[Batch]):
    """Sample ``i`` is a stretch of text, if there is any, and row ``i`` of the problems.

    Inputs are all of its tokens but the last, targets all but the first. A text of fewer stretches than samples is read again.
    """

    def __init__(self, problems: Tensor, text: Any = None) -> None:
        """``problems``: int16 ``[samples, tokens]``; ``text``: a data set whose inputs are stretches, such as that of ``task=text``."""
        self.problems, self.text = problems, text

    def __len__(self) -> int:
        return len(self.problems)

    def gather(self, indices: Tensor) -> Batch:
        """Inputs and targets, int64 ``[N, T]``, of the samples at ``indices`` (int64 ``[N]``, on the data's device)."""
        tokens = self.problems[indices].long()
        if self.text is not None:
            tokens = torch.cat((self.text.gather(indices % len(self.text))[0], tokens), 1)
        return tokens[:, :-1], tokens[:, 1:]

    def __getitem__(self, index: int) -> Batch:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.gather(torch.tensor(indices, device=self.problems.device))

    def lies_on(self, device: torch.device) -> bool:
        """Whether ``device`` takes the text, too."""
        return self.text is None or bool(self.text.lies_on(device))

    def to(self, device: torch.device) -> Primitives:
        """The same samples on ``device``; itself when they are there already."""
        if self.problems.device == device:
            return self
        return Primitives(self.problems.to(device), None if self.text is None else self.text.to(device))


def build(config: PrimitivesConfig) -> Task:
    """Draw the problems, and find the text to put before them.

    Raises:
        UserError: a text that is absent or too short.
    """
    text = _text(config)
    form = Form(config.letters, config.variables, config.sums, config.digits)
    data: dict[str, Any] = {}
    for which in SETS:
        drawn = problems(form, config.train if which == "train" else config.held_out, which, config.split_seed)
        data[which] = Primitives(drawn, None if text is None else getattr(text, which))
    length = data["train"].problems.shape[1]
    digest = hashlib.sha256(digest_of([data[which].problems for which in SETS]).encode() + (text.digest.encode() if text else b""))
    measures = Measures(config.text, config.letters, config.digits)
    metrics = {"solved": Metric("max", measures.solved), "loss": Metric("min", measures.loss)}
    metrics |= {kind: Metric("max", partial(measures.solved_of, kind)) for kind in KINDS}
    if text:
        metrics |= {"text_loss": Metric("min", measures.text_loss), "answer_loss": Metric("min", measures.answer_loss)}
    return Task(
        name=config.name,
        **data,
        collate=ready,
        sample_loss=measures.loss,
        metrics=metrics,
        primary="solved",
        inputs="tokens",
        input_shape=(config.text + length - 1,),
        outputs=BYTES + len(KINDS),
        digest=digest.hexdigest(),
        description=_describe(config, length, text, data),
    )


@dataclass(frozen=True)
class Form:
    """How large the problems are, as ``PrimitivesConfig`` says."""

    letters: int
    variables: int
    sums: int
    digits: int


@lru_cache(maxsize=8)  # seconds of work for many samples, and the jobs of a sweep ask for the same again in one process
def problems(form: Form, samples: int, which: str, seed: int) -> Tensor:
    """Problems of every kind for one of the sets, in an order drawn for every sample: int16 ``[samples, tokens]``."""
    drawn, sums = generator(seed, "primitives", which), _dealt_sums(form.digits, seed)[which]
    levels = [depth + 1 for depth in DEPTHS]
    names = torch.rand(samples, LETTERS, generator=drawn).argsort(1)[:, : sum(levels) * form.variables] + ord("A")  # none twice in a sample
    of_depths = names.unflatten(1, (-1, form.variables)).split(levels, 1)
    parts = (
        _copying(samples, form.letters, drawn),
        *(_assignment(depth, names, drawn) for depth, names in zip(DEPTHS, of_depths, strict=True)),
        torch.cat([_adding(samples, form.digits, sums, drawn) for _ in range(form.sums)], 1),
    )
    orders = list(permutations(parts))
    chosen = torch.randint(len(orders), (samples,), generator=drawn)
    rows = torch.empty(samples, sum(part.shape[1] for part in parts), dtype=torch.int16)
    for number, order in enumerate(orders):
        where = chosen == number
        rows[where] = torch.cat([part[where] for part in order], 1).to(torch.int16)
    return rows


def _copying(samples: int, letters: int, drawn: torch.Generator) -> Tensor:
    word = ord("a") + torch.randint(LETTERS, (samples, letters), generator=drawn)
    return torch.cat((word, _same("copying", samples), word, _same("\n", samples)), 1)


def _assignment(depth: int, names: Tensor, drawn: torch.Generator) -> Tensor:
    """Values for the variables of the first level; each of a further level names one of the level before. Those of the last are asked for.

    ``names``: ``[samples, levels, variables]``.
    """
    samples, levels, variables = names.shape
    held = ord("0") + torch.randint(10, (samples, variables), generator=drawn)
    written = [_joined(names[:, 0], held, ";")]
    for level in range(1, levels):
        chosen = torch.randint(variables, (samples, variables), generator=drawn)
        held = held.gather(1, chosen)
        written.append(_joined(names[:, level], names[:, level - 1].gather(1, chosen), ";"))
    asked = torch.randint(variables, (samples, variables), generator=drawn)  # one may come twice, so that none is known by elimination
    sign = _same(f"assignment_{depth}", samples).expand(-1, variables)
    written.append(_joined(sign, names[:, -1].gather(1, asked), held.gather(1, asked)))
    return torch.cat([*written, _same("\n", samples)], 1)


def _joined(*columns: Tensor | str) -> Tensor:
    """Column by column, the first of each next to each other: ``[samples, parts·columns]``; a character is the same in all."""
    shape = next(one for one in columns if isinstance(one, Tensor))
    parts = [torch.full_like(shape, ord(one)) if isinstance(one, str) else one for one in columns]
    return torch.stack(parts, 2).flatten(1)


def _adding(samples: int, digits: int, sums: Tensor, drawn: torch.Generator) -> Tensor:
    terms = sums[torch.randint(len(sums), (samples,), generator=drawn)]
    first, second = _written(terms[:, 0], digits), _written(terms[:, 1], digits)
    total = _written(terms.sum(1), digits + 1)
    return torch.cat((first, _same("+", samples), second, _same("adding", samples), total, _same("\n", samples)), 1)


def _written(numbers: Tensor, digits: int) -> Tensor:
    """The digits of every number, with zeros in front: ``[N, digits]``."""
    places = torch.tensor([10**place for place in reversed(range(digits))])
    return ord("0") + numbers.unsqueeze(1) // places % 10


def _same(sign: str, samples: int) -> Tensor:
    """One token for every sample: the character, or the marker of a kind."""
    return torch.full((samples, 1), marker(sign) if sign in KINDS else ord(sign))


def _dealt_sums(digits: int, seed: int) -> dict[str, Tensor]:
    """Pairs of terms, int64 ``[N, 2]`` a set; no pair is in two sets."""
    most = 10**digits
    held = math.ceil(HELD_OUT_SUMS * most**2)
    order = torch.randperm(most**2, generator=generator(seed, "sums"))
    parts = order.split([most**2 - 3 * held, held, held, held])
    return {which: torch.stack((part // most, part % most), 1) for which, part in zip(SETS, parts, strict=True)}


@dataclass(frozen=True)
class Measures:
    """The loss and the metrics of samples with ``text`` bytes before their problems; methods take ``(output, batch)`` and give ``[N]``."""

    text: int
    letters: int
    digits: int

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy in nats a token, the mean over the text and the answers of each sample."""
        counted = self._in_text(batch[0]) | torch.stack([self._in_answers(kind, batch[0]) for kind in KINDS]).any(0)
        return _mean(_losses(output, batch), counted)

    def text_loss(self, output: Tensor, batch: Batch) -> Tensor:
        """The same over the text alone."""
        return _mean(_losses(output, batch), self._in_text(batch[0]))

    def answer_loss(self, output: Tensor, batch: Batch) -> Tensor:
        """The same over the answers alone."""
        return _mean(_losses(output, batch), torch.stack([self._in_answers(kind, batch[0]) for kind in KINDS]).any(0))

    def solved_of(self, kind: str, output: Tensor, batch: Batch) -> Tensor:
        """Share of a sample's problems of one kind of which every token of the answer has the largest logit.

        The tokens before are the right ones, as in training: the answer is not generated.
        """
        return self._solved_of(kind, output.argmax(2) == batch[1], batch[0])

    def solved(self, output: Tensor, batch: Batch) -> Tensor:
        """The mean over the kinds of what ``solved_of`` gives."""
        right = output.argmax(2) == batch[1]
        return torch.stack([self._solved_of(kind, right, batch[0]) for kind in KINDS]).mean(0)

    def _solved_of(self, kind: str, right: Tensor, inputs: Tensor) -> Tensor:
        whole = right.unfold(1, self._length(kind), 1).all(2)
        return _mean(whole.float(), self._begins(kind, inputs)[:, : whole.shape[1]])

    def _length(self, kind: str) -> int:
        """Tokens of an answer."""
        return {"copying": self.letters, "adding": self.digits + 1}.get(kind, 1)

    def _in_text(self, inputs: Tensor) -> Tensor:
        """Where the token that follows is one of the text, bool ``[N, T]``."""
        return (torch.arange(inputs.shape[1], device=inputs.device) < self.text - 1).expand(inputs.shape)

    def _in_answers(self, kind: str, inputs: Tensor) -> Tensor:
        """Where the token that follows is one of an answer, bool ``[N, T]``."""
        begins = self._begins(kind, inputs)
        return torch.stack([begins.roll(place, 1) for place in range(self._length(kind))]).any(0)

    def _begins(self, kind: str, inputs: Tensor) -> Tensor:
        """Where the token that follows is the first of an answer, bool ``[N, T]``; a line ends behind its answers, so none goes round."""
        found = inputs == marker(kind)
        return found.roll(1, 1) if kind.startswith("assignment") else found


def marker(kind: str) -> int:
    """The token that says that an answer of this kind follows."""
    return BYTES + KINDS.index(kind)


def _losses(output: Tensor, batch: Batch) -> Tensor:
    losses = F.cross_entropy(logits(output).flatten(0, 1), batch[1].flatten(), reduction="none")
    return losses.view(batch[1].shape)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of each row over the places that count, ``[N]``."""
    return (values * counted).sum(1) / counted.sum(1)


def _text(config: PrimitivesConfig) -> Task | None:
    """The task that gives the stretches of text."""
    if not config.text:
        return None
    if config.text < 2:
        raise UserError("task.text=1 leaves no byte of the text to be predicted; give 2 or more, or 0 for no text.")
    from esper.tasks import text

    return text.build(
        TextConfig(
            path=config.path,
            tokens="bytes",
            context=config.text,
            files=config.files,
            held_out_bytes=config.held_out_bytes,
            cache=config.cache,
            split_seed=config.split_seed,
        )
    )


def _describe(config: PrimitivesConfig, length: int, text: Task | None, data: dict[str, Primitives]) -> str:
    sizes = ", ".join(f"{which} {len(dataset)}" for which, dataset in data.items())
    before = f"{config.text} bytes of text ({text.description}), then " if text else ""
    return f"{before}{length} tokens of copying, assignments and sums; {sizes}"
