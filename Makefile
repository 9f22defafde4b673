# make demo      the whole story on an embedded broker, in under a minute
# make test      everything, on this Python
# make test-all  everything, on every CPython from 3.10 to 3.13 that is found
# make test-arm64, make test-armhf  everything on emulated ARM, 64 and 32 bit, as root on Debian; ARM_TESTS=quick for the core
#                and one run from publishing to kill -9 and replay
# make wheel-test  source archive, wheel, and a smoke test of what is installed from it; wheel-test-arm64, wheel-test-armhf: the
#                same on emulated ARM
# make sanitize  the C core's tests with AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
# make model     the memory ordering of the C core, model-checked: it holds, and nothing in it is superfluous
# make killtest  a simulated kill at every instruction that matters, and thousands of random ones beside a real broker;
#                for minutes (KILL_ROUNDS=20)
# make powercut  simulated power cuts, hundreds of thousands of them (CUT_SEEDS=50000)
# make chaos     faults of the link, broker restarts and kill -9 at random, all at once, for minutes (CHAOS_SECONDS=300)
# make soak      overload against a small quota, with the disk looked at all the time (SOAK_SECONDS=300)
# make lint      ruff, mypy, and the C core with every warning an error
# make bench     what the README's numbers come from
# make instructions  counts the instructions of the native hot paths and compares with bench/instructions.json
# make fuzz      fuzzing of what reads bytes from outside, for an hour a target, or FUZZ_SECONDS
# make fuzz-quick  the same for a minute a target
#
# A fresh Debian or Ubuntu with git, Python >= 3.10, a C compiler and make is enough.

PYTHON ?= python3
VENV ?= .venv
TESTS ?=
# Most tests wait for somebody else most of the time; what is in one file stays on one process.  One that crashes ends the
# run: with another in its place the run would wait for ever.
WORKERS ?= -n 2 --dist loadfile --max-worker-restart 0
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

