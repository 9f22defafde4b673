"""Benchmarks: one module a question, each runs alone (`python -m bench.enqueue --help`), or all by `python -m bench`.
Installed, this package is `cloudpubsub.bench`, and `cloudpubsub bench` runs it.

Every figure is taken in a process of its own, subjects take turns, and comparisons are made within a round, so that
what else the machine is doing meets them all alike.  Only the measured part is timed, and its result is checked.
"""
