#!/usr/bin/dash
# The first process of a guest. Runs /command on the first serial line and brings back what came of it:
# `exit` and `files` in an archive on the disk. Without that archive, the guest has failed.
# Its shell is not busybox, which takes its own applets for the programs of the same names.
set -e
export PATH=/usr/sbin:/usr/bin
mkdir -p /proc /sys /dev /run /tmp /root /results/files
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for place in /dev/shm /run /tmp; do mount -t tmpfs tmpfs "$place"; done
exec </dev/ttyS0 >/dev/ttyS0 2>&1
# Kernels of nodes have their settings of connection tracking from the start.
modprobe -a virtio_pci virtio_blk nf_conntrack
# With the first hook of netfilter that comes, and with the last that goes, the kernel changes its own code on the
# way of packets. A core that is emulated may never get past such a place while another one does that, and is
# stuck there for ever. So there are always some, in a namespace that nothing is tested in.
for family in ip ip6; do
    nft add table "$family" always
    for hook in prerouting input forward output postrouting; do
        nft add chain "$family" always "$hook" "{ type filter hook $hook priority 0; }"
    done
done
hostname guest
ip link set lo up
# As many open files as on other machines.
ulimit -n 65536
export HOME=/root LOCKSTEP_GUEST=1 LOCKSTEP_RESULTS=/results/files
status=0
case " $(cat /proc/cmdline) " in
*" lockstep.shell "*)
    setsid -c sh /command || status=$?
    ;;
*)
    # Text as it is: the terminal at the other end makes lines of it.
    stty -F /dev/ttyS0 raw -echo
    sh /command </dev/null || status=$?
    ;;
esac
echo "$status" >/results/exit
tar -c -f /dev/vda -C /results exit files || echo "the guest's files are larger than its disk"
sync
# Setting anything waits until all is said.
stty -F /dev/ttyS0 sane
reboot -f
