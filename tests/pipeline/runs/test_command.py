"""How a command ends beside other processes."""

from contextlib import suppress

import pytest
from torch import distributed

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.command import run_command


def _in_a_group(ending: BaseException | None) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    if ending is not None:
        raise ending


@pytest.mark.parametrize("ending", [None, SystemExit(0), SystemExit(None)])
def test_a_command_that_has_succeeded_leaves_the_process_group(ending):
    with suppress(SystemExit):
        run_command(lambda: _in_a_group(ending))
    assert not distributed.is_initialized()


@pytest.mark.parametrize("ending", [SystemExit(3), MaskLoomError("wrong")])
def test_a_command_that_has_failed_does_not_wait_for_the_others(ending):
    try:
        with pytest.raises(SystemExit):
            run_command(lambda: _in_a_group(ending))
        assert distributed.is_initialized()
    finally:
        distributed.destroy_process_group()
