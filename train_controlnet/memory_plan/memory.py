"""Memory of a computation on torch's meta device, where tensors have shapes but no content.

The birth and the end of every tensor are recorded, so the figures are those of PyTorch's own graph
instead of a formula. The meta device has neither fused attention nor autocast; `OnGpu` adds both.
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

# The functions of torch's CUDA autocast (aten/src/ATen/autocast_mode.h) that Stable Diffusion's
# layers call with weights.
HALF_FUNCTIONS = frozenset({functional.linear, functional.conv2d})
SINGLE_FUNCTIONS = frozenset({functional.group_norm, functional.layer_norm})

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and data type of a tensor."""
_LAYOUTS: dict[Any, tuple[list[Layout], TreeSpec] | None] = {}


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of a device's living tensors inside the block.

    Attributes:
        live: current number of bytes.
        peak: largest number of bytes so far.
    """

    def __init__(self, existing: Iterable[Tensor], device: str = "meta") -> None:
        """Start at zero bytes.

        Args:
            existing: tensors that are not counted, such as weights.
            device: type of the device whose tensors are counted.
        """
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        self._existing = [tensor.untyped_storage() for tensor in existing]
        self._known = {id(storage) for storage in self._existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = cached_call(func, args, kwargs or {}) if self.device == "meta" else func(*args, **(kwargs or {}))
        for found in tree_leaves(result):
            if isinstance(found, Tensor) and found.device.type == self.device:
                self._count(found.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known:  # a view, or an in-place operation
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
    """Lets layers inside the block keep what they would keep on a GPU: fused attention, autocast.

    A layer is recognised by its weight. This separates networks under autocast from those in pure
    half precision, and also works when activation checkpointing calls a layer again. Autocast's
    copies of weights are made in every call. That autocast keeps them for the whole forward pass
    is not modelled: they are half as large as the gradients, which come later and stay.
    """

    def __init__(self, networks: Iterable[nn.Module], dtype: torch.dtype) -> None:
        """Choose the networks under autocast.

        Args:
            networks: the networks under autocast.
            dtype: the data type of autocast; float32: no autocast.
        """
        super().__init__()
        self.dtype = dtype
        weights = [p for network in networks for p in network.parameters()] if dtype != torch.float32 else []
        self._weights = {id(weight) for weight in weights}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return fused_attention(*args, **kwargs)
        autocast = func in HALF_FUNCTIONS | SINGLE_FUNCTIONS
        if autocast and any(id(value) in self._weights for value in [*args, *kwargs.values()]):
            dtype = self.dtype if func in HALF_FUNCTIONS else torch.float32
            args = [cast(value, dtype) for value in args]
            kwargs = {key: cast(value, dtype) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def cached_call(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function with meta tensors, computing the layouts of its results only once.

    Python decompositions take many times longer to find a layout than to create a tensor with it,
    and the blocks of a network repeat the same calls. Layouts are not kept for functions that
    change or share the memory of their inputs.
    """
    leaves, form = tree_flatten((args, kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if func._schema.is_mutable or not all(tensor.is_meta for tensor in inputs):
        return func(*args, **kwargs)
    key = (func, form, *(layout_of(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves))
    if (known := _LAYOUTS.get(key)) is not None:
        layouts, form = known
        tensors = [torch.empty_strided(*layout, dtype=dtype, device="meta") for *layout, dtype in layouts]
        return tree_unflatten(tensors, form)
    result = func(*args, **kwargs)
    if key not in _LAYOUTS:
        _LAYOUTS[key] = new_layouts(result, inputs)
    return result


def new_layouts(result: Any, inputs: list[Tensor]) -> tuple[list[Layout], TreeSpec] | None:
    """Return the layouts of a result that consists of new meta tensors, otherwise None."""
    outputs, form = tree_flatten(result)
    if not all(isinstance(output, Tensor) and output.is_meta for output in outputs):
        return None
    if {tensor.untyped_storage()._cdata for tensor in outputs} & {tensor.untyped_storage()._cdata for tensor in inputs}:
        return None
    return [layout_of(output) for output in outputs], form


def layout_of(tensor: Tensor) -> Layout:
    """Return the layout of a tensor."""
    return tensor.shape, tensor.stride(), tensor.dtype


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a floating-point tensor in another data type; anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return attention; other arguments of `scaled_dot_product_attention` take no memory."""
    return FusedAttention.apply(query, key, value)


class FusedAttention(torch.autograd.Function):
    """Keeps what FlashAttention (Dao, 2023) and the memory-efficient kernel keep.

    That is query, key, value, output and the log-sum-exp of the rows. The meta device alone would
    keep the attention matrices, as no GPU kernel of PyTorch does at these sizes. As with the
    kernels, output and gradients have the strides of their inputs, so merging heads makes no copy.
    """

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return (B, heads, L, D) for query (B, heads, L, D), key and value (B, heads, S, D)."""
        output = torch.empty_like(query)
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        context.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients of query, key and value; that of the query is accumulated in float32."""
        query, key, value, _, _ = context.saved_tensors
        workspace = torch.empty_like(query, dtype=torch.float32)
        results = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del workspace
        return results
