#!lua flags=allow-oom
-- End a session and leave a tombstone, so that no request in flight brings it back.
-- No lock holds it up; who waits for one is told at once.
--
-- Includes: lock
--
-- KEYS[1]  record
-- KEYS[2]  index of the record's bucket
-- KEYS[3]  locks of the record's bucket
-- ARGV[1]  reason
-- ARGV[2]  how long the tombstone is kept (ms)
-- ARGV[3]  how long those who wait for the lock have to look why they were woken (ms)
--
-- Returns  {1, now (ms)}           ended
--          {0, now (ms), reason}   was gone; the reason is empty if nothing is known of it
local record, index, locks = KEYS[1], KEYS[2], KEYS[3]
local reason, keep, claim = ARGV[1], ARGV[2], tonumber(ARGV[3])

local now = store_clock()
local ended = redis.call("HGET", record, "m:end")
if ended then
  write_again(record, "m:end")
end
if ended or redis.call("EXISTS", record) == 0 then
  return {GONE, now, ended or ""}
end
local lock = read_lock(record)
if lock then
  dismiss(record, locks, read_queue(record, locks, lock), claim)
end
bury(record, index, reason, keep)
return {DONE, now}
