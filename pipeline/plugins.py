"""Plug-ins, and the optional packages that some of them need.

Plug-ins are found by file name: `data_prep/datasets/busi.py` is the dataset `busi`. Optional
packages are installed with the extras of `pyproject.toml`, such as `maskloom[dicom]`.
"""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from maskloom.pipeline.errors import MaskLoomError, excerpt, nearest_name


def plugin_names(package: str) -> list[str]:
    """Return the sorted names of all plug-in modules in a package, without importing them."""
    folder = Path(str(importlib.import_module(package).__file__)).parent
    return sorted(info.name for info in pkgutil.iter_modules([str(folder)]) if not info.name.startswith("_"))


def default_plugins(package: str) -> tuple[str, ...]:
    """Return the plug-ins that are used if the configuration names none: `DEFAULTS` of the package.

    No plug-in is imported.
    """
    names: tuple[str, ...] = importlib.import_module(package).DEFAULTS
    return names


def load_plugin(package: str, name: str, kind: str) -> ModuleType:
    """Import one plug-in module by name.

    Args:
        package: package that holds the plug-ins, such as `maskloom.data_prep.datasets`.
        name: the plug-in's file name without `.py`.
        kind: what the error calls it, such as `dataset`.

    Raises:
        MaskLoomError: no such plug-in; the error suggests the nearest one and lists the known ones.
    """
    known = plugin_names(package)
    if name not in known:
        raise MaskLoomError(f"unknown {kind} {name!r}: {nearest_name(name, known)}")
    return importlib.import_module(f"{package}.{name}")


def require(module: str, extra: str, what_for: str, alternative: str = "") -> None:
    """Check that an optional module can be imported.

    Args:
        module: import name of the module.
        extra: the extra that installs it.
        what_for: the file or the configuration key that needs it.
        alternative: what to do without it, such as `set it to false`.

    Raises:
        MaskLoomError: the module is not installed, or cannot be imported.
    """
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        package = module.partition(".")[0]
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        reason = "" if absent else f", which cannot be imported ({excerpt(error)})"
        raise MaskLoomError(
            f"{what_for} needs {package.replace('_', '-')}{reason}: {install_command(extra)}"
            f"{', or ' if alternative else ''}{alternative}"
        ) from None


def install_command(extra: str) -> str:
    """Return the command that installs an extra, also in a checkout."""
    return f"pip install 'maskloom[{extra}]'"
