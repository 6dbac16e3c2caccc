#!/bin/sh
# Run tests on a core compiled with AddressSanitizer and UndefinedBehaviorSanitizer; a report of either is a failure.
#
#   tools/sanitized.sh [PYTEST ARGUMENT …]        (needs gcc with libasan and libubsan; five minutes of compiling)
#
# The arguments default to the suites that are hardest on memory: tests/hostile tests/pair. It works in a copy of the
# tracked files with the checkout's .venv, so that the checkout's own build stays as it is.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
python=$here/.venv/bin/python
[ -x "$python" ] || { echo "sanitized: no $python; make it with: ./dmakit build" >&2; exit 2; }
for library in libasan.so libubsan.so; do
    path=$(gcc -print-file-name=$library)
    [ "$path" != $library ] || { echo "sanitized: gcc has no $library here" >&2; exit 2; }
    preload="${preload:+$preload }$path"
done
[ $# -gt 0 ] || set -- tests/hostile tests/pair

work=$(mktemp -d "${TMPDIR:-/tmp}/dmakit-sanitized.XXXXXX")
trap 'rm -rf "$work"' EXIT INT TERM
git -C "$here" ls-files -z | tar -C "$here" --null -T - -cf - | tar -C "$work" -xf -
cd "$work"
echo "sanitized: compiling in $work" >&2
# Alignment: x86 reads words anywhere, and a mapping of user memory begins where it begins.
flags="-fsanitize=address,undefined -fno-sanitize=alignment -fno-omit-frame-pointer"
DMAKIT_BUILD=compiled CC=gcc CFLAGS=$flags LDFLAGS=$flags "$python" setup.py -q build_ext --inplace
status=0
LD_PRELOAD=$preload PYTHONMALLOC=malloc DMAKIT_CORE=compiled PYTHONPATH=src:. \
    ASAN_OPTIONS=detect_leaks=0:log_path=$work/report UBSAN_OPTIONS=print_stacktrace=1:log_path=$work/report \
    "$python" -m pytest -p no:cacheprovider "$@" || status=$?
for report in "$work"/report.*; do
    [ -e "$report" ] || continue
    cat "$report" >&2
    status=1
done
exit $status
