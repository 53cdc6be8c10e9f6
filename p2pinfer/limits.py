"""Every limit of the protocol and of a node, each with its name and its reason.

A limit is checked before memory is taken for what it bounds. `proto_spec.md` lists those that
other implementations must share; `tests/test_spec.py` compares the two. Limits of text count
characters (Unicode code points, of at most four bytes each); all others say their unit.
"""

MAX_NODES = 16
"""Members of one cluster: every node gossips to every other and steps are exchanged directly."""

MAX_LAYERS = 512
MAX_UNITS = 4096
"""Units of one kind in a model (a tree index is 12 bits on the wire)."""

MAX_WIDTH = 1 << 20
"""`hidden_size` and `intermediate_size` of a model."""

MAX_HEAD_DIM = 1 << 14
MAX_VOCAB = 1 << 24
MAX_STAGES = MAX_NODES
MAX_NAME_CHARS = 64
MAX_ADDRESS_CHARS = 256
MAX_TEXT_CHARS = 1 << 20
"""Prompt text and reply text in one message."""

MAX_REASON_CHARS = 4096
"""An error message, or what a request waits for."""

MAX_POSITIONS = 1 << 20
"""Tokens of one request, prompt and reply together, whatever the model allows."""

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_TOP_K = 1024
MAX_SCALE = 1_000_000_000
"""Of a temperature or a repetition penalty; its inverse is the least. Beyond these a logit divided
or multiplied by both may leave float32, and a step with an infinite score fails for all in it."""

MAX_CANDIDATES = MAX_TOP_K
"""Candidates that one vocab unit may send for one slot."""

MAX_STEP_SLOTS = 64
MAX_STEP_TOKENS = 1024
"""Positions that one step may compute, over all its slots."""

MAX_REQUESTS = 256
"""Requests that a cluster queues or serves; one more is refused as `overloaded`."""

MAX_FAILOVERS = 1024
"""Interruptions of one reply that its last message tells of."""

MAX_CONTROL_BYTES = 8 << 20
"""Of a body in MessagePack, on any plane; the next two bound data frames on theirs."""

MAX_STEP_BYTES = 256 << 20
MAX_BULK_BYTES = 64 << 20
MAX_STATUS_BYTES = 4 << 20
MAX_HELD_BYTES = 64 << 20
"""Data frames kept per peer for a plan that is acknowledged but not yet active."""

MAX_CREDIT_BYTES = 16 << 20
"""Delta KV that a standby lets an owner send without having heard of it again."""

MAX_STANDBY_LAG = 16
"""A standby that lacks no more of any request is ready to take over: while steps run it is a few
behind by nature, and so many take hardly longer to compute again than one."""

MAX_PARTS = 64
"""Subtree sums in one partial frame (a run of n units needs at most 2 log2 n)."""

MAX_GB_S = 1_000_000
"""GB (1e9 bytes) per second that a node says it can multiply, or read: a thousand accelerators."""

MAX_ROUND_TRIP_MS = 1_000_000

MAX_ECHO_BYTES = 1 << 20
"""Filler of one echo, each way: enough to measure bandwidth, and sent in 10 ms at 1 Gbit/s,
for which a step that begins meanwhile may have to wait."""

MAX_ECHOES = 256
"""Echoes of one run: the median of so many is good to a few percent."""

MAX_ECHO_RUN_BYTES = 32 << 20
"""Filler of all echoes of one run, there and back together."""

MAX_PENDING_CLIENTS = 1024
