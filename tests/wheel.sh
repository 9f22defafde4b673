#!/bin/bash
# Source archive, wheel, clean environment: what a user gets, and a smoke test of it.  Needs PyPI, Python's venv, a compiler.
#
#   tests/wheel.sh PYTHON DIRECTORY [sdist]  the directory is emptied, and holds the archive and the wheel afterwards; sdist:
#                                            the archive alone
#
# The archive is made of the files that git knows, or of all that is there where there is no git; the wheel of the archive
# alone; and it is installed where nothing else is.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
rm -rf "$2"
mkdir -p "$2"
work=$(cd "$2" && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

mkdir "$work/source"
cd "$here"
if git rev-parse --git-dir >/dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard | xargs -0 ls -d 2>/dev/null | tar -c --files-from=- | tar -x -C "$work/source"
else
    tar -c --exclude=./build --exclude='./.*' --exclude='*.egg-info' --exclude='*.so' --exclude=__pycache__ . | tar -x -C "$work/source"
fi

"$python" -m venv "$work/builder"
"$work/builder/bin/python" -m pip install -q build
cd "$work/source"
"$work/builder/bin/python" -m build --sdist --outdir "$work" . >"$work/sdist.log" 2>&1 || { tail -n 30 "$work/sdist.log" >&2; exit 1; }
cd "$work"
rm -rf source
[ "${3:-}" != sdist ] || exit 0
"$work/builder/bin/python" -m pip wheel -q --no-deps --wheel-dir . ./*.tar.gz
"$python" -m venv "$work/clean"
"$work/clean/bin/python" -m pip install -q ./*.whl

cd /
"$work/clean/bin/python" "$here/tests/installed.py"
ls -s --block-size=1 "$work"/*.tar.gz "$work"/*.whl | sed "s:$work/::"
