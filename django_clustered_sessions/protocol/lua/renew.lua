#!lua flags=allow-oom
-- Renew the lease of a session's lock, as long as it is the token's, and list the lock.
--
-- KEYS[1]  record
-- KEYS[2]  locks of the record's bucket
-- ARGV[1]  token of the holder
-- ARGV[2]  lease (ms)
-- ARGV[3]  longest time that it may be held at all (ms)
-- ARGV[4]  life of a bucket's hash of locks after the last one was listed (ms)
--
-- Returns  {1, now (ms), lease left (ms)}   0 or less: it has been held for too long
--          {0, now (ms), ""}                the token has lost the lock
--
-- Includes: prelude
-- Includes: lock
-- Includes: queue

local record, locks = KEYS[1], KEYS[2]
local token, lease, longest, remember =
  ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])

local lock = read_lock(redis.call("HGET", record, "m:lock"))
if not lock or lock.token ~= token then
  return {GONE, now, ""}
end
if lock.since > now then
  -- The clock was set back, and its holder lives: as if it were taken now.
  lock.since, lock.lease = now, now
end
lock.lease = math.max(lock.lease, math.min(now + lease, lock.since + longest))
if lock.is_listed then
  write_lock(record, lock)
else
  -- It is held for longer than most: others are to see it.
  list_lock(record, locks, lock, {}, now, remember)
end
return {DONE, now, lock.lease - now}
