"""A model as a program that runs without its Python code: ``torch.export``, and ONNX made from that.

A program accepts the model's inputs: any stride, any batch size, and any length where the model takes several. What torch cannot
keep open is said in a sentence.
"""

from __future__ import annotations

import io
import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper.atomic_files import replacing
from esper.errors import UserError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: Loggers of torch and its helpers, which remark on their own parts while a program is made.
FOREIGN = ("torch.onnx", "torch.export", "torch._export", "torch._dynamo", "torch.fx", "onnxscript", "onnx_ir")


def traced(model: nn.Module, inputs: Tensor) -> tuple[ExportedProgram, list[str]]:
    """The model, which is in evaluation mode, as a program; and in words which sizes it is bound to though the model is not.

    ``inputs``: a batch (batch first) of whatever strides. Raises torch.export's exception for a model that it cannot follow.
    """
    inputs = _at_least_two(inputs.detach().contiguous(), 0)
    several = [dim for dim in range(1, inputs.dim()) if _takes_several(model, inputs, dim)]
    for dim in several:
        inputs = _at_least_two(inputs, dim)
    found = _trace(model, inputs, [0, *several], oblivious=False)
    if found[1]:
        other = _trace(model, inputs, [0, *several], oblivious=True)
        found = other if len(other[1]) < len(found[1]) else found
    return found


def _trace(model: nn.Module, inputs: Tensor, dims: list[int], oblivious: bool) -> tuple[ExportedProgram, list[str]]:
    """``oblivious``: torch does not ask of a size along ``dims`` whether it is one, which frees some models and binds others."""
    from torch.fx.experimental import _config

    handle = model.register_forward_pre_hook(_in_one_piece, prepend=True)
    try:
        with quiet(), torch.no_grad(), _config.patch(backed_size_oblivious=oblivious):  # type: ignore[attr-defined]
            shapes = (dict.fromkeys(dims, torch.export.Dim.AUTO),)
            program = torch.export.export(model, (inputs,), dynamic_shapes=shapes)
    finally:
        handle.remove()
    return program, _remarks(program, model, inputs, dims)


def signature_of(program: ExportedProgram) -> dict[str, list[dict[str, Any]]]:
    """``dtype`` and ``shape`` of the program's ``inputs`` and ``outputs``, JSON-able; -1 stands for a size that is open."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    graph = program.graph_signature
    return {"inputs": _described(values, graph.user_inputs), "outputs": _described(values, graph.user_outputs)}


def _described(values: Mapping[str, Any], names: Iterable[Any]) -> list[dict[str, Any]]:
    tensors = [values[name] for name in names if isinstance(values.get(name), Tensor)]
    return [
        {"dtype": str(one.dtype).removeprefix("torch."), "shape": [size if isinstance(size, int) else -1 for size in one.shape]}
        for one in tensors
    ]


def to_pt2(program: ExportedProgram, path: Path) -> Path:
    """Write the program for ``torch.export.load``; returns ``path``."""
    with replacing(path) as aside, quiet():
        save_program(program, aside)
    return path


def save_program(program: ExportedProgram, path: Path) -> None:
    """``torch.export.save`` by way of memory: told to write the file itself, it ends the process where a disk is full."""
    archive = io.BytesIO()
    torch.export.save(program, archive)
    path.write_bytes(archive.getbuffer())


def to_onnx(program: ExportedProgram, path: Path) -> Path:
    """Write the program as an ONNX graph ``inputs -> outputs`` with its weights inside. Needs ``pip install esper-grow[onnx]``."""
    with replacing(path) as aside, quiet():
        torch.onnx.export(
            program, (), aside, dynamo=True, external_data=False, verbose=False, input_names=["inputs"], output_names=["outputs"]
        )
    return path


def refuse_without_onnx() -> None:
    """Raise UserError where the packages that ONNX needs are not installed."""
    from importlib.util import find_spec

    if find_spec("onnxscript") is None or find_spec("onnx") is None:
        raise UserError("format=onnx needs the packages onnx and onnxscript: pip install 'esper-grow[onnx]'.")


@contextmanager
def quiet() -> Iterator[None]:
    """Within, torch's remarks on its own parts are not shown; errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in FOREIGN]
    loggers += [found for name, found in logging.root.manager.loggerDict.items() if isinstance(found, logging.Logger) and _foreign(name)]
    levels = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


def _foreign(name: str) -> bool:
    return any(name.startswith(f"{one}.") for one in FOREIGN)


def _in_one_piece(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook that is traced as the program's first operation: the operations after it see one layout."""
    return tuple(value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value for value in given)


def _at_least_two(inputs: Tensor, dim: int) -> Tensor:
    """torch.export would fix a size of one for good."""
    return inputs if inputs.shape[dim] > 1 else torch.cat([inputs, inputs], dim)


def _takes_several(model: nn.Module, inputs: Tensor, dim: int) -> bool:
    size = inputs.shape[dim]
    return any(_answer(model, _sized(inputs, dim, other)) is not None for other in (size - 1, size // 2, size + 1, 2 * size) if other > 0)


def _sized(inputs: Tensor, dim: int, size: int) -> Tensor:
    """The inputs cut or repeated to another size along ``dim``."""
    return inputs.index_select(dim, torch.arange(size, device=inputs.device) % inputs.shape[dim])


def _answer(model: Any, inputs: Tensor) -> Tensor | None:
    """The first tensor of the output of the model or program, or None where it does not accept these inputs."""
    from esper.blueprints.block_call import first_tensor

    try:
        with quiet(), torch.no_grad():
            return first_tensor(model(inputs))
    except Exception:  # a host's own code may raise anything for a size that it does not take
        return None


def _remarks(program: ExportedProgram, model: nn.Module, inputs: Tensor, dims: list[int]) -> list[str]:
    """Compare the program with the model at other sizes along each of ``dims``, and in another layout."""
    run, said = program.module(), []
    for dim in dims:
        size = inputs.shape[dim]
        if any(_differs(run, model, _sized(inputs, dim, other)) for other in {1, size + 1, size - 1}):
            what = "batch" if dim == 0 else f"size along axis {dim}"
            said.append(f"the program takes only inputs whose {what} is {size}, though the model takes others: torch.export fixes it")
    if any(_differs(run, model, turned) for turned in _layouts(inputs)):
        said.append("the program takes only contiguous inputs, though the model takes others")
    return said


def _layouts(inputs: Tensor) -> Iterator[Tensor]:
    """The same values with other strides."""
    for one, other in itertools.combinations(range(inputs.dim()), 2):
        yield inputs.transpose(one, other).contiguous().transpose(one, other)
    yield torch.cat([inputs, inputs], -1)[..., : inputs.shape[-1]]


def _differs(run: Any, model: nn.Module, inputs: Tensor) -> bool:
    """Whether the program fails, or gives something else, for inputs that the model has an answer to."""
    expected = _answer(model, inputs)
    if expected is None:
        return False
    given = _answer(run, inputs)
    if given is None or given.shape != expected.shape:
        return True
    again = _answer(model, inputs)  # a model that draws says something else each time
    if again is None or not torch.equal(again, expected):
        return False
    near = 1e-4 * max(1.0, float(expected.abs().max()))
    return not torch.allclose(given.float(), expected.float(), rtol=1e-3, atol=near, equal_nan=True)
