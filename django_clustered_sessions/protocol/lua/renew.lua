#!lua flags=allow-oom
-- Renew the lease of a session's lock, as long as it is the token's.
--
-- Includes: lock
--
-- KEYS[1]  record
-- ARGV[1]  token of the holder
-- ARGV[2]  lease (ms)
-- ARGV[3]  longest time that it may be held at all (ms)
--
-- Returns  {1, now (ms), lease left (ms)}   0 or less: it has been held for too long
--          {0, now (ms), ""}                the token has lost the lock
local record = KEYS[1]
local token, lease, longest = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

local now = store_clock()
local lock = read_lock(record)
if not lock or lock.token ~= token then
  return {GONE, now, ""}
end
if lock.since > now then
  -- The clock was set back, and its holder lives: as if it were taken now.
  lock.since, lock.lease = now, now
end
lock.lease = math.max(lock.lease, math.min(now + lease, lock.since + longest))
write_lock(record, lock)
return {DONE, now, lock.lease - now}
