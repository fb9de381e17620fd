"""Optional packages, the extras of `pyproject.toml` such as `maskloom[dicom]`."""

import importlib

from maskloom.pipeline.errors import MaskLoomError, excerpt


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
