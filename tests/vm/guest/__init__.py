"""Tests that run inside the test VM, as root, on compiled code. Sizes stay small unless ``DMAKIT_VM_FULL`` is 1."""
