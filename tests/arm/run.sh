#!/bin/bash
# Inside the lane's Debian, in the sources, when they are built: the tests.  quick|all; arguments for pytest choose instead.
set -euo pipefail
size=$1
shift
quick=(
    tests/core/test_crc32c.py tests/core/test_ring.py tests/core/test_meta.py tests/core/test_segment.py
    tests/core/test_wire.py tests/core/test_window.py tests/core/test_frames.py tests/core/test_log_positions.py
    tests/core/test_log_threads.py tests/core/test_pages.py
    tests/test_golden.py tests/test_corruption.py tests/test_smoke.py
)
chosen=()
case $size in
    quick) chosen=("${quick[@]}") ;;
    all) ;;
    *) echo "$size: quick and all are known" >&2; exit 2 ;;
esac
if [ $# -gt 0 ]; then chosen=(); fi
# Emulation is slow: a test may take longer, and what it waits for too.
exec python3 -m pytest -q -p no:cacheprovider -n 2 --dist loadfile --timeout=1200 "${chosen[@]}" "$@"
