#!/bin/bash
# Inside the lane's Debian, in the sources, when they are built: the tests.  quick|all; arguments for pytest
# that name tests choose instead.
set -euo pipefail
size=$1
shift
quick=(
    tests/core/test_crc32c.py tests/core/test_ring.py tests/core/test_meta.py tests/core/test_segment.py
    tests/core/test_wire.py tests/core/test_window.py tests/core/test_frames.py tests/core/test_log_positions.py
    tests/core/test_log_threads.py tests/core/test_log_close.py tests/core/test_log_ahead.py tests/core/test_log_damage.py
    tests/core/test_pages.py tests/test_golden.py tests/test_smoke.py
    # Smaller rings are tried whole.
    --deselect "tests/core/test_ring.py::test_every_state_of_a_small_ring_is_as_the_model_says[512-1000000]"
    --deselect "tests/core/test_ring.py::test_states_of_a_larger_ring_are_as_the_model_says[2048]"
)
chosen=()
case $size in
    quick) chosen=("${quick[@]}") ;;
    all) ;;
    *) echo "$size: quick and all are known" >&2; exit 2 ;;
esac
case " $*" in *" tests/"*) chosen=() ;; esac
# Emulation is slow: a test may take longer, and what it waits for too.
exec python3 -m pytest -q -p no:cacheprovider -n 2 --dist loadfile --timeout=1200 "${chosen[@]}" "$@"
