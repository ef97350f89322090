"""Where the engine keeps messages: an entry per message, and the chains, heaps and indexes that entries stand in.

Plain C structs in the interpreter's small-object memory: a queued message costs no object that the collector would
visit, links are borrowed and never recurse, and every entry knows its places, so that it leaves each in O(1) or
O(log n) and nothing stale is left behind. Everything here needs the GIL.
"""

from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport PyObject
from libc.stdint cimport int64_t

# Where an entry stands.
cdef enum:
    FRESH = 0       # ready, in its lane's chain of ascending numbers
    RETURNED = 1    # ready, in its lane's heap: it came back, or fell due, after later ones had been added
    LOCKED = 2      # delivered: in the chain of locks by their end, and in its receiver's own chain
    HELD_BACK = 3   # abandoned with a delay: in the heap of delays; in a session also in the lane's heap
    SCHEDULED = 4   # not due yet: in the heap of delays or in the agenda
    DEFERRED = 5    # only in the index
    STATES = 6

# The two chains that an entry can be in at once, and the three heaps.
cdef enum:
    LINE = 0        # FRESH: its lane's; LOCKED: the order in which locks end
    OWN = 1         # LOCKED: what one receiver holds, in the order of delivery
    IN_LANE = 0
    IN_TIME = 1
    IN_TTL = 2


cdef struct Entry:
    PyObject *message           # owned
    PyObject *reason            # owned; NULL unless dead
    PyObject *description       # owned; may be NULL
    PyObject *lane              # borrowed: a lane lives as long as it has entries
    PyObject *link              # borrowed; NULL unless LOCKED
    Entry *before[2]
    Entry *after[2]
    int64_t number              # the sequence number
    int64_t place               # in its index
    Py_ssize_t spot[3]          # in the heaps; -1 = not in it
    double due                  # when SCHEDULED or HELD_BACK ends: by the clock, or by the wall when `by_wall`
    double time_to_live         # seconds; infinite = for ever
    double expires              # by the clock; infinite = never, or not yet running
    double lock_end             # by the clock
    double enqueued_at          # by the wall
    double first_delivered_at   # by the wall
    int64_t deliveries
    int state
    bint dead
    bint by_wall


# Chains: doubly linked, through the links of one kind.

cdef struct Chain:
    Entry *first
    Entry *last


cdef inline void chain_append(Chain *chain, Entry *entry, int kind) noexcept:
    entry.before[kind] = chain.last
    entry.after[kind] = NULL
    if chain.last != NULL:
        chain.last.after[kind] = entry
    else:
        chain.first = entry
    chain.last = entry


cdef inline void chain_remove(Chain *chain, Entry *entry, int kind) noexcept:
    if entry.before[kind] != NULL:
        entry.before[kind].after[kind] = entry.after[kind]
    else:
        chain.first = entry.after[kind]
    if entry.after[kind] != NULL:
        entry.after[kind].before[kind] = entry.before[kind]
    else:
        chain.last = entry.before[kind]


# Heaps: binary, least key first and the lower number first among equals; an entry knows its spot in each kind.

cdef struct Node:
    double key
    Entry *entry


cdef struct Heap:
    Node *nodes
    Py_ssize_t size
    Py_ssize_t room
    int kind


cdef inline bint node_less(Node *a, Node *b) noexcept:
    return a.key < b.key or (a.key == b.key and a.entry.number < b.entry.number)


cdef inline void heap_set(Heap *heap, Py_ssize_t spot, Node node) noexcept:
    heap.nodes[spot] = node
    node.entry.spot[heap.kind] = spot


cdef inline void heap_rise(Heap *heap, Py_ssize_t spot, Node node) noexcept:
    cdef Py_ssize_t parent
    while spot > 0:
        parent = (spot - 1) >> 1
        if not node_less(&node, &heap.nodes[parent]):
            break
        heap_set(heap, spot, heap.nodes[parent])
        spot = parent
    heap_set(heap, spot, node)


cdef inline void heap_sink(Heap *heap, Py_ssize_t spot, Node node) noexcept:
    cdef Py_ssize_t child
    while True:
        child = 2 * spot + 1
        if child >= heap.size:
            break
        if child + 1 < heap.size and node_less(&heap.nodes[child + 1], &heap.nodes[child]):
            child += 1
        if not node_less(&heap.nodes[child], &node):
            break
        heap_set(heap, spot, heap.nodes[child])
        spot = child
    heap_set(heap, spot, node)


