"""Modules that ``torch.compile`` wraps: a host's modules under the names that they have without it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_WRAPPED = "_orig_mod"
"""Torch's name for the module inside a compiled one."""

_BEFORE = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
_AFTER = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def host_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules below ``model`` by name, each once; a compiled module has the name of the one that it wraps."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name and not _is_wrapper(module):
            found[".".join(part for part in name.split(".") if part != _WRAPPED)] = module
    return found


_lock = threading.Lock()
_entered: list[Any] = []
"""One entry for everybody within ``uncompiled``, in whatever thread: torch has one stance for the whole process."""


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within: what ``torch.compile`` has compiled runs as it is written, and nothing is compiled.

    A graph knows the live forward alone. Torch would also never again compile code that it met while something counts its operations.
    """
    with _lock:
        stance = _entered[0] if _entered else torch.compiler.set_stance("force_eager")
        _entered.append(stance)
    try:
        yield
    finally:
        with _lock:
            _entered.pop()
            if not _entered:
                stance.__exit__(None, None, None)


@contextmanager
def compiled_again() -> Iterator[None]:
    """Within ``uncompiled``: as without it, by the stance that the user had."""
    before = getattr(getattr(_entered[0], "prev", None), "stance", "default") if _entered else "default"
    with torch.compiler.set_stance(before):
        yield


def compiled_whole(model: nn.Module, backend: Any) -> Any:
    """What calls the model as a graph of its own; None where parts of it are compiled one by one. ``called_by`` has the model call it."""
    if any(_is_wrapper(module) or module._compiled_call_impl is not None for module in model.modules() if module is not model):
        return None
    return torch.compile(model._call_impl, backend=backend)


@contextmanager
def called_by(model: nn.Module, call: Any) -> Iterator[None]:
    """Within: calling the model calls this, as ``model.compile()`` arranges it. A loss gets the model itself and no wrapper."""
    own = "_compiled_call_impl" in model.__dict__
    before = model._compiled_call_impl
    model.__dict__["_compiled_call_impl"] = call
    try:
        yield
    finally:
        if own:
            model.__dict__["_compiled_call_impl"] = before
        else:
            del model.__dict__["_compiled_call_impl"]


def backend_at_work() -> Any:
    """The backend of the ``torch.compile`` that is tracing now, as that takes it; None if torch does not tell.

    Of its own, in whatever mode, it is ``"inductor"``: another forward is not captured with the host's.
    """
    from torch._dynamo import symbolic_convert

    if torch.compiler.is_exporting() or not torch.is_grad_enabled():
        return None
    try:
        backend: Any = symbolic_convert.InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # nothing is being traced by the compiler, or by one of another version of torch
        return None
    while (inner := getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None)) is not None:
        backend = inner
    return "inductor" if getattr(backend, "compiler_name", "") == "inductor" else backend


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Within: compiled modules below ``model`` are replaced by those that they wrap, with the hooks of the wrapper."""
    places: list[tuple[dict[str, Any], str, nn.Module]] = []
    hooks: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and _is_wrapper(child):
                places.append((parent._modules, name, child))
    for modules, name, wrapper in reversed(places):  # a wrapper in a wrapper is the later of the two
        inner = wrapper._modules[_WRAPPED]
        assert inner is not None
        modules[name] = inner
        for kind in (*_BEFORE, *_AFTER):
            held, added = getattr(inner, kind), getattr(wrapper, kind)
            hooks.append((held, dict(held)))
            _fill(held, {**added, **held} if kind in _BEFORE else {**held, **added})  # the wrapper's come first before, last after
    try:
        yield
    finally:
        for modules, name, wrapper in places:
            modules[name] = wrapper
        for held, before in reversed(hooks):
            _fill(held, before)


def _is_wrapper(module: nn.Module) -> bool:
    return _WRAPPED in module._modules


def _fill(held: dict[int, Any], values: dict[int, Any]) -> None:
    held.clear()
    held.update(values)
