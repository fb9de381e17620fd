"""A network's results for a batch do not depend on how the batch is computed."""

import pytest
import torch

from maskloom.evaluate.scores.threads import CPU_BATCH, network_results


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 5)
    ).eval()


@pytest.mark.parametrize("count", [1, 2 * CPU_BATCH, 2 * CPU_BATCH + 3])
@pytest.mark.parametrize("batch_size", [None, 2, 100])
def test_results_are_those_of_the_whole_batch_in_order(count: int, batch_size: int | None) -> None:
    images, model = torch.randn(count, 3, 8, 8), network()
    found = network_results(model, images, batch_size)
    torch.testing.assert_close(found, model(images).detach())
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("device", "batch_size", "sizes"),
    [
        ("cpu", None, [CPU_BATCH, CPU_BATCH, 4]),
        ("cpu", 100, [CPU_BATCH, CPU_BATCH, 4]),
        ("cpu", 6, [3, 3, 3, 3, 3, 3, 2]),
        ("cpu", 1, [1] * 20),
        ("meta", None, [20]),
        ("meta", 6, [6, 6, 6, 2]),
    ],
)
def test_no_more_images_than_asked_are_computed_at_a_time(
    device: str, batch_size: int | None, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskloom.evaluate.scores.threads.available_cores", lambda: 2)
    assert CPU_BATCH == 8
    seen: list[int] = []

    def double(part: torch.Tensor) -> torch.Tensor:
        seen.append(len(part))
        return 2 * part

    assert network_results(double, torch.zeros(20, 3, device=device), batch_size).shape == (20, 3)
    assert sorted(seen) == sorted(sizes)
