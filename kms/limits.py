"""Every bound and every default in one place, each with its reason. Sizes are bytes, times are seconds."""

from __future__ import annotations

from typing import Final

# What one client may cost the server.

MAX_FRAME_BYTES: Final = 1 << 20
"""One request line. Data keys are tiny; bulk data belongs under a data key, not on this socket."""
MIN_FRAME_BYTES: Final = 1 << 10
"""Below this the longest legal request for a small secret would not fit."""
MAX_FRAME_BYTES_CEILING: Final = 1 << 26
"""What a configuration may raise the frame to; each connection may hold one."""
MAX_CONNECTIONS: Final = 256
MAX_CONNECTIONS_CEILING: Final = 1 << 16
GUARANTEED_FRACTION: Final = 4
"""One in so many is the share of each listener, which the others cannot take: so many may come in beyond the cap."""
IDLE_TIMEOUT: Final = 30.0
"""From when the server starts to wait for a frame until it is whole, so one byte a second does not help."""
WRITE_TIMEOUT: Final = 10.0
"""A client that does not take the replies of a turn within this time is cut off."""
DRAIN_TIMEOUT: Final = 5.0
"""What requests in flight get to finish after SIGTERM."""
MAX_NESTING: Final = 32
"""Levels of objects and arrays in a request line, which itself needs one. Python's own bound differs by version."""
READ_BYTES: Final = 1 << 14
"""One read. Together with one frame and the replies of a turn it is all that a connection can make the server hold. Less
than what the allocator takes from the system and gives back each time."""
TURN_REQUESTS: Final = 32
"""Requests of one connection that are answered before the others have their turn: about 0.15 ms of small ones."""
MAX_REJECTIONS: Final = 100
"""Requests in a row without a right token, after which a connection is closed."""
MAX_REFUSAL_KINDS: Final = 1024
"""Refusals that are told apart by who, what and why; the rest are counted together. Each has two lines a second."""
REFUSALS_OF_A_PRINCIPAL: Final = 100
REFUSALS_OF_A_PRINCIPAL_PER_SECOND: Final = 10
"""Refused requests of one principal that have a line each; those beyond are counted. It is a bucket, and its refill."""
REFUSALS_INTERVAL: Final = 1.0
"""After which the number of those that were only counted is in the log."""
MAX_QUEUED_LINES: Final = 10_000
"""Lines of the log that wait for whoever reads standard error: about a megabyte, as JSON some more."""
MAX_LOGGED_MESSAGE: Final = 3000
MAX_LOGGED_VALUE: Final = 300
"""Characters of one text in a JSON line. One character takes 12 bytes at the most, a line has some ten texts, of which
clients choose two: together less than the 48 KiB of a line that journald takes (LineMax=). A group's name fits."""
ACCEPT_BACKLOG: Final = 512
GROUP_COMMIT_MAX: Final = 256
"""Mutations that share one save. As many as there are connections by default, so that no one waits for two saves."""
MAX_KEY_GROUPS: Final = 100_000
"""A keyring lives in memory, and now and then it is written whole."""
MAX_VERSIONS_PER_GROUP: Final = 10_000

MAX_LIST_LIMIT: Final = 1000
"""Key groups of one page of a list."""
LIST_PAGE_BYTES: Final = 1 << 20
"""A page ends with the group that takes it past this. One group of 10,000 versions may take as much."""

# Metrics. Prometheus asks every few seconds, on one connection.

MAX_SCRAPES: Final = 8
"""Connections to the metrics at once."""
MAX_SCRAPE_REQUEST_BYTES: Final = 1 << 13
"""A request line and its headers, of which Prometheus sends a few hundred bytes."""
SCRAPE_REQUEST_TIMEOUT: Final = 5.0
SCRAPE_ANSWER_TIMEOUT: Final = 5.0
METRICS_RETRY_SECONDS: Final = 10.0
"""Until it is tried again to have the port of the metrics, which another program has."""
EXPOSITION_LIFETIME: Final = 1.0
"""One text of the metrics serves all who ask within this time. To make it takes milliseconds of the interpreter's lock,
which whoever asked without end would take from the data plane."""
MAX_METERED_GROUPS: Final = 1000
"""Key groups that have counters of their own; the others share one. Each has a line for each operation, in every scrape."""
# What is known of the use of keys.

