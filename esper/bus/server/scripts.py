"""What must happen atomically on the server, as Lua; every script names its keys, so that clusters and ACLs work."""

from __future__ import annotations

# KEYS: epoch counter, set of runs, set of producers. ARGV: run, producer, lowest epoch to give.
# A new epoch, which fences every older one; the producer's own note of its last guards against a server that forgot.
START = """
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('SADD', KEYS[3], ARGV[2])
local epoch = redis.call('INCR', KEYS[1])
if epoch < tonumber(ARGV[3]) then
  epoch = tonumber(ARGV[3])
  redis.call('SET', KEYS[1], ARGV[3])
end
return epoch
"""

# KEYS: stream, last id, epoch counter. ARGV: epoch, expected last id, then id, wire, id, wire, …
# Adds nothing unless the stream stands where the producer thinks it does, and stops at the first refused entry, since
# what follows would make it impossible to add later. Returns {status, last id, error}.
APPEND = """
local epoch = tonumber(redis.call('GET', KEYS[3]) or '0')
if epoch > tonumber(ARGV[1]) then return {'fenced', tostring(epoch), ''} end
if epoch < tonumber(ARGV[1]) then redis.call('SET', KEYS[3], ARGV[1]) end
local last = redis.call('GET', KEYS[2]) or '0-0'
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

# KEYS: last id, epoch counter. ARGV: epoch, id. Notes what a producer added last, unless a newer one has started.
NOTE = """
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2]) end
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
if redis.call('XDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('XADD', KEYS[2], '*', unpack(ARGV, 2))
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
