"""The keys on a server: their names, and the scripts that change more than one of them at once."""

from __future__ import annotations

from collections.abc import Iterable

RUNS = "esper:runs"


def names(members: Iterable[bytes]) -> list[str]:
    """Names in a set on a server, sorted; others may write there, and bytes that are not text are not our names."""
    found = []
    for member in members:
        try:
            found.append(member.decode())
        except UnicodeDecodeError:
            continue
    return sorted(found)


def prefix(run: str) -> str:
    """The prefix of all keys of a run."""
    return f"esper:{{{run}}}"


def producers(run: str, stream: str) -> str:
    """Set of the names of a stream's producers."""
    return f"{prefix(run)}:{stream}"


def entries(run: str, stream: str, producer: str) -> str:
    """The server-side stream of one producer."""
    return f"{prefix(run)}:{stream}:{producer}"


def epoch(run: str, stream: str, producer: str) -> str:
    """Counter of a producer's starts."""
    return f"{prefix(run)}:epoch:{stream}:{producer}"


def last(run: str, stream: str, producer: str) -> str:
    """Id of the last entry a producer added."""
    return f"{prefix(run)}:last:{stream}:{producer}"


def dead(run: str) -> str:
    """Stream of dead letters."""
    return f"{prefix(run)}:dead"


def replays(run: str, stream: str, group: str) -> str:
    """Dead letters handed to a group once more."""
    return f"{prefix(run)}:replay:{stream}:{group}"


def counts(run: str, process: str) -> str:
    """Counters of a process beside the trainer."""
    return f"{prefix(run)}:counts:{process}"


# A counter that is no plain number, or one larger than Lua counts to, was not written by us: it fences nobody.
_EPOCH = """
local function epoch_at(key)
  local reply = redis.pcall('GET', key)
  if type(reply) ~= 'string' or #reply > 15 or not string.match(reply, '^%d+$') then return 0 end
  return tonumber(reply)
end
"""

# KEYS: epoch counter, set of runs, set of producers. ARGV: run, producer, lowest epoch to give.
# A new epoch, which fences every older one; the producer's own note of its last guards against a server that forgot.
# Returns {epoch, error}: a set that cannot be added to hides the producer from readers, and keeps nothing from it.
START = (
    _EPOCH
    + """
local problem = ''
for i = 2, 3 do
  local reply = redis.pcall('SADD', KEYS[i], ARGV[i - 1])
  if type(reply) == 'table' and reply['err'] then problem = KEYS[i] .. ': ' .. reply['err'] end
end
local epoch = math.max(epoch_at(KEYS[1]) + 1, tonumber(ARGV[3]))
redis.call('SET', KEYS[1], string.format('%.0f', epoch))
return {epoch, problem}
"""
)

# KEYS: stream, last id, epoch counter. ARGV: epoch, expected last id, then id, wire, id, wire, …
# Adds nothing unless the stream stands where the producer thinks it does, and stops at the first refused entry, since
# what follows would make it impossible to add later. Returns {status, last id, error}.
APPEND = (
    _EPOCH
    + """
local epoch = epoch_at(KEYS[3])
if epoch > tonumber(ARGV[1]) then return {'fenced', string.format('%.0f', epoch), ''} end
if epoch < tonumber(ARGV[1]) then redis.call('SET', KEYS[3], ARGV[1]) end
local last = redis.pcall('GET', KEYS[2]) or '0-0'
if type(last) ~= 'string' then last = '' end
if last ~= ARGV[2] then return {'elsewhere', last, ''} end
for i = 3, #ARGV, 2 do
  local reply = redis.pcall('XADD', KEYS[1], ARGV[i], 'm', ARGV[i + 1])
  if type(reply) == 'table' and reply['err'] then
    if last ~= ARGV[2] then redis.call('SET', KEYS[2], last) end
    return {'stopped', last, reply['err']}
  end
  last = ARGV[i]
end
redis.call('SET', KEYS[2], last)
return {'stored', last, ''}
"""
)

# KEYS: last id, epoch counter. ARGV: epoch, id. Notes what a producer added last, unless a newer one has started.
NOTE = """
if redis.pcall('GET', KEYS[2]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2]) end
return 0
"""

# KEYS: stream, dead letters. ARGV: group, id, then the fields of the dead letter. One move or none.
BURY = """
if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1) == 0 then return 0 end
redis.call('XADD', KEYS[2], '*', unpack(ARGV, 3))
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
return 1
"""

# KEYS: stream. ARGV: group, consumer, ids. What the consumer still holds of these was handed to it just now; what it lost
# to another member is that one's. No delivery is counted.
RENEW = """
for i = 3, #ARGV do
  if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2]) == 1 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
  end
end
return 0
"""

# KEYS: dead letters, replays of the group. ARGV: dead letter's id, then the fields to replay. One move or none.
REPLAY = """
if #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) == 0 then return 0 end
redis.call('XADD', KEYS[2], '*', unpack(ARGV, 2))
redis.call('XDEL', KEYS[1], ARGV[1])
return 1
"""

# KEYS: stream. ARGV: two ids. How many entries lie strictly between them, -1 when the stream was trimmed there.
BETWEEN = """
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)
local epoch, sequence = string.match(ARGV[1], '(%d+)-(%d+)')
if first[1] then
  local e, s = string.match(first[1][1], '(%d+)-(%d+)')
  if ARGV[1] ~= '0-0' and (tonumber(e) > tonumber(epoch) or (e == epoch and tonumber(s) > tonumber(sequence) + 1)) then
    return -1
  end
end
return #redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '(' .. ARGV[2])
"""
