"""What ``python -m eve_ds.bench`` measures: a benchmark a file, each with a ``BENCHMARK`` that __main__.py lists.

To add one: write a module with such a value (``benchmark.Benchmark``), and enter it in ``eve_ds.bench.BENCHMARKS``.
"""

import os

# Read when torch is loaded. Without these its profiler, with which timing.py counts memory, tells stderr that it starts
# and stops, and that blocks older than it were released.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
