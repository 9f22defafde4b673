#!/bin/bash
# The tests on ARM, by emulation: builds the extension for the architecture and runs the tests in a small Debian of it.
#
#   tests/arm/lane.sh arm64|armhf quick|all [arguments of pytest; those that name tests choose instead]
#   tests/arm/lane.sh arm64|armhf wheel     the wheel instead: built of the source archive alone, installed where nothing else is
#
# As root on Debian, for chroot and for binfmt_misc, through which the kernel starts qemu for every program of the other
# architecture: processes are real, killed by real signals, with real files, memory and sockets.  What is the kernel's is
# that of this machine: 4 KiB pages, its file systems, its loopback.  Only what need not be emulated is not: Cython, pip and
# the compiler, a cross compiler that is seen inside, run on this machine.
#
# The Debian is made once (its packages are unpacked, not configured) and kept in $CLOUDPUBSUB_ARM_CACHE (default
# ~/.cache/cloudpubsub/arm); removing that folder is always safe while no lane runs.  Everything that is mounted or started
# goes when this ends, however it ends; the packages that are installed on this machine where they are missing (qemu,
# debootstrap, the cross compiler), and the entry in binfmt_misc, stay.
#
# PYTHON: a Python of this machine, in whose environment the package is built for testing; the Makefile says which.
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
arch=${1:?arm64 or armhf} size=${2:-all}
shift $(($# < 2 ? $# : 2))
export LC_ALL=C PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
host_python=${PYTHON:?a Python with the package built in it}

# libffi and the like come with the packages of Python; libssl-dev: a peer of the benchmarks, whose tests run too; mount and
# e2fsprogs: file systems of the tests' own.
packages=python3,libpython3-dev,libssl-dev,mosquitto,mount,e2fsprogs
case $arch in
    arm64) cpu=aarch64 machine=aarch64 triplet=aarch64-linux-gnu ;;
    # PyPI has no wheel of cffi and psutil for it; debootstrap does not see that the former needs python3-ply.
    armhf) cpu=arm machine=armv7l triplet=arm-linux-gnueabihf packages=$packages,python3-cffi,python3-ply,python3-psutil ;;
    *) echo "$arch: arm64 and armhf are known" >&2; exit 2 ;;
esac

say() { echo "== $arch, $SECONDS s: $*"; }
fail() { echo "$arch: $*" >&2; exit 1; }
cannot() { fail "NOT TESTED: this machine does not permit what the lane needs: $*"; }

[ "$(uname -m)" = x86_64 ] || fail "this lane emulates ARM on x86-64; here make test does the same"
[ "$(id -u)" = 0 ] || fail "needs root, for chroot and binfmt_misc"
cache=${CLOUDPUBSUB_ARM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cloudpubsub/arm}
root=$cache/$arch

# One lane at a time for an architecture; and all that follows in namespaces that end with it.
if [ -z "${CLOUDPUBSUB_ARM_INSIDE:-}" ]; then
    mkdir -p "$cache"
    unshare --mount --pid --fork --kill-child --propagation private mount -t proc proc /proc ||
        cannot "no namespaces (unshare), or no mount in them"
    CLOUDPUBSUB_ARM_INSIDE=1 exec flock "$cache/$arch.lock" \
        unshare --mount --pid --fork --kill-child --propagation private "$0" "$arch" "$size" "$@"
fi
mount -t proc proc /proc

tools() {
    local name=qemu-$cpu registry=/proc/sys/fs/binfmt_misc
    if ! type -P "qemu-$cpu-static" debootstrap "$triplet-gcc" >/dev/null; then
        say "installing qemu-user-static, debootstrap and a cross compiler"
        "$here/.ci/install" qemu-user-static debootstrap "gcc-$triplet" "libc6-dev-$arch-cross"
    fi
    [ -e $registry/register ] || mount -t binfmt_misc binfmt_misc $registry || cannot "no binfmt_misc"
    [ -e "$registry/$name" ] || cat "/usr/lib/binfmt.d/$name.conf" >$registry/register || cannot "nothing enters binfmt_misc"
    # F: the kernel holds the emulator open, so that it is found inside the chroot as well.
    grep -q '^flags:.*F' "$registry/$name" || cannot "$registry/$name is not ours: it has no flag F"
    grep -q '^enabled' "$registry/$name" || cannot "$registry/$name is disabled"
}

