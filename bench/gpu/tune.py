"""Makes the rows of the table of configurations for the GPU of this machine.

    python -m bench.gpu.tune [--only semantic_cross_attention]

Each row starts from the one that is used now. Block sizes, warps and stages are changed one after another, and what
makes a call of :mod:`bench.gpu.calls`, forward and backward, faster by more than two per cent is kept. The result is
written to ``sca_kernels/triton/configurations.json`` under the name of the device. Check it in after
``make compile-gpu`` and ``make gpu-test``. Never run on a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

import sca_kernels
from sca_kernels.triton import launch
from sca_kernels.triton.launch import Configuration

from .calls import all_calls, step_of
from .run import milliseconds

Row = tuple[str, str, str, str]  # kernel, size class, device, type

_GAIN = 0.98
_MOST_WARPS, _MOST_STAGES, _LEAST_BLOCK = 16, 5, 4


def neighbours(config: Configuration) -> Iterator[Configuration]:
    """Configurations in which one number is another."""
    for name, size in config.blocks.items():
        for other in (size // 2, size * 2):
            if other >= (1 if name == "TILES" else _LEAST_BLOCK):
                yield replace(config, blocks={**config.blocks, name: other})
    for warps in (config.num_warps // 2, config.num_warps * 2):
        if 1 <= warps <= _MOST_WARPS:
            yield replace(config, num_warps=warps)
    for stages in (config.num_stages - 1, config.num_stages + 1):
        if 1 <= stages <= _MOST_STAGES:
            yield replace(config, num_stages=stages)


def improve(config: Configuration, time: Callable[[Configuration], float]) -> Configuration:
    """Goes to the best neighbour until none is faster by more than two per cent."""
    best = time(config)
    while True:
        timed = [(time(other), other) for other in neighbours(config)]
        fastest, other = min(timed, key=lambda pair: pair[0])
        if fastest >= _GAIN * best:
            return config
        best, config = fastest, other


def tune(only: str | None) -> dict[Row, Configuration]:
    lookup = launch._lookup
    chosen: dict[Row, Configuration] = {}
    asked: list[Row] = []

    def choose(*row: str) -> Configuration:
        key = (row[0], row[1], row[2], row[3])
        if key not in asked:
            asked.append(key)
        return chosen.get(key) or lookup(*row)

    launch._lookup = choose
    try:
        for call in all_calls():
            if only not in (None, call.operator):
                continue
            asked.clear()
            with torch.device("cuda"), sca_kernels.backend("triton"):
                step = step_of(call.prepare())
                step()
                for row in tuple(asked):
                    if row in chosen:
                        continue

                    def time(config: Configuration, row: Row = row, step: Callable[[], object] = step) -> float:
                        chosen[row] = config
                        try:
                            return milliseconds(step)
                        except Exception as error:  # too much shared memory, a tile that Triton refuses
                            print(f"{row}, {config}: {error}")
                            return float("inf")

                    chosen[row] = improve(lookup(*row), time)
                    print(row, chosen[row], flush=True)
    finally:
        launch._lookup = lookup
    return chosen


def write(chosen: dict[Row, Configuration], path: Path) -> None:
    """Adds rows to the table, or replaces those that are there."""
    table = json.loads(path.read_text(encoding="utf-8"))
    for (kernel, size_class, device, dtype), config in chosen.items():
        rows = table.setdefault(device, {}).setdefault(kernel, {}).setdefault(dtype, {})
        rows[size_class] = config.options
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="the operator to tune for; default: all")
    write(tune(parser.parse_args().only), Path(launch.__file__).with_name("configurations.json"))
