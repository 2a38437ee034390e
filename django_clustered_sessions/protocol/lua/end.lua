#!lua flags=allow-oom
-- End a session and leave a tombstone, so that no request in flight brings it back.
-- No lock holds it up; waiters for one are told at once.
--
-- KEYS[1]  record
-- KEYS[2]  index of the record's bucket
-- KEYS[3]  locks of the record's bucket
-- KEYS[4]  users of the record's bucket
-- KEYS[5]  events of the record's bucket
-- KEYS[6]  mailbox of the session
-- ARGV[1]  reason
-- ARGV[2]  life of the tombstone (ms)
-- ARGV[3]  time that waiters for the lock have to look why they were woken (ms)
-- ARGV[4]  number of events that a bucket keeps (0 for none)
--
-- Returns  {1, now (ms), created (ms), user}   ended; 0 where a damaged record does not tell; user:
--               the field with the key of the user, empty for none
--          {0, now (ms), reason}         was gone; the reason is empty if nothing is known of it
--
-- Includes: prelude
-- Includes: removal
-- Includes: lock

local record, index, locks, users, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local mailbox = KEYS[6]
local reason, keep, claim, kept = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])

local ended, packed, packed_lock, user, past =
  unpack(redis.call("HMGET", record, "m:end", "m:", "m:lock", USER_FIELD, "m:past"))
if ended then
  -- A write, as a WAIT may follow, which asks whether replicas have this connection's writes.
  redis.call("HSET", record, "m:end", ended)
end
if ended or not packed and redis.call("EXISTS", record) == 0 then
  return {GONE, now, ended or ""}
end
local lock = read_lock(packed_lock)
if lock then
  -- Includes: queue
  dismiss(record, locks, lock, claim, mailbox)
end
local meta = read_meta(packed, record)
user = told_user(user, past)
bury(record, index, users, meta, reason, keep)
tell(events, kept, "ended", string.sub(record, -ID_BYTES), meta and meta.user or NOBODY, user, reason)
return {DONE, now, meta and meta.created or 0, user}
