"""An accelerate that knows of no test before."""

from collections.abc import Iterator

import pytest

from tests.pipeline.line_task import forget_accelerator


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerator()
