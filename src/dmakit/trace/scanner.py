"""The scanner: ftrace text to typed rows, one line at a time, no Python object per line when compiled.

A line of ``trace``, ``trace_pipe`` or ``trace-cmd report`` is ``COMM-PID (TGID) [CPU] FLAGS STAMP: event: payload``.
COMM may hold blanks, dashes, brackets and colons; TGID and FLAGS may be missing; STAMP is a count (``trace_clock``
counter) or seconds with 3 to 9 decimals, kept as nanoseconds. The header is found from the left by the first
``-PID [CPU]``; the payload is read by the declarations in ``events.py``, which ``pattern.Pattern`` flattens into
integers.

Every line ends up in exactly one count: ``records`` (understood events, among them ``LOST`` markers), ``others`` (well
formed, an event we do not read), ``notes`` (blank lines, comments, the tools' own remarks) or ``malformed``.

Where the rows go, and how they become columns, is in ``rows.py``.
"""

# ruff: noqa: RET505 (Cython drops the branch that is not compiled only when it stands in an else)

from __future__ import annotations

import re
from array import array

import cython

from dmakit.trace.events import ABSENT
from dmakit.trace.pattern import Pattern
from dmakit.trace.storage import longs

if cython.compiled:
    from cython.cimports.libc.string import memchr
else:
    from dmakit.consts import (
        HOW_HEX,
        HOW_LIST,
        HOW_TEXT,
        LINE_MALFORMED,
        LINE_NOTE,
        LINE_OTHER,
        LINE_RECORD,
        SALT_ENTRY,
        SALT_RETURN,
        SCAN_HEAD,
        SCAN_LOST,
        SCAN_STEP,
        SCAN_TABLE,
    )
    from dmakit.trace.rows import Rows

_MASK = (1 << 64) - 1  # interpreted code only
_DECIMAL = re.compile(rb"\d+")
_HEXADECIMAL = re.compile(rb"[0-9a-fA-F]+")