BIN := $(VENV)/bin
# The C that Cython writes is a product, not a source: leaving it in would rebuild for ever.
WRITTEN := $(patsubst %.pyx,%.c,$(wildcard cloudpubsub/*.pyx))
SOURCES := pyproject.toml setup.py $(filter-out $(WRITTEN), \
	$(wildcard cloudpubsub/*.[ch] cloudpubsub/*.pyx cloudpubsub/*.pxd))
# The compiler needs Python's headers, venv needs ensurepip; Debian packs both apart from Python.
HAS_PARTS := import ensurepip, os, sys, sysconfig, venv; \
	sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
VERSIONS := 3.10 3.11 3.12 3.13

# Fuzzing: one program for each target.  Only the library is watched for coverage, its checksum aside, which has none that
# is worth the time.
FUZZ_CC ?= clang
FUZZ_SECONDS ?= 3600
FUZZ_SEED ?= 0
FUZZ_TARGETS := recovery stream
FUZZ_PROGRAMS := $(FUZZ_TARGETS:%=build/fuzz/fuzz_%)
FUZZ_OBJECTS := $(patsubst %.c,build/fuzz/%.o,$(notdir $(filter %.c,$(SOURCES)))) \
	$(addprefix build/fuzz/,io_sim.o files.o expect.o)
FUZZ_HEADERS := $(wildcard cloudpubsub/*.h tests/core/*.h tests/fuzz/*.h)
FUZZ_FLAGS := -std=c11 -O1 -g -pthread -Icloudpubsub -Itests/core -Itests/fuzz -fno-omit-frame-pointer \
	-Wall -Wextra -Wconversion -Wshadow -Wmissing-prototypes -Werror \
	-fsanitize=address,undefined -fno-sanitize-recover=all

.PHONY: demo test test-brokers test-arm64 test-armhf wheel-test wheel-test-arm64 wheel-test-armhf test-all bench instructions lint sanitize model killtest powercut chaos soak \
	fuzz fuzz-quick fuzz-clang clean mosquitto brokers peers valgrind

demo: $(VENV)/.demo
	@$(BIN)/cloudpubsub demo

test: $(VENV)/.test brokers
	$(BIN)/python -m pytest $(WORKERS) $(TESTS)

# All four brokers, also what takes tens of seconds: RabbitMQ killed and started again, a cluster of NATS nodes.
test-brokers: $(VENV)/.test brokers
	$(BIN)/python -m pytest -m "slow_brokers or not slow_brokers" tests/test_end_to_end_*.py tests/test_nats_cluster.py \
	    tests/test_more_brokers.py

# All of it in less than ten minutes; leaves bench/results/.  BENCH="--quick" only shows that it runs.
BENCH ?=
bench: $(VENV)/.bench peers
	$(BIN)/python -m bench $(BENCH)

# Counts are the same on a busy machine; a minute at most.
instructions: valgrind
	@"$(PYTHON)" -m bench.instructions --check

valgrind:
	@type -P valgrind >/dev/null && exit 0
	if [ "$$(id -u)" = 0 ] && type -P apt-get >/dev/null; then
	    echo "installing valgrind"
	    .ci/install valgrind libc6-dbg
	else
	    echo "valgrind is missing; as root: apt-get install valgrind" >&2
	    exit 1
	fi

# In a small Debian of that architecture; see tests/arm/lane.sh.
ARM_TESTS ?= all
test-arm64 test-armhf: test-%: $(VENV)/.test
	@PYTHON="$(CURDIR)/$(BIN)/python" nice tests/arm/lane.sh $* $(ARM_TESTS) $(TESTS)

# The source archive, the wheel of it, and that one in an environment of its own.
wheel-test: $(VENV)/.base
	@tests/wheel.sh "$(BIN)/python" build/wheel

wheel-test-arm64 wheel-test-armhf: wheel-test-%: $(VENV)/.test
	@PYTHON="$(CURDIR)/$(BIN)/python" nice tests/arm/lane.sh $* wheel

test-all:
	@tested=""
	for version in $(VERSIONS); do
	    python=""
	    for candidate in "$$(type -P python$$version || true)" \
	        $$(ls -d ~/.pyenv/versions/$$version.*/bin/python 2>/dev/null | sort -rV || true); do
	        # A shim of pyenv may be there and have nothing behind it.
	        if [ -n "$$candidate" ] && "$$candidate" -c 'import sys' 2>/dev/null; then python="$$candidate"; break; fi
	    done
	    if [ -z "$$python" ]; then echo "== Python $$version: not found, not tested"; continue; fi
	    echo "== Python $$version: $$python"
	    $(MAKE) --no-print-directory test PYTHON="$$python" VENV=".venv-$$version"
	    tested="$$tested $$version"
	done
	[ -n "$$tested" ] || { echo "no CPython from 3.10 to 3.13 was found" >&2; exit 1; }
	echo "== passed on$$tested"

lint: $(VENV)/.test
	@$(BIN)/ruff check .
	$(BIN)/mypy
	checked=""
	# The last one, where it is, sees what is wrong with 32 bits.
	for compiler in gcc clang arm-linux-gnueabihf-gcc; do
	    if type -P $$compiler >/dev/null; then
	        echo "C core with $$compiler"
	        CC=$$compiler CLOUDPUBSUB_STRICT=1 $(BIN)/python setup.py -q build_clib --force \
	            --build-temp build/lint-$$compiler --build-clib build/lint-$$compiler
	        checked="$$checked $$compiler"
	    fi
	done
	[ -n "$$checked" ] || { echo "neither gcc nor clang was found: the C core was not checked" >&2; exit 1; }

# The quick one is a gate: it starts from the same seed each time, so that what it finds is there to be found again.
fuzz-quick: FUZZ_SECONDS = 60
fuzz-quick: FUZZ_SEED = 1
fuzz fuzz-quick: fuzz-clang
	@[ -e build/fuzz/.clang ] || exit 0
	$(MAKE) --no-print-directory $(FUZZ_PROGRAMS)
	failed=""
	for target in $(FUZZ_TARGETS); do
	    program=build/fuzz/fuzz_$$target
	    log=build/fuzz/$$target.log
	    mkdir -p build/fuzz/corpus/$$target
	    echo "fuzzing $$target: the corpus, then until $(FUZZ_SECONDS) s are over; see $$log"
	    if $$program -seed=$(FUZZ_SEED) -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -timeout=20 -print_final_stats=1 \
	        -artifact_prefix=build/fuzz/$$target- build/fuzz/corpus/$$target tests/fuzz/corpus/$$target >$$log 2>&1; then
	        echo "  nothing found in $$(sed -n 's/^stat::number_of_executed_units: *//p' $$log) runs"
	    else
	        failed="$$failed $$target"
	        grep -av '^#[0-9]*[[:space:]]' $$log | tail -n 50 >&2
	        input=$$(sed -n 's/.*Test unit written to //p' $$log | tail -n 1)
	        [ -z "$$input" ] || echo "again: $$program $$input    (FUZZ_SHOW=1 before it tells what the input means)" >&2
	    fi
	done
	[ -z "$$failed" ] || { echo "fuzzing found something in:$$failed" >&2; exit 1; }

# clang and its run-time library of the fuzzer, which Debian packs under the number of the version.
fuzz-clang:
	@mkdir -p build/fuzz
	rm -f build/fuzz/.clang
	works() {
	    echo 'int LLVMFuzzerTestOneInput(void); int LLVMFuzzerTestOneInput(void) { return 0; }' |
	        $(FUZZ_CC) -fsanitize=fuzzer,address,undefined -x c - -o build/fuzz/.clang 2>/dev/null
	}
	if works; then exit 0; fi
	if [ "$$(id -u)" = 0 ] && type -P apt-get >/dev/null; then
	    echo "installing clang"
	    export DEBIAN_FRONTEND=noninteractive
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends clang libc6-dev || true
	    if works; then exit 0; fi
	    version=$$($(FUZZ_CC) -dumpversion | cut -d. -f1 || true)
	    apt-get install -y -qq --no-install-recommends "libclang-rt-$$version-dev" || true
	    if works; then exit 0; fi
	fi
	echo "########################################################################" >&2
	echo "# clang with the run-time library of its fuzzer is missing and could   #" >&2
	echo "# not be installed here: nothing is fuzzed.                            #" >&2
	echo "# As root: apt-get install clang libclang-rt-dev                       #" >&2
	echo "########################################################################" >&2
	case "$${CI:-}" in ""|0|false) ;; *) echo "in CI that is a failure" >&2; exit 1;; esac

