"""The test VM: a real Linux kernel with emulated IOMMUs and NVMe drives, booted in seconds, under QEMU without KVM.

    ./dmakit vm build                              make what a boot needs (once; kept under ~/.cache/dmakit/vm)
    ./dmakit vm run --iommu amd -- CMD ...         boot, run CMD in the guest, hand back its output and exit status
    ./dmakit vm shell                              boot and talk to a shell in the guest

Vocabulary
  part      something that is built once and kept: QEMU, the guest's root, a kernel. Its folder carries the digest of
            its recipe, so that a changed recipe makes a new folder and never a mixture (store.py).
  root      a Debian system unpacked in a folder; nothing is installed on the host (debian.py).
  core      this checkout's package, compiled for the guest's Python: a part as well, with the sources as its recipe.
  variant   the IOMMU of a boot and the kernel's parameters for it (machine.py).
  job       what one boot is to do: a command, its environment, the folder it may write to (guest.py).

Modules, from the ground up: store → debian → parts → kernels → machine → guest → run → __main__. Building needs root
(mmdebstrap, chroot); booting does not. Where a step fails, the log that it names tells why.
"""