# A Debian of the release that this machine has, from where apt has its own.  Packages are unpacked by this machine and not
# configured: that would take minutes of emulation, and nothing here needs more of it than the names of users and hosts.
make_root() {
    local release mirror stamp package
    release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    stamp="$release $packages"
    [ "$(cat "$root/.made" 2>/dev/null)" != "$stamp" ] || return 0
    mirror=$(mirror_of "$release")
    if [ -z "$mirror" ]; then
        apt-get update -qq
        mirror=$(mirror_of "$release")
        [ -n "$mirror" ] || fail "apt has no Debian to make another one from"
    fi
    say "making a Debian in $root"
    rm -rf "$root"
    debootstrap --variant=minbase "--arch=$arch" "--include=$packages" --foreign "$release" "$root" "$mirror" >"$root.log" ||
        fail "debootstrap: see $root.log"
    for package in "$root"/var/cache/apt/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink -C "$root"
    done
    rm -f "$root"/var/cache/apt/archives/*.deb
    cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
    cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
    cp "$root/usr/share/libc-bin/nsswitch.conf" "$root/etc/nsswitch.conf"
    [ ! -L "$root/proc" ] || rm "$root/proc" # debootstrap in a container: a link to itself, seen from inside
    mkdir -p "$root/proc"
    echo "$stamp" >"$root/.made"
}

mirror_of() {
    # shellcheck disable=SC2016 # apt fills these in
    apt-get indextargets --format '$(ORIGIN) $(CODENAME) $(REPO_URI)' 'Created-By: Packages' |
        sed -n "s/^Debian $1 //p" | head -n 1
}

mount_all() {
    local folder
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=1777 tmpfs "$root/tmp" # what pytest and the tests leave there goes with the lane
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    # The cross compiler, where it is on this machine, and what it is linked with: Debian keeps the files of each
    # architecture apart, so they are in nobody's way.
    for folder in /lib64 "/lib/$(uname -m)-linux-gnu" "/usr/lib/$(uname -m)-linux-gnu" /usr/lib/gcc-cross "/usr/$triplet"; do
        mkdir -p "$root$folder"
        mount --bind -o ro "$folder" "$root$folder"
    done
    for folder in "/usr/bin/$triplet"-*; do
        touch "$root$folder"
        mount --bind "$(readlink -f "$folder")" "$root$folder"
    done
    ln -sf "$triplet-gcc" "$root/usr/bin/cc"
    cp /etc/hosts "$root/etc/hosts"
}

# What the tests need, wheels for the machine and Python inside, put there by the pip of this machine.
install_needed() {
    local needed version minor platforms=()
    version=$(inside 'python3 -c "import sys; print(\"%d.%d\" % sys.version_info[:2])"')
    needed=$("$host_python" - "$arch" <<'END'
import sys

try:
    import tomllib
except ImportError:  # 3.10
    import tomli as tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
# Not what judges sources, which are the same everywhere; iotcore apart; what Debian has is taken from there.
left_out = ("mypy", "ruff", "tomli", "iotcore") + (("cffi", "psutil") if sys.argv[1] == "armhf" else ())
wanted = project["dependencies"] + project["optional-dependencies"]["test"]
print("\n".join(["pip", "wheel", *(each for each in wanted if not each.startswith(left_out))]))
END
    )
    [ "$(cat "$root/needed/.made" 2>/dev/null)" != "$version $needed" ] || return 0
    say "fetching what the tests need"
    rm -rf "$root/needed"
    for minor in $(seq 36 -1 17); do platforms+=(--platform "manylinux_2_${minor}_$machine"); done
    platforms+=(--platform "manylinux2014_$machine" --platform "linux_$machine" --python-version "$version" --implementation cp)
    readarray -t requirements <<<"$needed"
    local fetch=("$host_python" -m pip install -q --no-compile --only-binary :all: --target "$root/needed" "${platforms[@]}")
    if [ "$arch" = armhf ]; then
        # cryptography depends on cffi, which is there already.
        "${fetch[@]}" --no-deps "${requirements[@]}" cryptography idna attrs outcome sortedcontainers iniconfig packaging \
            pluggy execnet pygments markdown-it-py mdurl
    else
        "${fetch[@]}" "${requirements[@]}"
    fi
    # rumqttd comes as a wheel or not at all: its tests say so.
    "${fetch[@]}" --upgrade --no-deps "$(grep -o 'iotcore[^"]*' pyproject.toml | head -n 1)" || say "no wheel of iotcore"
    # Found not by PYTHONPATH, which tests set for processes of theirs.  The last line is what an installed setuptools has there:
    # Debian's cffi wants distutils, of which Python's own warns.
    mkdir -p "$root/usr/local/lib/python$version/dist-packages"
    { printf '/src\n/needed\n' && cat "$root/needed/distutils-precedence.pth"; } \
        >"$root/usr/local/lib/python$version/dist-packages/cloudpubsub-tests.pth"
    find "$root/needed" -exec touch -d @0 {} + # or its Cython would think that what was made of its files is old
    echo "$version $needed" >"$root/needed/.made"
}

# Inside, with an environment of its own.
inside() {
    local name kept=()
    for name in CLOUDPUBSUB_KILL_ROUNDS CLOUDPUBSUB_CUT_SEEDS; do
        [ -z "${!name:-}" ] || kept+=("$name=${!name}")
    done
    [ "$size" != quick ] || kept+=(CI=true) # nothing is skipped because it lacks
    chroot "$root" /usr/bin/env -i HOME=/root LC_ALL=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        CC="$triplet-gcc" TESTS_EMULATED=1 "${kept[@]}" \
        /bin/bash -euo pipefail -c "cd /src && $1" bash "${@:2}"
}

# What a user gets.  The archive holds no C that Cython made: that is made inside.
wheel() {
    local work=$root/src/build/wheel
    rm -rf "$work" && mkdir -p "$work"
    say "making the source archive"
    tests/wheel.sh "$host_python" "build/wheel-$arch" sdist
    cp "build/wheel-$arch"/*.tar.gz "$work"
    "$host_python" -m pip download -q --no-deps --dest "$work" "$(grep -o 'paho-mqtt>[^"]*' pyproject.toml)"
    say "building the wheel"
    inside 'cd build/wheel && python3 -m pip -q wheel --no-build-isolation --no-deps --no-cache-dir --wheel-dir . ./*.tar.gz'
    say "installing it with paho-mqtt, in an environment of its own"
    inside 'cd build/wheel && python3 -m venv --without-pip clean &&
        python3 -m pip -q --python clean/bin/python install --no-index --no-cache-dir --find-links . cloudpubsub'
    inside 'cd / && /src/build/wheel/clean/bin/python /src/tests/installed.py'
    ls -s --block-size=1 "$work"/*.whl | sed "s:$work/::"
}

cd "$here"
tools
make_root
mount_all
mkdir -p "$root/src"
install_needed

# The sources as they are here, new files included, and the C that Cython made of them; times are kept, so that only what
# changed is built again, and what is gone here goes there.
find "$root/src" -type f ! -path "$root/src/build/*" ! -name '*.so' ! -name '*.pyc' -delete
{ git ls-files -z --cached --others --exclude-standard | xargs -0 ls -d 2>/dev/null
    for name in cloudpubsub/*.pyx; do echo "${name%.pyx}.c"; done; } | tar -c --files-from=- | tar -x -C "$root/src"
if [ "$size" = wheel ]; then
    wheel
    say "passed"
    exit
fi

ln -sfn ../bench "$root/src/cloudpubsub/bench" # what an editable install would map

# shellcheck disable=SC2016 # expanded inside
say "$(inside 'echo "$(uname -m), $(python3 --version)"'), building"
inside 'python3 setup.py -q build_clib build_ext --inplace --parallel 2 egg_info' >"$root.build.log" 2>&1 || {
    cat "$root.build.log" >&2
    fail "the package was not built"
}
inside 'python3 -c "import cloudpubsub._spool as it; print(it.__file__)"'

# What one architecture wrote, the other reads.
golden=build/golden-$arch
rm -rf "${root:?}/src/$golden" && mkdir -p "$root/src/$golden/here" "$root/src/$golden/there"
CLOUDPUBSUB_GOLDEN=$root/src/$golden/here PYTHONPATH=. "$host_python" tests/data/make_golden.py
inside "CLOUDPUBSUB_GOLDEN=$golden/there python3 tests/data/make_golden.py"
say "reads what $(uname -m) wrote"
inside "CLOUDPUBSUB_GOLDEN=$golden/here python3 -m pytest -q -p no:cacheprovider --timeout=600 tests/test_golden.py"
say "$(uname -m) reads what it wrote"
CLOUDPUBSUB_GOLDEN=$root/src/$golden/there "$host_python" -m pytest -q -p no:cacheprovider --timeout=600 tests/test_golden.py

say "testing"
# shellcheck disable=SC2016 # expanded inside
inside './tests/arm/run.sh "$@"' "$size" "$@"
say "all passed"