$(FUZZ_PROGRAMS): build/fuzz/%: tests/fuzz/%.c $(FUZZ_OBJECTS) $(FUZZ_HEADERS)
	@$(FUZZ_CC) $(FUZZ_FLAGS) -fsanitize=fuzzer $< $(FUZZ_OBJECTS) -o $@

build/fuzz/_%.o: FUZZ_COVERAGE := -fsanitize=fuzzer-no-link
build/fuzz/_crc32c.o: FUZZ_COVERAGE :=
build/fuzz/%.o: cloudpubsub/%.c $(FUZZ_HEADERS)
	@$(FUZZ_CC) $(FUZZ_FLAGS) $(FUZZ_COVERAGE) -c $< -o $@
build/fuzz/%.o: tests/core/%.c $(FUZZ_HEADERS)
	@$(FUZZ_CC) $(FUZZ_FLAGS) -c $< -o $@
build/fuzz/%.o: tests/fuzz/%.c $(FUZZ_HEADERS)
	@$(FUZZ_CC) $(FUZZ_FLAGS) -c $< -o $@

sanitize: $(VENV)/.test
	env $$($(BIN)/python -m tests.core.build address,undefined) $(BIN)/python -m pytest -q tests/core \
	    -k "not kill_points and not log_threads and not log_model"
	env $$($(BIN)/python -m tests.core.build thread) $(BIN)/python -m pytest -q tests/core/test_log_threads.py \
	    tests/core/test_log_close.py tests/core/test_ring.py

model: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m "model or not model" tests/model

KILL_ROUNDS ?= 20
killtest: $(VENV)/.test mosquitto
	CLOUDPUBSUB_KILL_ROUNDS=$(KILL_ROUNDS) $(BIN)/python -m pytest -s tests/core/test_kill_points.py tests/test_publish_kill.py

CHAOS_SECONDS ?= 300
chaos: $(VENV)/.test mosquitto
	CLOUDPUBSUB_CHAOS_SECONDS=$(CHAOS_SECONDS) $(BIN)/python -m pytest -s tests/test_chaos.py

