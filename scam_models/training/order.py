"""Which images a step sees, and its random numbers: functions of the seed and of the number of the step.

So nothing about the order needs to be saved, and a run goes on as if it had not been interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch.utils.data import Sampler


def mixed_seed(*numbers: int) -> int:
    """A seed that is unrelated to those of other numbers, from 0 to 2^63 - 1.

    Example:
        >>> mixed_seed(0, 1) != mixed_seed(1, 0)
        True
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permutation(count: int, seed: int) -> list[int]:
    """The numbers from 0 to ``count - 1`` in a random order."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """The images to train with and those kept for validation.

    Args:
        count: number of images.
        share: of those kept. At least one is, unless this is 0 or there is only one.
        seed: of the choice.

    Example:
        >>> learned, kept = split(10, 0.2, seed=0)
        >>> len(learned), len(kept), sorted(learned + kept) == list(range(10))
        (8, 2, True)
    """
    kept = min(max(round(share * count), 1), count - 1) if share > 0 else 0
    order = permutation(count, seed)
    return sorted(order[kept:]), sorted(order[:kept])


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The batches of steps: pairs of the number of an image and a seed for its augmentation.

    The images come in one long row, all of them in a new order again and again; a step takes the next ``batch_size``,
    and each process its part of them.

    Args:
        images: numbers of the images.
        batch_size: images of a step, over all processes.
        seed: of the order and the augmentation.
        begin, end: the first step and the one behind the last.
        process, processes: which this is, and how many there are. Their number divides ``batch_size``.

    Example:
        >>> sampler = StepSampler(range(5), batch_size=2, seed=0, begin=3, end=5)
        >>> len(sampler), [len(batch) for batch in sampler]
        (2, [2, 2])
    """

    def __init__(
        self,
        images: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        begin: int,
        end: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.images, self.seed, self.batch_size = images, seed, batch_size
        self.steps = range(begin, end)
        self.process, self.own = process, batch_size // processes
        self._order = lru_cache(maxsize=2)(self._new_order)

    def _new_order(self, epoch: int) -> list[int]:
        return permutation(len(self.images), mixed_seed(self.seed, epoch))

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            begin = step * self.batch_size + self.process * self.own
            yield [self._at(place) for place in range(begin, begin + self.own)]

    def _at(self, place: int) -> tuple[int, int]:
        epoch, position = divmod(place, len(self.images))
        return self.images[self._order(epoch)[position]], mixed_seed(self.seed, epoch, position)
