#!lua flags=allow-oom
-- End a session that has been copied to a new key in another slot, unless it has changed since.
-- Waiters for its lock are told that the session has left this key.
--
-- KEYS[1]  record
-- KEYS[2]  index of the record's bucket
-- KEYS[3]  locks of the record's bucket
-- KEYS[4]  users of the record's bucket
-- KEYS[5]  events of the record's bucket
-- KEYS[6]  mailbox of the session
-- KEYS[7]  recent writes to the bucket's sessions
-- KEYS[8]  the same, where it is the other one's turn
-- ARGV[1]  token of the copy (8 bytes)
-- ARGV[2]  version that was copied (8 bytes)
-- ARGV[3]  life of the tombstone (ms)
-- ARGV[4]  token of the lock that this is done under, or empty: then it is refused while
--          another's lock is held, and ends one whose lease is over
-- ARGV[5]  time that waiters for the lock have to look why they were woken (ms)
-- ARGV[6]  id of the copy
-- ARGV[7]  number of events that a bucket keeps (0 for none)
-- ARGV[8]  time in which a write may be replayed (ms)
--
-- Returns  {1, now (ms)}             ended, or ended for this copy before
--          {0, now (ms), reason}     gone; the reason is empty if nothing is known of it
--          {-2, now (ms)}            others have written since
--          {-4, now (ms), ""}        written by a newer release
--          {-5, now (ms), since (ms), name}   another has held the lock since then
--          {-7, now (ms), since (ms), name}   the lock was lost; its holder now, empty if none
--
-- Includes: prelude
-- Includes: removal
-- Includes: lock
-- Includes: notes
-- Includes: queue

local record, index, locks, users, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local mailbox, writes, other_writes = KEYS[6], KEYS[7], KEYS[8]
local token, version, keep, fence, claim, successor, kept =
  ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5]), ARGV[6], tonumber(ARGV[7])
local replay_window = tonumber(ARGV[8])

local packed, packed_lock, user, past =
  unpack(redis.call("HMGET", record, "m:", "m:lock", USER_FIELD, "m:past"))
local meta, why_not = read_meta(packed, record)
if not meta then
  if redis.call("HGET", record, "m:copy") == token then
    -- A write, as a WAIT may follow, which asks whether replicas have this connection's writes.
    redis.call("HSET", record, "m:copy", token)
    return {DONE, now}
  end
  return why_not
end
local lock = read_lock(packed_lock)
local refusal = refuse(record, locks, lock, fence, now, claim)
if refusal then
  return refusal
end
if meta.version ~= version then
  return {CONFLICT, now}
end
if lock then
  dismiss(record, locks, lock, claim, mailbox)
end
note_newest(writes, other_writes, meta, now, replay_window)
bury(record, index, users, meta, "rotated", keep, successor)
tell(events, kept, "ended", string.sub(record, -ID_BYTES), meta.user, told_user(user, past),
  "rotated", successor)
redis.call("HSET", record, "m:copy", token)
return {DONE, now}
