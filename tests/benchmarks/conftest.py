"""Benchmarks are scripts: run by hand, never collected."""

collect_ignore_glob = ["bench_*.py", "timing.py"]
