"""Find plug-ins by file name: `data_prep/datasets/busi.py` is the dataset `busi`."""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from maskloom.pipeline.errors import MaskLoomError, nearest_name


def plugin_names(package: str) -> list[str]:
    """Return the sorted names of all plug-in modules in a package, without importing them."""
    folder = Path(str(importlib.import_module(package).__file__)).parent
    return sorted(info.name for info in pkgutil.iter_modules([str(folder)]) if not info.name.startswith("_"))


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
