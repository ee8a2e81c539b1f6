# What is taken from the reference. It is imported when the first decoder is made, not with this module: the package
# that holds it asks for this module when it is imported itself.

cdef object scalars, renderer_for, primary_key, plain_oids, emitted
cdef size_t emitted_overhead_bytes = 0
cdef object ProtocolError, read_relation, read_truncate
cdef object Committed, Ended, Full, Keepalive, Renew
cdef dict KINDS = None


cdef int bind_reference() except -1:
    global scalars, renderer_for, primary_key, plain_oids, emitted, emitted_overhead_bytes, KINDS
    global ProtocolError, read_relation, read_truncate
    global Committed, Ended, Full, Keepalive, Renew
    if KINDS is not None:
        return 0
    from spillway.pgoutput import frames, messages, plan, types
    from spillway.pgoutput import emitted as emitted_messages
    from spillway.pgoutput import scalars as scalar_renderers

    scalars = scalar_renderers
    emitted = emitted_messages
    emitted_overhead_bytes = emitted.OVERHEAD_BYTES
    renderer_for, plain_oids = types.renderer_for, types.PLAIN_OIDS
    primary_key = plan.primary_key
    ProtocolError, read_relation, read_truncate = messages.ProtocolError, messages.read_relation, messages.read_truncate
    Committed, Ended, Full = frames.Committed, frames.Ended, frames.Full
    Keepalive, Renew = frames.Keepalive, frames.Renew
    KINDS = {
        None: AS_IT_IS,
        scalars.text: TEXT,
        scalars.quoted: QUOTED,
        scalars.boolean: BOOLEAN,
        scalars.number: NUMBER,
        scalars.json: JSON,
        scalars.bytea: BYTEA,
        scalars.date: DATE,
        scalars.timestamp: TIMESTAMP,
        scalars.timestamptz: TIMESTAMPTZ,
    }
    return 0
