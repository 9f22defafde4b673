"""All benchmarks in a row, with other libraries beside this one: `python -m bench`.

A full run takes less than ten minutes and leaves its figures in `bench/results/`: `results.json`, the tables of it in
`results.md`, and plots.  With `--quick` it only shows that everything runs, and leaves nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import _flags, _harness, _suite


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(_suite.QUESTIONS)} (default: all)")
    _flags.add_flags(parser)
    parser.add_argument("--results", type=Path, metavar="DIR", help="for the figures (full run: bench/results)")
    arguments = parser.parse_args(argv)
    arguments.peers, arguments.broker, arguments.tls, arguments.messages = True, None, False, None
    is_whole = not arguments.quick and not arguments.names
    if arguments.results is None and is_whole and (_harness.ROOT / "setup.py").exists():
        arguments.results = _harness.RESULTS
    return _suite.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
