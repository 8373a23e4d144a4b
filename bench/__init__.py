"""The benchmarks: ``pytest bench/`` checks every contender, ``pytest bench/ --benchmark`` also times them."""
