#!/bin/busybox sh
# PID 1 from the initramfs: load the modules that mount the root, hand over the other modules and the job, go there.
/bin/busybox mount -t devtmpfs none /dev
while read -r module; do /bin/busybox insmod "$module"; done </early
tries=0
while [ ! -e /dev/vdb ] && [ $tries -lt 200 ]; do /bin/busybox usleep 20000; tries=$((tries + 1)); done
/bin/busybox mount -t ext4 /dev/vda /sysroot || exec /bin/busybox poweroff -f
/bin/busybox mount -t ext4 -o ro /dev/vdb /sysroot/opt/dmakit
/bin/busybox mount -t tmpfs none /sysroot/run
/bin/busybox mount -t tmpfs none /sysroot/usr/lib/modules
/bin/busybox cp -a /lib/modules/. /sysroot/usr/lib/modules/
/bin/busybox cp -a /job /sysroot/run/job
/bin/busybox umount /dev
exec /bin/busybox switch_root /sysroot /run/job/guest
