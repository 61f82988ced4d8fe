"""The sentences for errors of the system: a file, a folder or a word that it refuses."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from esper.errors import Removed, UserError

_ELSEWHERE = "or set output=<another folder>"
_ROOM, _RIGHT = f"free some space, {_ELSEWHERE}", f"get the right to use it, {_ELSEWHERE}"

#: The remedy for each error.
STORAGE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: f"raise the limit that the system sets (ulimit -f), {_ELSEWHERE}",
    errno.EACCES: _RIGHT,
    errno.EPERM: _RIGHT,
    errno.EROFS: f"make it writable, {_ELSEWHERE}",
    errno.ENOTDIR: f"move the file that is in the way, {_ELSEWHERE}",
    errno.EISDIR: f"move the folder that is in the way, {_ELSEWHERE}",
    errno.ENAMETOOLONG: f"choose a shorter name, {_ELSEWHERE}",
    errno.ELOOP: f"mend the links, {_ELSEWHERE}",
    errno.ESTALE: "mount the share again, and go on with resume=auto",
    errno.EMFILE: "raise the number of open files (ulimit -n)",
}


#: Package that is imported → the extra of esper-grow that installs it; `esper compare runs` needs none.
EXTRAS = {"optuna": "search", "mlflow": "mlflow", "requests": "mlflow", "sqlalchemy": "mlflow"} | dict.fromkeys(
    ("torch", "hydra", "omegaconf", "redis", "safetensors", "sklearn", "zstandard", "zlib_ng", "psutil", "pybreaker", "limits"), "train"
)


def missing_package(error: ModuleNotFoundError) -> str:
    """What to install where a part of esper was installed without what it needs; empty for any other module."""
    name = error.name or ""
    if name not in EXTRAS:  # a part of one that is there is missing too: the traceback says which
        return ""
    return f"This needs the Python package {name}, which is not installed; pip install 'esper-grow[{EXTRAS[name]}]'."


def known(error: OSError) -> bool:
    """Whether there is a sentence for this error; one that the user did not cause keeps its traceback."""
    return error.errno in STORAGE or isinstance(error, Removed)


def sentence(error: OSError) -> str:
    """The event, the file, and the remedy."""
    way_out = "let a run keep its folder until it ends" if isinstance(error, Removed) else STORAGE[error.errno or 0]
    return f"{error.filename or 'An output'}: {str(error.strerror).lower()}; {way_out}."


def refuse_unusable(words: Sequence[str]) -> None:
    """Raise UserError where esper cannot even begin: no current folder, or words that are not text."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("The current folder was deleted: change to one that there is (cd), and start again.") from None
    for word in words:
        if not word.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in word):
            raise UserError(f"{word!a} is no UTF-8 text: write it in letters that the terminal and the file system share.")


def say_anything() -> None:
    """A terminal or pipe that lacks some letters (an encoding other than UTF-8) shows ``?`` for them."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a test or a notebook put another in its place
            stream.reconfigure(errors="replace")
