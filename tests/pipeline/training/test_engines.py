"""What engines that shard weights need, as far as one process can show it."""

from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from maskloom.pipeline.training.distributed import weights_gathered


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def test_gathered_weights_are_shards_with_hooks_again_even_if_the_block_fails(mesh: DeviceMesh) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    for part in (network[0], network):
        fully_shard(part, mesh=mesh)
    hooks = [(part._forward_pre_hooks, part._forward_hooks) for part in network.modules()]
    assert hooks[0][0]
    with suppress(KeyError), weights_gathered(SimpleNamespace(networks={"line": network}), None):
        assert not any(isinstance(one, DTensor) for one in network.parameters())
        assert not network._forward_pre_hooks
        assert network(torch.ones(1, 3)).shape == (1, 1)
        raise KeyError
    assert all(isinstance(one, DTensor) for one in network.parameters())
    after = [(part._forward_pre_hooks, part._forward_hooks) for part in network.modules()]
    assert all(old is new for pair in zip(hooks, after, strict=True) for old, new in zip(*pair, strict=True))
