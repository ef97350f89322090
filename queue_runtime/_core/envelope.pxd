from queue_runtime._core.message cimport Message
from queue_runtime._core.wire cimport wire_message, wire_text

# Let `out` point at the message's own bytes; only for a message that has no `wire`.
cdef int gather(Message message, wire_message *out, wire_text *attributes) except -1

# The message that this envelope holds; SerializationError when it is none.
cdef Message decoded(bytes wire)
