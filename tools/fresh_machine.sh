#!/bin/sh
# Run the README's commands on a bare machine: a minimal Debian in a chroot, with nothing of the host's Python.
#
#   tools/fresh_machine.sh SUITE [--compiler] [COMMAND …]      (as root; needs mmdebstrap)
#
# SUITE is bookworm (12), trixie (13) or another suite of the mirror. Without --compiler there is no C compiler.
# COMMAND defaults to `./dmakit compare`. The base system is cached under ~/.cache/dmakit.
set -eu

suite=$1; shift
packages=python3,ca-certificates
label=plain
if [ "${1:-}" = --compiler ]; then packages=$packages,gcc,libc6-dev,python3-dev; label=compiler; shift; fi
[ $# -gt 0 ] || set -- ./dmakit compare

cache=${XDG_CACHE_HOME:-$HOME/.cache}/dmakit/fresh
base=$cache/$suite-$label.tar
mkdir -p "$cache"
if [ ! -e "$base" ]; then
    mmdebstrap --quiet --variant=minbase --include="$packages" "$suite" "$base.part.tar" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
    mv "$base.part.tar" "$base"
fi
root=$(mktemp -d "${TMPDIR:-/tmp}/dmakit-fresh.XXXXXX")
trap 'umount "$root/proc" 2>/dev/null || true; rm -rf "$root"' EXIT INT TERM
tar -xf "$base" -C "$root" --exclude='./dev/*'
mkdir -p "$root/dev" "$root/proc" "$root/src" "$root/etc/ssl/certs"
mknod -m 666 "$root/dev/null" c 1 3 && mknod -m 666 "$root/dev/zero" c 1 5
mknod -m 666 "$root/dev/full" c 1 7 && mknod -m 666 "$root/dev/urandom" c 1 9
mkdir -m 1777 "$root/dev/shm"
mount -t proc proc "$root/proc"
cp /etc/resolv.conf /etc/hosts "$root/etc/" 2>/dev/null || true
[ ! -e /etc/ssl/certs/ca-certificates.crt ] || cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
git -C "$(dirname "$0")/.." archive HEAD | tar -x -C "$root/src"
# An ordinary user, as most people are; the environment is nearly empty on purpose.
chroot "$root" useradd -m -s /bin/sh user
chown -R --reference="$root/home/user" "$root/src"
exec 3>&1
chroot --userspec=user:user "$root" /usr/bin/env -i HOME=/home/user PATH=/usr/local/bin:/usr/bin:/bin CI="${FRESH_CI:-}" \
    ${HTTPS_PROXY:+HTTPS_PROXY="$HTTPS_PROXY"} sh -c 'cd /src && exec "$@"' sh "$@"
