"""The tensors of a state that are sharded among processes: each process writes its parts, by ``torch.distributed.checkpoint``.

In the state a note takes the place of such a tensor. A reader gets the tensor whole, or sharded as its own processes are, however many
there are.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor

from esper.checkpoint.tree import Still
from esper.distributed.sharding import is_shard
from esper.errors import UserError

SHARDS = "shards"
NOTE, PLACE = "sharded", "in"

#: The classes and functions of which DCP's list of contents consists; nothing else is built from a file.
_CONTENTS = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


def take_out(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """(the tree with a note in the place of every sharded tensor, these tensors by name)."""
    shards: dict[str, Tensor] = {}
    return _take(tree, "", shards), shards


def _take(tree: Any, path: str, shards: dict[str, Tensor]) -> Any:
    if isinstance(tree, Still):
        return Still(_take(tree.tree, path, shards))
    if is_shard(tree):
        shards[path] = tree.detach()
        dims = [place.dim if place.is_shard() else -1 for place in tree.placements]
        return {NOTE: path, "dtype": str(tree.dtype).removeprefix("torch."), "shape": list(tree.shape), "dims": dims}
    if isinstance(tree, dict):
        return {key: _take(value, f"{path}/{key}" if path else str(key), shards) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_take(value, f"{path}/{index}", shards) for index, value in enumerate(tree)]
    return tree


def write(shards: dict[str, Tensor], folder: Path, group: Any) -> None:
    """Write the tensors into a folder that all processes of ``group`` see under this name; all of them call this together."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(shards), storage_writer=FileSystemWriter(folder, sync_files=True), process_group=group)
    except CheckpointException as error:  # which is no Exception
        raise OSError("; ".join(str(one) for one, _ in error.failures.values())) from error


def locate(tree: Any, folder: Path) -> Any:
    """The tree whose notes say in which folder their tensors are."""
    if isinstance(tree, dict):
        if NOTE in tree:
            return {**tree, PLACE: str(folder)}
        return {key: locate(value, folder) for key, value in tree.items()}
    return [locate(value, folder) for value in tree] if isinstance(tree, list) else tree


def put_in(tree: Any, mesh: Any = None) -> Any:
    """The tree with its sharded tensors again: their parts for this process on a device ``mesh``, or (None) whole on the CPU.

    Raises UserError for files that this process cannot read, ValueError or KeyError for others than the notes tell of.
    """
    wanted: dict[str, dict[str, Tensor]] = {}
    tree = _prepare(tree, mesh, wanted)
    for folder, tensors in wanted.items():
        _read(tensors, Path(folder))
    return tree


def _prepare(tree: Any, mesh: Any, wanted: dict[str, dict[str, Tensor]]) -> Any:
    if isinstance(tree, dict) and NOTE in tree:
        dtype = getattr(torch, str(tree["dtype"]), None)
        if not isinstance(dtype, torch.dtype) or PLACE not in tree:
            raise ValueError(f"the note of '{tree[NOTE]}' is not understood")
        name, shape = str(tree[NOTE]), [int(size) for size in tree["shape"]]
        return wanted.setdefault(str(tree[PLACE]), {}).setdefault(name, _empty(shape, dtype, tree["dims"], mesh))
    if isinstance(tree, dict):
        return {key: _prepare(value, mesh, wanted) for key, value in tree.items()}
    return [_prepare(value, mesh, wanted) for value in tree] if isinstance(tree, list) else tree


def _empty(shape: list[int], dtype: torch.dtype, dims: list[int], mesh: Any) -> Tensor:
    if mesh is None:
        return torch.empty(shape, dtype=dtype)
    from torch.distributed import tensor as distributed

    if len(dims) != mesh.ndim:  # saved on a mesh of another kind: the last axis of this one shards it
        dims = [-1] * (mesh.ndim - 1) + [max(dims)]
    placements = [distributed.Shard(dim) if dim >= 0 else distributed.Replicate() for dim in dims]
    made: Tensor = distributed.empty(*shape, dtype=dtype, device_mesh=mesh, placements=placements)
    return made


def _read(tensors: dict[str, Tensor], folder: Path) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(FileSystemReader):
        """torch's reader, whose list of contents may consist of nothing else than such a list does."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with (folder / ".metadata").open("rb") as file:
                found = _Contents(file).load()
            if not isinstance(found, Metadata):
                raise ValueError("its list of shards is not understood")
            return found

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # for one process, as is intended
            load(dict(tensors), storage_reader=Reader(folder), no_dist=True)
    except CheckpointException as error:  # which is no Exception
        if not any(isinstance(one, OSError) for one, _ in error.failures.values()):
            raise ValueError("; ".join(str(one) for one, _ in error.failures.values())) from error
        raise UserError(_unseen(folder)) from error
    except OSError as error:
        raise UserError(_unseen(folder)) from error


def _unseen(folder: Path) -> str:
    return f"This process cannot read the shards of a checkpoint in {folder}: all processes must see one folder under this name."


def refuse_missing(folder: Path) -> None:
    """Raise UserError where the folder lacks files of other processes, which wrote them to one of their own under the same name."""
    with (folder / ".metadata").open("rb") as file:
        told = _Contents(file).load()
    if missing := sorted({info.relative_path for info in told.storage_data.values()} - {path.name for path in folder.iterdir()}):
        raise UserError(
            f"The checkpoint is not whole: {', '.join(missing[:3])} of other processes is not in {folder}. Give all processes one "
            "folder for outputs, on a file system that they share."
        )


class _Contents(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name in ("Path", "PosixPath"):  # Python 3.13 has them elsewhere
            return PurePosixPath
        if (module, name) not in _CONTENTS and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise ValueError(f"its list of shards names {module}.{name}, which has no place there")
        return super().find_class(module, name)
