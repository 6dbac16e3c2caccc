"""A host kernel with VFIO, in the test process: devices, groups, type1, iommufd, sysfs.

``FakeHost`` is a ``platform.linux.kernel.Kernel``: machines made with ``kernel=FakeHost(…)`` run every line of
``platform/linux`` on any host. Memory, memory files and eventfds are the real ones, so devices (``devices``) reach the
bytes that the code under test mapped, through page tables that are plain dicts (``pages``). The rules and errnos are
those of the kernel's interface description, written down again here.
"""
