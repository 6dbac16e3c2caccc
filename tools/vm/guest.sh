#!/bin/sh
# PID 1 of the guest (there is no systemd): mount what a Linux system has, run the job on the second serial line, power off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mkdir -p /dev/pts /dev/shm /dev/hugepages
mount -t devpts none /dev/pts
mount -t tmpfs none /dev/shm
mount -t hugetlbfs none /dev/hugepages
mount -t tmpfs none /tmp
mount -t debugfs none /sys/kernel/debug
mount -t tracefs none /sys/kernel/tracing
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro ro-checkout /mnt/checkout
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none job /run/job/share
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none out /mnt/out
stty -F /dev/ttyS1 raw -echo
cd /mnt/checkout
setsid -c sh /run/job/command </dev/ttyS1 >/dev/ttyS1 2>&1
echo $? >/run/job/share/status
sync
exec busybox poweroff -f
