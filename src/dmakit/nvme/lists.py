"""The list blocks of requests: what writers of PRPs and of SGLs have in common.

A request's list blocks are a *chain*, and a chain is a number: 0 for none, else the first block's number in its pool,
plus one, times two, plus one when it is a block of the large pool. All blocks of a chain are of the same pool.
So 64 bits are all that a driver keeps to give a request's lists back, and an array of them is enough for a batch.

``ListWriter`` takes blocks for the request being written; its subclasses write entries there (``nvme.prp``,
``nvme.sgl``). Internals run without the GIL; they return 0 or −errno: −EIO for ranges that cannot be described,
−ENOMEM without memory (``_lacking`` has the exception), −EINVAL for bounds or a chain that are none.
"""

from __future__ import annotations

import cython

from dmakit.errors import DmakitError, MisuseError
from dmakit.iova.arguments import apart, within, words
from dmakit.nvme.pool import Block

if not cython.compiled:
    from dmakit.consts import EINVAL, ENOMEM
    from dmakit.nvme.pool import DescriptorPool

_MOST = (1 << 63) - 1


@cython.cclass
class ListWriter:
    """Takes list blocks from two pools; ``chain`` is that of the request being written (it belongs to its owner)."""

    kind = ""

    def __init__(self, small: DescriptorPool, large: DescriptorPool) -> None:
        self.small = small
        self.large = large
        self._restart()

    # Internals ----------------------------------------------------------------------------------------------

    def _restart(self) -> cython.void:
        """No list block is taken yet."""
        self.chain = 0
        self.tail = -1
        self.addr = 0
        self.lacks_large = False

    def _first(self, large: cython.bint) -> cython.int:
        """Take the first list block: ``addr`` and ``words`` are its own."""
        block: cython.Py_ssize_t = self.large._alloc() if large else self.small._alloc()
        if block < 0:
            self.lacks_large = large
            return -ENOMEM
        self.chain = (block + 1) << 1
        if large:
            self.chain += 1
        self._at(block, large)
        return 0

    def _further(self) -> cython.int:
        """Take another large block, which follows the last."""
        block: cython.Py_ssize_t = self.large._alloc()
        if block < 0:
            self.lacks_large = True
            return -ENOMEM
        self.large.following[self.tail] = block
        self._at(block, True)
        return 0

    def _at(self, block: cython.Py_ssize_t, large: cython.bint) -> cython.void:
        """Write to ``block`` from now on."""
        self.tail = block
        self.addr = self.large.addrs[block] if large else self.small.addrs[block]
        if cython.compiled:
            self.words = cython.cast(
                "unsigned long long*", self.large.places[block] if large else self.small.places[block]
            )
        else:
            self.words = self.large._view(block) if large else self.small._view(block)

    def _lacking(self) -> DmakitError:
        """Why there was no block."""
        return self.large._lacking() if self.lacks_large else self.small._lacking()

    def _drop(self, chain: cython.ulonglong) -> cython.int:
        """Give a chain back; −EINVAL when it is none."""
        block: cython.Py_ssize_t = (chain >> 1) - 1
        if chain < 2:
            return -EINVAL if chain else 0
        return self.large._free_chain(block) if chain & 1 else self.small._free_chain(block)

    def _build(
        self, addrs: memoryview[int], lengths: memoryview[int], first: cython.Py_ssize_t, end: cython.Py_ssize_t
    ) -> cython.int:
        """Write the request that has the ranges ``first`` to ``end`` − 1; when that fails its blocks are ``chain``."""
        return -EINVAL

    def _word(self, high: cython.bint) -> cython.ulonglong:
        """The command's first or second word for the request just written."""
        return 0

    def _build_run(
        self,
        addrs: memoryview[int],
        lengths: memoryview[int],
        bounds: memoryview[int],
        pointers: memoryview[int],
        chains: memoryview[int],
        count: cython.Py_ssize_t,
    ) -> cython.Py_ssize_t:
        """Write ``count`` requests; how many could be, and ``failed`` is why the next one could not."""
        i: cython.Py_ssize_t = 0
        ranges: cython.ulonglong = min(len(addrs), len(lengths))
        with cython.nogil:
            while i < count:
                if bounds[i + 1] < bounds[i] or bounds[i + 1] > ranges:
                    self.failed = -EINVAL
                    break
                self.failed = self._build(addrs, lengths, bounds[i], bounds[i + 1])
                if self.failed != 0:
                    self._drop(self.chain)
                    break
                pointers[2 * i] = self._word(False)
                pointers[2 * i + 1] = self._word(True)
                chains[i] = self.chain
                i += 1
        return i

    def _drop_run(self, chains: memoryview[int], count: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """Give ``count`` chains back, and zero them; the first that is none, ``count`` when all are."""
        i: cython.Py_ssize_t = 0
        wrong: cython.Py_ssize_t = count
        with cython.nogil:
            while i < count:
                if self._drop(chains[i]) != 0 and wrong == count:
                    wrong = i
                chains[i] = 0
                i += 1
        return wrong

    def _kept(self) -> tuple[int, ...]:
        """Where the request being written stands."""
        return self.chain, self.tail

    def _restore(self, kept: tuple[int, ...]) -> None:
        """Go on with the request that ``_kept`` saw."""
        self.chain, self.tail = kept
        self._reopened()

    def _reopened(self) -> bool:
        """Find the block being written again; False when it was given back meanwhile."""
        large = bool(self.chain & 1)
        if self.chain:
            if not (self.large._held(self.tail) if large else self.small._held(self.tail)):
                return False
            self._at(self.tail, large)
        return True

    def _writing(self) -> None:
        """MisuseError when the list block being written was given back."""
        if not self._reopened():
            raise MisuseError(f"{self.kind}: the list block of the request being written is not out any more")

    def _refused(self, at: int) -> MisuseError:
        """Why request ``at`` of a batch is refused."""
        return MisuseError(f"request {at}")

    # Public -------------------------------------------------------------------------------------------------

    def build_batch(self, addrs: object, lengths: object, bounds: object, pointers: object, chains: object) -> None:
        """The descriptors of many requests, without a Python object for any of them.

        Buffers of 64-bit words: ``addrs`` and ``lengths`` hold all ranges, request i has those from ``bounds[i]`` to
        ``bounds[i+1]`` − 1; ``pointers`` receives the two words of its command at 2i and 2i + 1, ``chains`` at i the
        list blocks that ``drop_batch`` gives back; neither may overlap another array. MisuseError (EIO for a request
        that cannot be described) and ExhaustedError give every block of the batch back and leave the writer as it was.
        """
        places, sizes, edges = words("addrs", addrs), words("lengths", lengths), words("bounds", bounds)
        found, lists = words("pointers", pointers, writable=True), words("chains", chains, writable=True)
        count = len(edges) - 1
        if count < 0:
            raise MisuseError("bounds: has 0 words, at least 1 are needed")
        if len(found) < 2 * count:
            raise MisuseError(f"pointers: has {len(found)} words, at least {2 * count} are needed")
        if len(lists) < count:
            raise MisuseError(f"chains: has {len(lists)} words, at least {count} are needed")
        apart("pointers", found, addrs=places, lengths=sizes, bounds=edges, chains=lists)
        apart("chains", lists, addrs=places, lengths=sizes, bounds=edges)
        with self.small.ledger.turn:
            before = self._kept()
            done = int(self._build_run(places, sizes, edges, found, lists, count))
            if done < count:
                error = self._lacking() if self.failed == -ENOMEM else self._refused(done)
                self._drop_run(lists, done)
                self._restore(before)
                raise error

    def drop(self, chain: int) -> None:
        """Give the list blocks of one request back; MisuseError for a chain that is not out."""
        if self._drop(within("chain", chain, 0, _MOST)) != 0:
            raise MisuseError(f"chain={chain}: no list blocks that are out")

    def drop_batch(self, chains: object) -> None:
        """Give back the list blocks of ``build_batch``; ``chains`` becomes zeros.

        MisuseError names the first item that is no list that is out; the others are given back.
        """
        lists = words("chains", chains, writable=True)
        with self.small.ledger.turn:
            wrong = int(self._drop_run(lists, len(lists)))
        if wrong < len(lists):
            raise MisuseError(f"drop_batch: item {wrong}: no list blocks that are out")

    def blocks(self, chain: int) -> list[Block]:
        """Views of the list blocks of one request, in chain order."""
        number = within("chain", chain, 0, _MOST)
        pool = self.large if number & 1 else self.small
        return pool.chain((number >> 1) - 1) if number else []
