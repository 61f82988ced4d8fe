"""Extra passes beside a compiled host's own: what is compiled rests meanwhile, for the whole process, and goes on as the user had it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from esper.seeds.compiled_modules import backend_at_work, called_by, compiled_again, uncompiled


def stance() -> str:
    context = torch.compiler.set_stance("default")
    before: str = context.prev.stance  # type: ignore[attr-defined]
    context.__exit__(None, None, None)
    return before


def test_threads_that_overlap_leave_nothing_uncompiled() -> None:
    entered, may_leave = threading.Event(), threading.Event()

    def other() -> None:
        with uncompiled():
            entered.set()
            may_leave.wait(10)

    thread = threading.Thread(target=other)
    with uncompiled():
        thread.start()
        entered.wait(10)
        assert stance() == "force_eager"
    assert stance() == "force_eager", "the other is within"
    may_leave.set()
    thread.join()
    assert stance() == "default"


def test_the_users_own_stance_comes_back() -> None:
    with torch.compiler.set_stance("eager_on_recompile"):
        with pytest.raises(ValueError, match="broken off"), uncompiled(), uncompiled():
            with compiled_again():
                assert stance() == "eager_on_recompile"
            assert stance() == "force_eager"
            raise ValueError("broken off")
        assert stance() == "eager_on_recompile"
    assert stance() == "default" and backend_at_work() is None


def test_a_model_calls_what_it_is_given_for_a_while() -> None:
    model, calls = torch.nn.Linear(2, 2), []

    def call(*inputs: Any) -> str:
        calls.append(inputs)
        return "called"

    with pytest.raises(ValueError, match="broken off"), called_by(model, call):
        assert model(1) == "called" and calls == [(1,)]
        raise ValueError("broken off")
    assert isinstance(model(torch.zeros(1, 2)), torch.Tensor) and "_compiled_call_impl" not in model.__dict__