@cython.cclass
class Scanner(Rows):
    """Scans chunks of whole lines; after ``scan``, ``block(kind)`` has the columns of each kind until the next call."""

    def __init__(self) -> None:
        pattern = Pattern()
        Rows.__init__(self, pattern)
        self.anchor_texts = pattern.anchors
        self.anchors = b"".join(pattern.anchors) or b"\0"
        self.steps = memoryview(pattern.steps)
        self.first_step = memoryview(pattern.first_step)
        self.table_hash = longs(SCAN_TABLE)
        self.table_kind = memoryview(array("q", [-1] * SCAN_TABLE))
        self.absent = ABSENT
        self.seconds = False
        self.stamp = 0  # that of the line before, for a marker of lost events; a trace may begin with one
        self._prepare()
        for name, kind, salt in pattern.names():
            self._enter(name, kind, salt)

    def _prepare(self) -> None:
        """What only compiled code needs: the anchors' bytes, the value of each digit."""
        if cython.compiled:
            self.a = cython.cast(cython.p_uchar, cython.address(self.anchors[0]))
            byte: cython.int
            for byte in range(256):
                self.digit[byte] = int(chr(byte), 16) if chr(byte) in "0123456789abcdefABCDEF" else 255

    def _enter(self, name: bytes, kind: int, salt: int) -> None:
        """Put a name into the table; the first declaration of a name wins."""
        self._read(name)
        hashed = self._hash(0, len(name)) ^ salt
        slot = hashed & (SCAN_TABLE - 1)
        while self.table_kind[slot] >= 0 and self.table_hash[slot] != hashed:
            slot = (slot + 1) & (SCAN_TABLE - 1)
        if self.table_kind[slot] < 0:
            self.table_hash[slot] = hashed
            self.table_kind[slot] = kind

    def scan(self, text: bytes, first_line: int = 1) -> int:
        """Scan whole lines; ``first_line`` numbers the first. Returns the number of lines."""
        size: cython.Py_ssize_t = len(text)
        number: cython.ulonglong = first_line
        self.records = self.top = self.pooled = self.others = self.notes = self.malformed = 0
        if text:
            self._read(text)
            with cython.nogil:
                number = self._scan(size, number)
                self._to_columns()
        return number - first_line

    # Finding and reading -----------------------------------------------------------------------------

    def _byte(self, byte: cython.int, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """The place of ``byte`` in [begin, end), or -1."""
        if cython.compiled:
            found: cython.p_uchar
            if begin >= end:
                return -1
            found = cython.cast(cython.p_uchar, memchr(self.p + begin, byte, end - begin))
            return -1 if found == cython.NULL else found - self.p
        else:
            return self.text.find(byte, begin, end)

    def _anchor(self, step: cython.Py_ssize_t, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """The place after the anchor text of ``step`` in [begin, end), or -1."""
        if cython.compiled:
            k: cython.Py_ssize_t
            anchor: cython.p_uchar = self.a + self.steps[step * SCAN_STEP + 3]
            size: cython.Py_ssize_t = self.steps[step * SCAN_STEP + 4]
            while begin + size <= end:
                k = 0
                while k < size and self.p[begin + k] == anchor[k]:
                    k += 1
                if k == size:
                    return begin + size
                begin = self._byte(anchor[0], begin + 1, end)
                if begin < 0:
                    break
            return -1
        else:
            text = self.anchor_texts[step]
            place = self.text.find(text, begin, end)
            return place if place < 0 else place + len(text)

    def _digits(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t, base: cython.int) -> cython.ulonglong:
        """The digits at ``begin``; sets ``at`` behind them and ``wrong`` when there are none or over 64 bits."""
        if cython.compiled:
            value: cython.ulonglong = 0
            limit: cython.ulonglong = ~cython.cast(cython.ulonglong, 0)
            full: cython.ulonglong = limit >> 4 if base == 16 else limit // 10
            digit: cython.int
            at: cython.Py_ssize_t = begin
            p: cython.p_uchar = self.p
            self.wrong = False
            while at < end:
                digit = self.digit[p[at]]
                if digit >= base:
                    break
                if value >= full and value > (limit - digit) // base:
                    self.wrong = True
                value = (value << 4) + digit if base == 16 else value * 10 + digit
                at += 1
            if at == begin:
                self.wrong = True
            self.at = at
            return value
        else:
            match = (_HEXADECIMAL if base == 16 else _DECIMAL).match(self.text, begin, end)
            if match is None:
                self.at, self.wrong = begin, True
                return 0
            self.at = match.end()
            value = int(match[0], base)
            self.wrong = value > _MASK
            return value & _MASK

    def _number(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t, base: cython.int) -> cython.ulonglong:
        """A number: ``0x`` makes it hexadecimal, ``-`` gives the two's complement."""
        value: cython.ulonglong
        if begin + 1 < end:
            if self.p[begin] == 48 and self.p[begin + 1] == 120:
                return self._digits(begin + 2, end, 16)
            if self.p[begin] == 45:
                value = self._digits(begin + 1, end, base)
                if cython.compiled:
                    return ~value + 1
                else:
                    return -value & _MASK
        return self._digits(begin, end, base)

    def _skip(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """The first place that is not a blank."""
        while begin < end and self.p[begin] <= 32:
            begin += 1
        return begin

    def _word(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """The end of the word at ``begin``: a blank, quote, bracket or the end of the line."""
        byte: cython.int
        while begin < end:
            byte = self.p[begin]
            if byte <= 32 or byte == 34 or byte == 91 or byte == 93:
                break
            begin += 1
        return begin

    # The header -----------------------------------------------------------------------------------------

    def _task(self, begin: cython.Py_ssize_t, bracket: cython.Py_ssize_t) -> cython.bint:
        """Whether ``-PID`` (and an optional ``(TGID)``) ends right before ``bracket``; sets ``pid``."""
        at: cython.Py_ssize_t = bracket - 1
        last: cython.Py_ssize_t
        while at > begin and self.p[at] == 32:
            at -= 1
        if at > begin and self.p[at] == 41:
            while at > begin and self.p[at] != 40:
                at -= 1
            at -= 1
            while at > begin and self.p[at] == 32:
                at -= 1
        last = at
        while at > begin and 48 <= self.p[at] <= 57:
            at -= 1
        if at == last or at < begin or self.p[at] != 45:
            return False
        self.pid = self._digits(at + 1, last + 1, 10)
        return not self.wrong

    def _where(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """Find ``-PID [CPU]``; sets ``pid`` and ``cpu``; returns the place behind ``]`` or -1."""
        close: cython.Py_ssize_t
        bracket: cython.Py_ssize_t = self._byte(91, begin, end)
        while bracket >= 0:
            self.cpu = self._digits(bracket + 1, end, 10)
            if not self.wrong and self.at + 1 < end and self.p[self.at] == 93 and self.p[self.at + 1] <= 32:
                close = self.at
                if self._task(begin, bracket):
                    return close + 1
            bracket = self._byte(91, bracket + 1, end)
        return -1

    def _stamp(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.bint:
        """Read ``123:`` or ``1.000456:`` ending at ``end``; sets ``stamp`` (nanoseconds for seconds)."""
        whole: cython.ulonglong = self._digits(begin, end, 10)
        part: cython.ulonglong
        scale: cython.ulonglong
        places: cython.Py_ssize_t
        if self.wrong:
            return False
        if self.at == end:
            self.stamp = whole
            return True
        if self.p[self.at] != 46:
            return False
        places = end - self.at - 1
        part = self._digits(self.at + 1, end, 10)
        if self.wrong or self.at != end or places > 9 or whole >> 33:
            return False
        scale = 1
        while places < 9:
            scale *= 10
            places += 1
        self.seconds = True
        self.stamp = whole * 1000000000 + part * scale
        return True

    def _when(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """Read ``[FLAGS] STAMP:``; sets ``context`` and ``stamp``; returns the place behind the colon or -1."""
        tries: cython.int = 0
        stop: cython.Py_ssize_t
        self.context = 0
        while tries < 2:
            begin = self._skip(begin, end)
            stop = self._byte(32, begin, end)
            if stop < 0:
                return -1
            if self.p[stop - 1] == 58 and self._stamp(begin, stop - 1):
                return stop
            if stop - begin >= 3:  # irqs-off, need-resched, hardirq/softirq, preempt-depth, …
                self.context = self.p[begin + 2]
            begin = stop
            tries += 1
        return -1

    # The payload ------------------------------------------------------------------------------------------

    def _lookup(self, name: cython.ulonglong) -> cython.longlong:
        slot: cython.Py_ssize_t = name & (SCAN_TABLE - 1)
        while self.table_kind[slot] >= 0:
            if self.table_hash[slot] == name:
                return self.table_kind[slot]
            slot = (slot + 1) & (SCAN_TABLE - 1)
        return -1

    def _kind(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.longlong:
        """The kind of ``name: payload`` (or ``system:name: payload``), -1 unknown, -2 malformed; sets ``payload``."""
        kind: cython.longlong
        colon: cython.Py_ssize_t = self._byte(58, begin, end)
        if colon > begin and colon + 1 < end and self.p[colon + 1] > 32:
            begin = colon + 1
            colon = self._byte(58, begin, end)
        if colon <= begin or self._byte(32, begin, colon) >= 0:
            return -2
        self.payload = self._skip(colon + 1, end)
        kind = self._lookup(self._hash(begin, colon))
        if kind < 0 and self.payload < end and self.p[self.payload] == 40:
            return self._by_symbol(self.payload, end)
        return kind

    def _by_symbol(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.longlong:
        """The kind of a dynamic event from ``(symbol+0x4/0x3e0)`` or ``(caller+… <- symbol)``, -1 unknown."""
        close: cython.Py_ssize_t = self._byte(41, begin, end)
        arrow: cython.Py_ssize_t
        stop: cython.Py_ssize_t
        if close < 0:
            return -1
        arrow = self._byte(60, begin, close)
        if arrow >= 0:
            return self._lookup(self._hash(arrow + 3, close) ^ SALT_RETURN)
        stop = self._byte(43, begin, close)
        return -1 if stop < 0 else self._lookup(self._hash(begin + 1, stop) ^ SALT_ENTRY)

    def _list(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t, slot: cython.Py_ssize_t) -> cython.bint:
        """Read ``{0x1,0x2}`` into the pool; the row keeps start and count."""
        first: cython.Py_ssize_t = self.pooled
        if begin >= end or self.p[begin] != 123:
            return False
        begin += 1
        while begin < end and self.p[begin] != 125:
            if self.pooled == self.pool_room:
                self._grow_pool()
            self.pool[self.pooled] = self._number(begin, end, 10)
            if self.wrong:
                return False
            self.pooled += 1
            begin = self.at
            if begin < end and self.p[begin] == 44:
                begin += 1
        self.at = begin
        self.rows[slot] = first
        self.rows[slot + 1] = self.pooled - first
        return begin < end

    def _field(
        self, step: cython.Py_ssize_t, begin: cython.Py_ssize_t, end: cython.Py_ssize_t, slot: cython.Py_ssize_t
    ) -> cython.bint:
        """Read one value at ``begin`` into ``slot``; sets ``at`` behind it."""
        how: cython.longlong = self.steps[step * SCAN_STEP]
        stop: cython.Py_ssize_t
        if how <= HOW_HEX:
            self.rows[slot] = self._number(begin, end, 16 if how == HOW_HEX else 10)
            return not self.wrong
        if how == HOW_LIST:
            return self._list(begin, end, slot)
        if how == HOW_TEXT:
            self.rows[slot] = self._name(begin, end)
            self.at = end
            return True
        if begin < end and self.p[begin] == 34:
            begin += 1
        stop = self._word(begin, end)
        self.rows[slot] = self._name(begin, stop)
        self.at = stop
        return True

    def _fields(self, kind: cython.longlong, end: cython.Py_ssize_t) -> cython.bint:
        """Read the payload by the steps of ``kind`` into the next row; False when a needed field is not there."""
        step: cython.Py_ssize_t
        place: cython.Py_ssize_t
        slot: cython.Py_ssize_t
        at: cython.Py_ssize_t = self.payload
        for step in range(self.first_step[kind], self.first_step[kind + 1]):
            slot = self.top + SCAN_HEAD + self.steps[step * SCAN_STEP + 2]
            place = self._anchor(step, at, end)
            if place < 0:  # other kernels may print the fields in another order
                place = self._anchor(step, self.payload - 1, end)
            if place < 0:
                if not self.steps[step * SCAN_STEP + 1]:
                    return False
                self.rows[slot] = self.absent
                if self.steps[step * SCAN_STEP] == HOW_LIST:
                    self.rows[slot] = self.rows[slot + 1] = 0
                continue
            if not self._field(step, place, end, slot):
                return False
            at = self.at
        return True

    # Lines ------------------------------------------------------------------------------------------------

    def _put(self, kind: cython.longlong, number: cython.ulonglong) -> cython.void:
        """Complete the row at ``top``."""
        row: cython.Py_ssize_t = self.top
        self.rows[row] = self.records
        self.rows[row + 1] = number
        self.rows[row + 2] = self.stamp
        self.rows[row + 3] = self.cpu
        self.rows[row + 4] = self.pid
        self.rows[row + 5] = self.context
        self.kinds[self.records] = kind
        self.records += 1
        self.top = row + SCAN_HEAD + self.width[kind]

    def _lost(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t, number: cython.ulonglong) -> cython.int:
        """``CPU:1 [LOST 123 EVENTS]`` or ``CPU:1 [123 EVENTS DROPPED]`` behind ``CPU:``."""
        bracket: cython.Py_ssize_t
        digit: cython.Py_ssize_t
        self.cpu = self._digits(begin, end, 10)
        bracket = self._byte(91, begin, end)
        if self.wrong or bracket < 0:
            return LINE_MALFORMED
        digit = bracket
        while digit < end and not 48 <= self.p[digit] <= 57:
            digit += 1
        self.rows[self.top + SCAN_HEAD] = self._digits(digit, end, 10) if digit < end else self.absent
        self.pid = 0
        self.context = 0
        self._put(SCAN_LOST, number)
        return LINE_RECORD

    def _line(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t, number: cython.ulonglong) -> cython.int:
        """Scan one line; returns which count it belongs to."""
        at: cython.Py_ssize_t
        kind: cython.longlong
        begin = self._skip(begin, end)
        while end > begin and self.p[end - 1] <= 32:
            end -= 1
        if begin == end or self.p[begin] == 35:
            return LINE_NOTE
        if self.p[begin] == 67 and end - begin > 6 and self.p[begin + 1] == 80 and self.p[begin + 3] == 58:
            return self._lost(begin + 4, end, number)
        at = self._where(begin, end)
        if at >= 0:
            at = self._when(at, end)
        if at < 0:
            return LINE_MALFORMED
        kind = self._kind(self._skip(at, end), end)
        if kind < 0:
            return LINE_OTHER if kind == -1 else LINE_MALFORMED
        if not self._fields(kind, end):
            return LINE_MALFORMED
        self._put(kind, number)
        return LINE_RECORD

    def _scan(self, size: cython.Py_ssize_t, first_line: cython.ulonglong) -> cython.ulonglong:
        """Scan ``size`` bytes of lines; the number of the next line."""
        begin: cython.Py_ssize_t = 0
        end: cython.Py_ssize_t
        count: cython.int
        number: cython.ulonglong = first_line
        while begin < size:
            end = self._byte(10, begin, size)
            if end < 0:
                end = size
            if self.records == self.room or self.malformed == self.room:
                self._grow()
            count = self._line(begin, end, number)
            if count == LINE_OTHER:
                self.others += 1
            elif count == LINE_NOTE:
                self.notes += 1
            elif count == LINE_MALFORMED:
                self.bad_lines[self.malformed] = (begin << 32) | number
                self.malformed += 1
            begin = end + 1
            number += 1
        return number
