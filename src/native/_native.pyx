# cython: language_level=3, cdivision=True
"""The compiled twin of `spillway.pgoutput.decoder`, `spillway.columns` and `spillway.members`: the same bytes, faster.

The Python is the reference: what is promised is said there, and one suite of tests holds for both. Here stands how it
is made fast, in this order:

- memory: output grows in `bytes` objects, which become the chunk's without a copy; nothing else is allocated per row
- text: scanning, JSON escapes, UTF-8, numbers, base64, CRC-32
- scalars: one renderer per frequent type; all others are the reference's functions, called with the value
- reference: what is taken from it
- paths: what stands at a path in JSON text
- members: JSON objects taken apart
- filters: what filters say of a row
- plan: what is compiled once per relation
- lines: rows of COPY taken apart
- keys: the texts of a row's keys
- transaction: what the changes of a transaction share
- libpq: ``PQgetCopyData`` of the very libpq that psycopg has loaded, called without psycopg
- decoder: frames in, records out
- columns: gather, join, by_kind, bulk

Rules that keep it safe: a read of a frame is checked against the frame's end before it happens (in `Plan.split`,
`Plan.split_key`, `after_new`, `split_line`, `unescape`, `Decoder._frame`, `_keepalive`, `_other`, `_message`, and
`begin` and `logical_message` of the transaction; nothing else looks at a frame, and `Walk` stays in its value); a write
is behind a `reserve` that covers it; Python's own containers keep their bounds checks. Values are slices of the frame,
or of the scratch buffer of its escapes, and do not outlive it. A row that turns out to be too large leaves nothing
behind; after an error the decoder is of no use.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_XDECREF
from libc.stdint cimport int8_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memchr, memcmp, memcpy, memmove, memset

from hashlib import sha256
from struct import error as StructError

import orjson

from spillway import members as reference_members
from spillway.change import ACTIONS, table_prefix
from spillway.chunk import Chunk
from spillway.errors import Finding
from spillway.position import format_lsn

include "memory.pxi"
include "text.pxi"
include "scalars.pxi"
include "reference.pxi"
include "paths.pxi"
include "members.pxi"
include "filters.pxi"
include "plan.pxi"
include "lines.pxi"
include "keys.pxi"
include "transaction.pxi"
include "libpq.pxi"
include "decoder.pxi"
include "columns.pxi"
