#!lua
-- Move a session to a new key with everything in it, and bury the old key.
-- The lock follows; waiters for it are told that the session has left this key.
--
-- Includes: write
-- Includes: lock
--
-- KEYS[1]  record
-- KEYS[2]  index of the record's bucket
-- KEYS[3]  locks of the record's bucket
-- KEYS[4]  users of the record's bucket
-- KEYS[5]  record under the new key
-- KEYS[6]  index of the new record's bucket
-- KEYS[7]  locks of the new record's bucket
-- KEYS[8]  users of the new record's bucket
-- KEYS[9]  events of the record's bucket
-- ARGV[1]  token of this write, the record's new version (8 bytes)
-- ARGV[2]  life of the tombstone (ms)
-- ARGV[3]  default age (ms)
-- ARGV[4]  idle timeout (ms, 0 for none)
-- ARGV[5]  absolute timeout (ms, 0 for none)
-- ARGV[6]  number of events that a bucket keeps (0 for none)
-- ARGV[7]  token of the lock that this is done under, or empty: then it is refused while
--          another's lock is held, and ends one whose lease is over
-- ARGV[8]  1: release that lock; 0: keep it
-- ARGV[9]  time that the next holder has to take the lock (ms)
--
-- Returns  {1, now (ms), deadline (ms)}   moved, or moved by this token before
--          {0, now (ms), reason}          gone; the reason is empty if nothing is known of it
--          {-1, now (ms)}                 the new key exists
--          {-4, now (ms), ""}             written by a newer release
--          {-5, now (ms), since (ms), name}   another has held the lock since then
--          {-7, now (ms), since (ms), name}   the lock was lost; its holder now, empty if none
local old, old_index, old_locks, old_users = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local new, new_index, new_locks, new_users = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local events = KEYS[9]
local token, keep, default_age, idle, absolute, kept =
  ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local fence, release, claim = ARGV[7], ARGV[8] == "1", tonumber(ARGV[9])

local now = store_clock()
if redis.call("EXISTS", new) == 1 then
  local moved = read_meta(new, now)
  if moved and moved.version == token then
    write_again(new, "m:")
    return {DONE, now, moved.deadline}
  end
  return {EXISTS, now}
end
local meta, why_not = read_meta(old, now)
if not meta then
  return why_not
end
local lock = read_lock(old)
local refusal = refuse(old, old_locks, lock, fence, now, claim)
if refusal then
  return refusal
end

local queue, holder = {}, nil
if lock then
  queue, holder = read_queue(old, old_locks, lock)
end
dismiss(old, old_locks, queue, claim)
redis.call("RENAME", old, new)
if lock and (release or fence == "") then
  redis.call("HDEL", new, "m:lock")
elseif holder then
  write_queue(new, new_locks, holder, {})
end
bury(old, old_index, old_users, meta, "rotated", keep, session_id(new))
if kept > 0 then
  tell(events, kept, "ended", session_id(old), meta.user, redis.call("HGET", new, USER_FIELD),
    "rotated", session_id(new))
end
meta.version = token
renew(meta, meta.mode, meta.span, now, default_age, idle, absolute)
write_meta(new, new_index, new_users, meta)
return {DONE, now, meta.deadline}
