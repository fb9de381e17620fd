"""Memory of a computation on torch's meta device: tensors have shapes and sizes there, and no content.

Every tensor that PyTorch makes is seen, and its end as well, so that the figures are those of PyTorch's own graph and not of a formula.
The meta device knows neither fused attention nor autocast; `OnGpu` puts both in their places.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

# Of torch's autocast on CUDA (aten/src/ATen/autocast_mode.h), those that Stable Diffusion's layers call with weights.
HALF_FUNCTIONS = frozenset({functional.linear, functional.conv2d})
SINGLE_FUNCTIONS = frozenset({functional.group_norm, functional.layer_norm})


Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Sizes, strides and type of a tensor."""
_LAYOUTS: dict[Any, tuple[list[Layout], TreeSpec] | None] = {}


class LiveMemory(TorchDispatchMode):
    """Inside the block, counts the bytes of the tensors of a device that are alive.

    Attributes:
        live: bytes at the moment.
        peak: the most so far.
    """

    def __init__(self, existing: Iterable[Tensor], device: str = "meta") -> None:
        """Start with nothing.

        Args:
            existing: tensors that do not count, such as weights.
            device: type of the device whose tensors count.
        """
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        self._existing = [tensor.untyped_storage() for tensor in existing]
        self._known = {id(storage) for storage in self._existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _result(func, args, kwargs or {}) if self.device == "meta" else func(*args, **(kwargs or {}))
        for found in tree_leaves(result):
            if isinstance(found, Tensor) and found.device.type == self.device:
                self._count(found.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known:  # a view, or written in place
            return
        size = storage.nbytes()
        self._known.add(id(storage))
        weakref.finalize(storage, self._forget, id(storage), size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.live -= size


class OnGpu(TorchFunctionMode):
    """Inside the block, layers keep what they would keep on a GPU: attention is fused, and autocast is in force for some networks.

    A layer is known by its weight, which tells the networks under autocast from those that run in half precision as they are, and works as
    well where activation checkpointing calls a layer a second time. Autocast's own copies of weights are made once a call; that it keeps
    them for the whole forward pass is left out: they are half as large as the gradients, which come later and stay.
    """

    def __init__(self, networks: Iterable[nn.Module], dtype: torch.dtype) -> None:
        """Choose where autocast is in force.

        Args:
            networks: under autocast.
            dtype: of autocast; float32: there is none.
        """
        super().__init__()
        self.dtype = dtype
        weights = [p for network in networks for p in network.parameters()] if dtype != torch.float32 else []
        self._weights = {id(weight) for weight in weights}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        dtype = self._autocast_dtype(func, [*args, *kwargs.values()])
        if dtype is not None:
            args = [_cast(value, dtype) for value in args]
            kwargs = {key: _cast(value, dtype) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def _autocast_dtype(self, func: Any, values: list[Any]) -> torch.dtype | None:
        """Return what a function's floating-point arguments are cast to, or None where they stay."""
        if func not in HALF_FUNCTIONS | SINGLE_FUNCTIONS or not any(id(value) in self._weights for value in values):
            return None
        return self.dtype if func in HALF_FUNCTIONS else torch.float32


def _result(func: Any, args: Any, kwargs: Any) -> Any:
    """Return what a function makes of meta tensors.

    Working out a result's layout takes Python decompositions many times as long as making a tensor of it, and the blocks of a network make the
    same calls again and again: the layouts of results are kept, but for functions that change or share their inputs' memory.
    """
    leaves, form = tree_flatten((args, kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if func._schema.is_mutable or not all(tensor.is_meta for tensor in inputs):
        return func(*args, **kwargs)
    key = (func, form, *(_layout(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves))
    if (known := _LAYOUTS.get(key)) is not None:
        layouts, form = known
        return tree_unflatten([_new(layout) for layout in layouts], form)
    result = func(*args, **kwargs)
    if key not in _LAYOUTS:
        _LAYOUTS[key] = _layouts(result, inputs)
    return result


def _layouts(result: Any, inputs: list[Tensor]) -> tuple[list[Layout], TreeSpec] | None:
    """Return the layouts of new meta tensors, or None where the result is anything else."""
    outputs, form = tree_flatten(result)
    if not all(isinstance(output, Tensor) and output.is_meta for output in outputs):
        return None
    if {tensor.untyped_storage()._cdata for tensor in outputs} & {tensor.untyped_storage()._cdata for tensor in inputs}:
        return None
    return [_layout(output) for output in outputs], form


def _layout(tensor: Tensor) -> Layout:
    return tensor.shape, tensor.stride(), tensor.dtype


def _new(layout: Layout) -> Tensor:
    shape, strides, dtype = layout
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return FusedAttention.apply(query, key, value)


class FusedAttention(torch.autograd.Function):
    """What FlashAttention (Dao, 2023) and the memory-efficient kernel keep: query, key, value, output and the rows' log-sum-exp.

    Without it the meta device would keep the attention matrices, which no GPU kernel of PyTorch does at these sizes. Output and gradients
    lie in memory as their inputs do, as with the kernels, so that merging the heads makes no copy.
    """

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return an output of (B, heads, L, D) for query (B, heads, L, D), key and value (B, heads, S, D)."""
        output = torch.empty_like(query)
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        context.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients of query, key and value; the query's is added up in float32."""
        query, key, value, _, _ = context.saved_tensors
        workspace = torch.empty_like(query, dtype=torch.float32)
        results = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del workspace
        return results