USAGE_FLUSH_SECONDS: Final = 60.0
"""Between two writes of the usage file, when something was counted: what a server that is killed forgets at the most."""
USAGE_SLICE: Final = 200
"""Changed versions that are encoded for that file before others have their turn: about 0.2 ms."""
MAX_USAGE_BYTES: Final = 1 << 30
"""As the keystore: a version takes about as much here as there."""
MAX_TIMED_DISABLE_SECONDS: Final = 30 * 24 * 3600
"""Longer than any monthly job needs to show that it still needs a key; what is to last is disabled for good."""
MAX_TIMED_DISABLES: Final = 1000
"""Versions that are disabled for a time at once."""
MAX_REFUSED_NAMES: Final = 100
"""Principals that are told apart in the report of a timed disable; the rest are counted together."""
TIMED_DISABLE_RETRY_SECONDS: Final = 30.0
"""Until it is tried again to enable a version whose time is over, when it could not be saved."""

# Names and secrets.

DEFAULT_KEY_GROUP: Final = "default"
MAX_GROUP_NAME_BYTES: Final = 255
"""The ciphertext stores the name's length in one byte."""
MAX_VERSION: Final = (1 << 63) - 1
MAX_REQUEST_ID_CHARACTERS: Final = 64
"""What a client calls a request, for its own logs and ours: as long as a SHA-256 in hexadecimal, or two UUIDs."""
MAX_SECRET_BYTES: Final = 4096
"""A passphrase or token; a larger 'secret file' is a mistake."""
MIN_PASSPHRASE_CHARACTERS: Final = 8
"""Of a new passphrase; NIST SP 800-63B asks as much of a password whose hash may be stolen."""
TOKEN_BYTES: Final = 32
"""Entropy of a token made by `kms-admin init`."""
KEY_BYTES: Final = 32
UUID_BYTES: Final = 16
MAX_DATA_KEY_BYTES: Final = 1024
"""Of a data key, and of what GenerateRandom gives."""
"""AES-256: root key, KEK and DEK."""

# Principals. What a person writes is far below these; a file above them is not one that a person wrote.

MAX_PRINCIPALS_BYTES: Final = 1 << 20
MAX_PRINCIPALS: Final = 1000
MAX_TOKENS_PER_PRINCIPAL: Final = 8
"""Two rotate without a gap; more are forgotten ones."""
MAX_IDS_PER_PRINCIPAL: Final = 64
"""Unix uids, and as many gids."""
MAX_RULES_PER_PRINCIPAL: Final = 64
"""Allow rules, and as many deny rules."""
MAX_GLOBS_PER_RULE: Final = 64
"""Each is compared with a name that is asked for the first time."""
MAX_AAD_PREFIX_BYTES: Final = 1024
MAX_LIMIT: Final = 1_000_000
"""What a limit of a principal may be at most: of requests a second, versions a day, and so on."""
DEFAULT_LIMIT_GROUPS: Final = 1000
"""Key groups that a principal who is no administrator makes: a hundredth of what a keystore holds."""
DEFAULT_LIMIT_VERSIONS_PER_DAY: Final = 100
"""New versions that one makes: a hundred days for all that a key group holds, in which somebody notices."""
DEFAULT_LIMIT_TIMED_DISABLES: Final = 100
"""Versions that one has disabled for a time at once: a tenth of all."""
MAX_UNIX_ID: Final = (1 << 32) - 2
"""uid_t and gid_t have 32 bits, and -1 is nobody's."""
NOBODY_ID: Final = 65534
"""What Linux gives for each user or group that a user namespace has no number for: the overflow id."""
MAX_DECISIONS_KEPT: Final = 1024
"""Of each principal: (operation, group) pairs whose outcome is kept, 400 bytes each at the most."""

# The audit log.

MAX_AUDIT_LINE_BYTES: Final = 1 << 13
"""One record. Two names of groups, each of 255 characters that JSON writes as six, make 3 KiB of it; the rest is short."""
AUDIT_TAIL_BYTES: Final = 1 << 20
"""What is read of a log's end to go on from there: more than what failed writes, one upon another, leave behind it."""
AUDIT_HEAD_SLOT_BYTES: Final = 1 << 9
"""One of the two places of the head; a disk writes as much at once."""
MAX_AUDIT_HEAD_BYTES: Final = 2 * AUDIT_HEAD_SLOT_BYTES
AUDIT_RESERVE_BYTES: Final = 1 << 20
"""Kept on the disk for what comes next: 4,000 records, in which somebody has time to make room."""
AUDIT_SYNC_INTERVAL: Final = 1.0
"""How often the records of the data plane are made durable, and the file is looked after: what a power cut may take."""
AUDIT_HEAD_INTERVAL: Final = 1.0
"""How often the head file is written, which takes two fsyncs. What is cut off behind it looks like what a crash took."""
AUDIT_RETRY_INTERVAL: Final = 0.1
"""Between two tries to write a log that cannot be written; a request does not wait for one."""
AUDIT_ROTATION_TIME: Final = 10.0
"""From when the log is renamed until SIGHUP says so. logrotate sends it at once, but may compress the old file first."""
MAX_KEPT_RECORDS: Final = MAX_CONNECTIONS_CEILING
"""Outcomes of changes of keys that wait for a log that can be written: each connection has one under way."""
MAX_FINDINGS_SHOWN: Final = 20
"""Of `verify-audit`, and of what a migrated keystore could not keep; the rest are counted."""
MAX_KEY_CHANGES: Final = 1000
"""Changes of the passphrase that `verify-audit` goes back over in one log; each keeps a key in memory."""