cdef inline int heap_push(Heap *heap, Entry *entry, double key) except -1:
    cdef Py_ssize_t room
    cdef Node *nodes
    cdef Node node
    if heap.size == heap.room:
        room = 2 * heap.room if heap.room else 4
        nodes = <Node *>PyMem_Realloc(heap.nodes, room * sizeof(Node))
        if nodes == NULL:
            raise MemoryError
        heap.nodes = nodes
        heap.room = room
    node.key = key
    node.entry = entry
    heap.size += 1
    heap_rise(heap, heap.size - 1, node)
    return 0


cdef inline void heap_remove(Heap *heap, Entry *entry) noexcept:
    cdef Py_ssize_t spot = entry.spot[heap.kind]
    cdef Node last
    cdef Node *nodes
    entry.spot[heap.kind] = -1
    heap.size -= 1
    if spot < heap.size:
        last = heap.nodes[heap.size]
        if spot > 0 and node_less(&last, &heap.nodes[(spot - 1) >> 1]):
            heap_rise(heap, spot, last)
        else:
            heap_sink(heap, spot, last)
    if heap.size == 0:
        if heap.room > 64:
            heap_free(heap)
    elif heap.room > 64 and heap.size < heap.room >> 3:
        nodes = <Node *>PyMem_Realloc(heap.nodes, (heap.room >> 2) * sizeof(Node))
        if nodes != NULL:  # shrinking may fail, and then the larger block goes on serving
            heap.nodes = nodes
            heap.room >>= 2


cdef inline void heap_free(Heap *heap) noexcept:
    PyMem_Free(heap.nodes)
    heap.nodes = NULL
    heap.size = heap.room = 0


# Indexes: all entries of a queue by number, in a ring that numbers are appended to. A removed entry leaves a hole;
# holes at the head are skipped at once, and the ring is packed when holes outnumber entries.

cdef struct Item:
    int64_t number
    Entry *entry                # NULL = a hole


cdef struct Index:
    Item *items
    int64_t mask                # the room - 1, the room being a power of two; -1 = no room yet
    int64_t head                # places count up for ever; a place's item is items[place & mask]
    int64_t tail
    int64_t live                # entries between head and tail
    int64_t last_number


cdef inline int index_resize(Index *index, int64_t room) except -1:
    """Move to a ring of another size, leaving the holes behind."""
    cdef Item *items = <Item *>PyMem_Malloc(room * sizeof(Item))
    cdef Item item
    cdef int64_t place
    cdef int64_t packed = index.head
    if items == NULL:
        raise MemoryError
    for place in range(index.head, index.tail):
        item = index.items[place & index.mask]
        if item.entry != NULL:
            item.entry.place = packed
            items[packed & (room - 1)] = item
            packed += 1
    PyMem_Free(index.items)
    index.items = items
    index.mask = room - 1
    index.tail = packed
    return 0


cdef inline int index_append(Index *index, Entry *entry) except -1:
    """Give the entry the next number."""
    cdef Item *item
    if index.tail - index.head > index.mask:
        index_resize(index, 2 * (index.mask + 1) if index.mask > 0 else 16)
    index.last_number += 1
    entry.number = index.last_number
    entry.place = index.tail
    item = &index.items[index.tail & index.mask]
    item.number = entry.number
    item.entry = entry
    index.tail += 1
    index.live += 1
    return 0


cdef inline int index_remove(Index *index, Entry *entry) except -1:
    cdef int64_t room
    index.items[entry.place & index.mask].entry = NULL
    index.live -= 1
    if index.live == 0:
        index.head = index.tail
    elif entry.place == index.head:
        while index.items[index.head & index.mask].entry == NULL:
            index.head += 1
    room = index.mask + 1
    if room > 1024 and index.tail - index.head < room >> 3:
        index_resize(index, room >> 2)
    elif index.tail - index.head > 2 * index.live + 64:
        index_resize(index, room)
    return 0


cdef inline int64_t index_seek(Index *index, int64_t number) noexcept:
    """Return the place of the first item whose number is not below this one; the tail when there is none."""
    cdef int64_t low = index.head
    cdef int64_t high = index.tail
    cdef int64_t middle
    if low == high or number <= index.items[low & index.mask].number:
        return low
    # Without holes a number tells its place exactly, from either end.
    middle = low + (number - index.items[low & index.mask].number)
    if middle < high and index.items[middle & index.mask].number == number:
        return middle
    middle = high - 1 - (index.items[(high - 1) & index.mask].number - number)
    if low <= middle < high and index.items[middle & index.mask].number == number:
        return middle
    while low < high:
        middle = (low + high) >> 1
        if index.items[middle & index.mask].number < number:
            low = middle + 1
        else:
            high = middle
    return low


cdef inline Entry *index_find(Index *index, int64_t number) noexcept:
    cdef int64_t place = index_seek(index, number)
    cdef Item *item
    if place == index.tail:
        return NULL
    item = &index.items[place & index.mask]
    return item.entry if item.number == number else NULL
