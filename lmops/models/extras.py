"""Imports of optional packages, with the command that installs a missing one."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import `module`, which the optional dependency group `extra` of lmops brings.

    Raises ImportError that says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ModuleNotFoundError(
            f'this needs the package {module!r}: pip install "lmops[{extra}]"', name=module
        ) from error
