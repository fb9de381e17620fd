"""The order of training rows: a resumable stream, cut into micro-batches for each process."""

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

from accelerate import Accelerator
from torch import randperm
from torch.utils.data import DataLoader, Dataset

from maskloom.pipeline.config.train import LoopConfig
from maskloom.pipeline.runs.interruption import outlive_first_signal
from maskloom.pipeline.training.randomness import keyed_generator


class ResumableStream(Dataset[dict[str, Any]]):
    """A dataset as an endless stream of rows that can be resumed at any position.

    The row at a position depends only on the seed: each epoch has its own order, keyed to (seed,
    epoch).
    """

    def __init__(
        self, dataset: Dataset[dict[str, Any]], seed: int, buckets: Sequence[int] | None = None, batch: int = 1
    ) -> None:
        """Sort the rows into buckets.

        Args:
            dataset: the rows to stream.
            seed: seed of the orders.
            buckets: bucket number of each row; None: all rows are in one bucket.
            batch: rows per micro-batch over all processes; the rows of a micro-batch share a
                bucket.
        """
        self.dataset, self.seed, self.batch = dataset, seed, batch
        rows = range(len(dataset))  # type: ignore[arg-type]
        members: dict[int, list[int]] = {}
        for row in rows:
            members.setdefault(0 if buckets is None else buckets[row], []).append(row)
        self.buckets = [members[number] for number in sorted(members)]
        self.epoch_length = len(self._epoch_order(0))
        self._order: tuple[int, list[int]] = (-1, [])

    def index(self, position: int) -> int:
        """Return the dataset index of the row at a position of the stream."""
        epoch, offset = divmod(position, self.epoch_length)
        if self._order[0] != epoch:
            self._order = (epoch, self._epoch_order(epoch))
        return self._order[1][offset]

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.dataset[self.index(position)], "position": position}

    def _epoch_order(self, epoch: int) -> list[int]:
        """Return the rows of an epoch in order.

        With several buckets, each is filled up to whole batches by repeating the first rows of its
        order, which differ between epochs. Then the batches are shuffled.
        """
        if len(self.buckets) == 1:
            return self._shuffled(self.buckets[0], "epoch order", epoch)
        batches = []
        for number, rows in enumerate(self.buckets):
            whole = -(-len(rows) // self.batch) * self.batch
            order = list(islice(cycle(self._shuffled(rows, "bucket order", epoch, number)), whole))
            batches += [order[i : i + self.batch] for i in range(0, whole, self.batch)]
        return [row for i in self._shuffled(range(len(batches)), "batch order", epoch) for row in batches[i]]

    def _shuffled(self, items: Sequence[int], *key: object) -> list[int]:
        return [items[i] for i in randperm(len(items), generator=keyed_generator(self.seed, *key)).tolist()]


def global_batch(config: LoopConfig, processes: int) -> int:
    """Return the number of samples per optimizer step, over all micro-batches and processes."""
    return config.train_batch_size * config.gradient_accumulation_steps * processes


def total_steps(config: LoopConfig, epoch_length: int, processes: int) -> int:
    """Return the number of optimizer steps: `max_train_steps`, or those of `num_train_epochs`."""
    if config.num_train_epochs is None:
        return config.max_train_steps
    return -(-config.num_train_epochs * epoch_length // global_batch(config, processes))


def batches(
    stream: ResumableStream, config: LoopConfig, accelerator: Accelerator, start: int, steps: int
) -> Iterator[dict[str, Any]]:
    """Yield the micro-batches of this process from step `start` on; some span two epochs."""
    share, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    numbers = range(start * accumulation, steps * accumulation)
    positions = (
        [*micro_batch(number, share, accelerator.process_index, accelerator.num_processes)] for number in numbers
    )
    workers = config.dataloader_num_workers
    yield from DataLoader(
        stream,
        batch_sampler=positions,
        num_workers=workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=outlive_first_signal,
        generator=keyed_generator(stream.seed, "loader"),  # the default generator belongs to dropout
    )


def micro_batch(number: int, share: int, process: int, processes: int) -> range:
    """Return the stream positions of one micro-batch of one process.

    Args:
        number: index of the micro-batch, counted from the start of the training.
        share: samples per process and micro-batch.
        process: index of the process.
        processes: number of processes.
    """
    first = (number * processes + process) * share
    return range(first, first + share)
