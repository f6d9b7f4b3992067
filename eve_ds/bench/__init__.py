"""The command ``python -m eve_ds.bench``: one benchmark per file, each with a value ``BENCHMARK``.

To add one, write a module with such a value (``benchmark.Benchmark``) and list it in ``BENCHMARKS`` of __main__.py.
"""

import os

# Read when torch is imported. They silence its profiler, with which timing.py counts memory: it would log to stderr
# that it starts and stops, and that blocks older than it were freed.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
