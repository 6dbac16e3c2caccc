"""Rules of the bus between a driver and a software function: each, when broken, turns a test red."""

from __future__ import annotations

from tests.mutations.harness import Mutation

FUNCTIONS = ("tests/pci/test_functions.py", "-k", "soft")
ACCESSES = ("tests/pci/test_accesses.py", "-k", "soft")
OWN = ("tests/pci/test_soft_functions.py",)
HOSTILE = ("tests/pci/test_hostile_drivers.py",)
FUNCTION = "src/dmakit/platform/soft/function.py"
CONFIG = "src/dmakit/platform/soft/config.py"
EDU = "src/dmakit/platform/soft/edu.py"

MUTATIONS = (
    Mutation(
        "memory-without-bus-mastering",
        FUNCTION,
        "if self.port is None or not self.present or not self.config.masters:",
        "if self.port is None or not self.present:",
        FUNCTIONS,
        always=True,
    ),
    Mutation(
        "messages-without-bus-mastering",
        FUNCTION,
        "        if self.present and self.config.masters:\n            self._add(kind, vector)",
        "        if self.present:\n            self._add(kind, vector)",
        FUNCTIONS,
    ),
    Mutation(
        "line-does-not-mask-itself",
        FUNCTION,
        'self._masked = self._add("intx", 0)',
        'self._add("intx", 0)',
        FUNCTIONS,
    ),
    Mutation(
        "line-is-never-cut-off",
        FUNCTION,
        " and not self._masked and not self.config.line_disabled:",
        " and not self._masked:",
        FUNCTIONS,
    ),
    Mutation(
        "reset-keeps-the-line",
        FUNCTION,
        "        self.set_line(False)\n        self.model.reset()",
        "        self.model.reset()",
        OWN,
    ),
    Mutation(
        "closing-keeps-eventfds",
        FUNCTION,
        "        self.port = None\n        self._eventfds = {}\n",
        "        self.port = None\n",
        OWN,
    ),
    Mutation(
        "command-bits-stay", CONFIG, "self.bytes[at] & ~mask | byte & mask", "self.bytes[at] | byte & mask", FUNCTIONS
    ),
    Mutation("everything-is-writable", CONFIG, "mask = self.writable[at]", "mask = 0xFF", HOSTILE),
    Mutation("flr-is-not-heard", CONFIG, "return flr > 1 and", "return flr < 1 and", OWN),
    Mutation("edu-reads-past-its-memory", EDU, "if at >= 0 and end <= BUFFER_SIZE:", "if at >= 0:", HOSTILE),
    Mutation(
        "a-blocked-read-keeps-what-was-there",
        EDU,
        "self.buffer[at:end] = bytes(self.count)  # what a blocked read brings",
        "pass",
        ACCESSES,
    ),
    Mutation("edu-keeps-its-line-high", EDU, "if not self.pending:", "if self.pending:", FUNCTIONS),
)