SOAK_SECONDS ?= 300
soak: $(VENV)/.test
	CLOUDPUBSUB_SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest tests/test_disks_vanishing.py -k quota

CUT_SEEDS ?= 50000
powercut: $(VENV)/.test
	CLOUDPUBSUB_CUT_SEEDS=$(CUT_SEEDS) $(BIN)/python -m pytest -s tests/core/test_power_cut.py

clean:
	rm -rf .venv .venv-3.* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(WRITTEN) cloudpubsub/*.html cloudpubsub/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment with what building needs, so that building again fetches nothing.
$(VENV)/.base:
	@echo "making $(VENV) with $(PYTHON)"
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
	    echo "$(PYTHON) is older than 3.10; say which to use: make PYTHON=python3.x" >&2; exit 1; }
	if ! "$(PYTHON)" -c '$(HAS_PARTS)'; then
	    version=$$("$(PYTHON)" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
	    if [ "$$(id -u)" = 0 ] && type -P apt-get >/dev/null; then
	        echo "installing $$version-venv and $$version-dev"
	        apt-get update -qq
	        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$version-venv $$version-dev
	    else
	        echo "$(PYTHON) lacks venv or its C headers; as root: apt-get install $$version-venv $$version-dev" >&2
	        exit 1
	    fi
	fi
	type -P "$${CC:-cc}" >/dev/null || { echo "no C compiler; as root: apt-get install gcc libc6-dev" >&2; exit 1; }
	rm -rf "$(VENV)"
	"$(PYTHON)" -m venv "$(VENV)"
	$(BIN)/python -m pip install -q 'setuptools>=77' 'Cython>=3.0,<4' wheel
	touch $@

# .demo, .test, .bench: the package built in place, with the extra of that name.
$(VENV)/.%: $(SOURCES) | $(VENV)/.base
	@echo "building, with what '$*' needs, in $(VENV)"
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[$*]'
	touch $@

# Where root may, what the tests need of Debian is installed; no service is started, now or at the next boot.
mosquitto: PROGRAMS := mosquitto
brokers: PROGRAMS := mosquitto nats-server rabbitmq-server
# What the benchmarks compare with; one that is not there is named in the results.
peers: mosquitto
	@if [ "$$(id -u)" != 0 ] || ! type -P apt-get >/dev/null; then exit 0; fi
	wanted=""
	type -P mosquitto_pub >/dev/null || wanted="$$wanted mosquitto-clients"
	has() { echo "#include <$$1>" | "$${CC:-cc}" -E - >/dev/null 2>&1; }
	has MQTTAsync.h || wanted="$$wanted libpaho-mqtt-dev"
	has openssl/ssl.h || wanted="$$wanted libssl-dev"
	for package in $$wanted; do echo "installing $$package"; .ci/install "$$package" || true; done

mosquitto brokers:
	@export PATH="$$PATH:/usr/local/sbin:/usr/sbin:/sbin"
	can_install() { [ "$$(id -u)" = 0 ] && type -P apt-get >/dev/null; }
	if can_install && ! { type -P mkfs.ext4 && type -P mount; } >/dev/null; then
	    echo "installing e2fsprogs and mount, for file systems of the tests' own"
	    .ci/install e2fsprogs mount || true # without, their tests say so
	fi
	missing() { for program in $(PROGRAMS); do type -P "$$program" >/dev/null || echo "$$program"; done; }
	wanted=$$(missing)
	[ -n "$$wanted" ] || exit 0
	if can_install; then
	    echo "installing" $$wanted
	    for package in $$wanted; do .ci/install "$$package" || true; done # one that fails does not stop the others
	    wanted=$$(missing)
	    [ -n "$$wanted" ] || exit 0
	fi
	echo "########################################################################" >&2
	echo "# Missing, and could not be installed here:" $$wanted >&2
	echo "# Their tests will be skipped; the embedded broker does the others." >&2
	echo "# As root: apt-get install" $$wanted >&2
	echo "########################################################################" >&2
	case "$${CI:-}" in ""|0|false) ;; *) echo "in CI that is a failure" >&2; exit 1;; esac
