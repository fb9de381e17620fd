"""The order of rows: every row each epoch, one size a batch, the same rows a step for any number of
processes.
"""

from collections import Counter

import pytest
from accelerate import Accelerator
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from maskloom.pipeline.training.sampler import ResumableStream, batches, global_batch, micro_batch, total_steps
from tests.pipeline.line_task import Points, forget_accelerator, settings

ROWS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def stream(buckets: list[int] | None, batch: int, seed: int = 3) -> ResumableStream:
    return ResumableStream(list(range(len(buckets or range(10)))), seed, buckets, batch)  # type: ignore[arg-type]


def epoch(positioned: ResumableStream, number: int) -> list[int]:
    length = positioned.epoch_length
    return [positioned.index(number * length + i) for i in range(length)]


def test_every_epoch_sees_every_row_once_in_another_order() -> None:
    positioned = stream(None, 4)
    epochs = [epoch(positioned, number) for number in range(3)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[1] == epoch(stream(None, 7), 1)
    assert epochs[1] != epoch(stream(None, 4, seed=4), 1)


@given(ROWS, st.integers(1, 6), st.integers(0, 2))
@hypothesis_settings(max_examples=60, deadline=None)
def test_rows_of_a_batch_share_a_bucket_and_every_row_comes(buckets: list[int], batch: int, number: int) -> None:
    order = epoch(stream(buckets, batch), number)
    assert order == epoch(stream(buckets, batch), number)
    seen = Counter(order)
    assert set(seen) == set(range(len(buckets)))
    if len(set(buckets)) == 1:
        assert len(order) == len(buckets)
        return
    assert len(order) % batch == 0
    assert all(len({buckets[row] for row in order[i : i + batch]}) == 1 for i in range(0, len(order), batch))
    for bucket, count in Counter(buckets).items():
        extra = sum(seen[row] - 1 for row in range(len(buckets)) if buckets[row] == bucket)
        assert extra == -count % batch  # filled up to whole batches, no further
        times = [seen[row] for row in range(len(buckets)) if buckets[row] == bucket]
        assert max(times) - min(times) <= 1


@given(ROWS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
@hypothesis_settings(max_examples=60, deadline=None)
def test_processes_together_see_what_one_sees(
    buckets: list[int], share: int, processes: int, accumulation: int, step: int
) -> None:
    together = stream(buckets, share * processes)
    numbers = range(step * accumulation, (step + 1) * accumulation)
    spread = [
        [p for process in range(processes) for p in micro_batch(number, share, process, processes)]
        for number in numbers
    ]
    alone = [[*micro_batch(number, share * processes, 0, 1)] for number in numbers]
    assert spread == alone
    assert [together.index(p) for p in alone[0]] == [stream(buckets, share * processes).index(p) for p in spread[0]]
    assert [p for some in alone for p in some] == list(
        range(step * accumulation * share * processes, (step + 1) * accumulation * share * processes)
    )


def test_one_bucket_is_as_good_as_none() -> None:
    assert epoch(stream([7] * 10, 4), 2) == epoch(stream(None, 4), 2)


def test_the_row_filled_in_changes_from_epoch_to_epoch() -> None:
    positioned = stream([0] * 4 + [1] * 5, 4)  # the second bucket lacks three rows in every epoch
    twice = {
        tuple(row for row, times in Counter(epoch(positioned, number)).items() if times == 2) for number in range(6)
    }
    assert len(twice) > 1


def test_batches_go_on_where_a_resumed_training_starts() -> None:
    forget_accelerator()
    accelerator = Accelerator(cpu=True)
    config = settings(train_batch_size=3, gradient_accumulation_steps=2)
    positioned = ResumableStream(Points(), 1)
    whole = [batch["position"].tolist() for batch in batches(positioned, config, accelerator, 0, 6)]
    rest = [batch["position"].tolist() for batch in batches(positioned, config, accelerator, 4, 6)]
    assert [p for batch in whole for p in batch] == list(range(36))
    assert rest == whole[8:]
    with_workers = settings(train_batch_size=3, gradient_accumulation_steps=2, dataloader_num_workers=2)
    assert [b["position"].tolist() for b in batches(positioned, with_workers, accelerator, 4, 6)] == rest
    forget_accelerator()


@pytest.mark.parametrize(
    ("epochs", "rows", "processes", "steps"),
    [(1, 10, 1, 2), (3, 10, 1, 5), (3, 12, 1, 6), (1, 1, 1, 1), (4, 12, 2, 4), (5, 10, 2, 5), (2, 24, 4, 2)],
)
def test_epochs_become_steps_over_all_processes(epochs: int, rows: int, processes: int, steps: int) -> None:
    config = settings(train_batch_size=3, gradient_accumulation_steps=2, num_train_epochs=epochs, max_train_steps=999)
    assert total_steps(config, rows, processes) == steps


def test_without_epochs_the_steps_are_those_asked_for() -> None:
    assert total_steps(settings(max_train_steps=17), 10, 2) == 17
    assert global_batch(settings(train_batch_size=3, gradient_accumulation_steps=2), 4) == 24
