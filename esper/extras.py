"""Libraries that esper uses where they are installed: one sentence where they are not, and another where they are broken."""

from __future__ import annotations

import importlib
import shlex
from typing import Any

from esper.errors import UserError


def import_extra(module: str, needed_for: str, install: str, package: str = "", otherwise: str = "") -> Any:
    """The module, imported now.

    Args:
        module: its full name.
        needed_for: what the user asked for, as in ``hydra/launcher=ray``.
        install: what pip installs it by, as in ``esper-grow[ray]``.
        package: the library's name as it is imported; the first part of ``module`` where it is left out.
        otherwise: another way out, as in ``use bus=memory``.

    Raises:
        UserError: its library is not installed; or it is and cannot be imported, in the library's own words.
    """
    library = package or module.partition(".")[0]
    quoted = shlex.quote(install)
    alternative = f", or {otherwise}" if otherwise else ""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name in (library, module):
            raise UserError(
                f"{needed_for} needs the package {library}, which is not installed: pip install {quoted}{alternative}."
            ) from None
        raise UserError(
            f"{needed_for} needs the package {library}, which is installed but cannot be imported ({error}); install it anew: "
            f"pip install --force-reinstall {quoted}{alternative}."
        ) from error