# Argon2id. The parameters in a keystore are read before they can be authenticated, so they are bounded.

KDF_MEMORY_KIB: Final = 64 * 1024
KDF_ITERATIONS: Final = 3
KDF_PARALLELISM: Final = 1
"""RFC 9106's second recommended profile has 64 MiB and 3 passes; one lane, since one thread derives."""
KDF_MEMORY_KIB_RANGE: Final = (8, 4 * 1024 * 1024)
KDF_ITERATIONS_RANGE: Final = (1, 64)
KDF_PARALLELISM_RANGE: Final = (1, 64)
KDF_SALT_BYTES: Final = 16
MAX_KEYSTORE_BYTES: Final = 1 << 30
MAX_KEPT_KEYSTORES: Final = 10
"""Files of one earlier format that are kept beside a keystore; more are an accident that somebody should look at."""
JOURNAL_FROM_BYTES: Final = 1 << 16
"""A keystore that is smaller has no journal: to write it whole takes no longer than one change, and it stays one file."""
MIN_FOLD_BYTES: Final = 1 << 20
"""A journal that is shorter than this, or than its keystore, is not folded into it yet."""
MAX_JOURNAL_BYTES: Final = MAX_KEYSTORE_BYTES + MIN_FOLD_BYTES

# Envelopes and files.

GCM_NONCE_BYTES: Final = 12
GCM_TAG_BYTES: Final = 16
MAX_GCM_PLAINTEXT_BYTES: Final = (1 << 36) - 32
"""NIST SP 800-38D, 5.2.1.1: 2^39 - 256 bits under one key and nonce."""
COMMITMENT_BYTES: Final = 32
MAX_SEALS_PER_SUBKEY: Final = 1 << 16
MAX_BYTES_PER_SUBKEY: Final = 1 << 36
"""How often and how much is sealed under one first half of a nonce (`kms.core.envelope.CommittingKey`)."""
MAX_SUBKEYS_KEPT_PER_KEY: Final = 8
MAX_SUBKEYS_KEPT: Final = 4096
"""Of all keys together."""
MAX_WRAPPED_KEY_BYTES: Final = 1024
"""A wrapped data key in a container header: at most 1 + 1 + 255 + 8 + 62 bytes, with room."""
MAX_RECIPIENTS: Final = 16
STREAM_CHUNK_BYTES: Final = 1 << 16
MAX_CHUNKS: Final = 1 << 36
"""Of a file in the container MKE2: 4 PiB."""
FILE_CHUNK_BYTES: Final = 1 << 20

# Clients.

DEFAULT_TCP_HOST: Final = "127.0.0.1"
DEFAULT_TCP_PORT: Final = 9123
MAX_PORT: Final = 65535
CONNECT_TIMEOUT: Final = 5.0
REPLY_TIMEOUT: Final = 60.0
MAX_TIMEOUT: Final = 24 * 3600
"""What a client may be told to wait for a reply: a day. A poll takes its milliseconds as 32 bits."""
MAX_REPLY_BYTES: Final = 1 << 27
"""`ListKeyGroups` of a large keyring is the largest reply."""
MAX_CLIENT_CONNECTIONS: Final = 64
"""Of one client: calls of so many threads at once. A server has 256 for all."""
IDLE_SECONDS: Final = 25.0
"""How long a client keeps a connection that it does not use. A server keeps it for 30."""
RECONNECT_SECONDS: Final = 5.0
"""For how long a client tries to connect again: a server that is restarted takes a second or two."""
THROTTLE_PATIENCE: Final = 20.0
"""For how long a client waits to send again what was throttled. Less than a server's idle time, after which it would close
the connection."""
PIPELINE_DEPTH: Final = 64
"""Requests a client keeps under way in `encrypt_many`; far below where either side's socket buffer fills."""
