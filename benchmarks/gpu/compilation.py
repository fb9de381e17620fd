"""Our training with `torch_compile`; a part of its own, as the compilation may take minutes."""

from benchmarks.gpu.training import measure

__all__ = ["measure"]
