"""Memory that a device looks at while we do: one aligned access each, in an order that the device sees.

* ``store32(&words[i], value)``: a doorbell or register. Everything written to memory before it (the commands) is
  visible to the device when the store arrives.
* ``load64(&words[i])``: a word that the device writes (the one with the phase bit). What is read from memory after it
  (the rest of the entry) is at least as new.

x86-64 keeps these orders by itself, so only the compiler is held; aarch64 takes ``dmb oshst`` and ``dmb oshld``, the
barriers of the kernel's ``dma_wmb`` and ``dma_rmb``. Compiled only: the functions are in ``mmio.pxd``. Interpreted, an
item of a ``memoryview`` is accessed by one memory copy of its size, and CPython reorders nothing (x86-64 only).
"""

from __future__ import annotations
