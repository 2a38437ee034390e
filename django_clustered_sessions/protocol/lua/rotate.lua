#!lua
-- Move a session to a new key with everything in it, and bury the old key.
-- The lock follows; waiters for it are told that the session has left this key.
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
-- KEYS[10] mailbox of the session under the old key
-- KEYS[11] recent writes to the sessions of the record's bucket
-- KEYS[12] the same, where it is the other one's turn
-- ARGV[1]  token of this write, the record's new version (8 bytes)
-- ARGV[2]  life of the tombstone (ms)
-- ARGV[3]  options of a write (write.lua)
-- ARGV[4]  token of the lock that this is done under, or empty: then it is refused while
--          another's lock is held, and ends one whose lease is over
-- ARGV[5]  1: release that lock; 0: keep it
-- ARGV[6]  time that the next holder has to take the lock (ms)
-- ARGV[7]  the session's past under its new key, where values are encrypted; empty: as it is
--
-- Returns  {1, now (ms), deadline (ms)}   moved, or moved by this token before
--          {0, now (ms), reason}          gone; the reason is empty if nothing is known of it
--          {-1, now (ms)}                 the new key exists
--          {-4, now (ms), ""}             written by a newer release
--          {-5, now (ms), since (ms), name}   another has held the lock since then
--          {-7, now (ms), since (ms), name}   the lock was lost; its holder now, empty if none
--
-- Includes: prelude
-- Includes: write
-- Includes: removal
-- Includes: lock
-- Includes: notes

local old, old_index, old_locks, old_users = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local new, new_index, new_locks, new_users = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local events, mailbox, writes, other_writes = KEYS[9], KEYS[10], KEYS[11], KEYS[12]
local token, keep, fence, release, claim = ARGV[1], ARGV[2], ARGV[4], ARGV[5] == "1", ARGV[6]
local past = ARGV[7]
local replay_window, default_age, idle, absolute, _, kept = struct.unpack(OPTIONS, ARGV[3])

if redis.call("EXISTS", new) == 1 then
  local packed = redis.call("HGET", new, "m:")
  local moved = read_meta(packed, new)
  -- The tombstone of a user's session may have led others to its new key, who wrote there since.
  if moved and (moved.version == token
    or redis.call("HGET", old, "m:next") == string.sub(new, -ID_BYTES)) then
    -- A write, as a WAIT may follow, which asks whether replicas have this connection's writes.
    redis.call("HSET", new, "m:", packed)
    return {DONE, now, moved.deadline}
  end
  return {EXISTS, now}
end
local packed, packed_lock, user, past_before =
  unpack(redis.call("HMGET", old, "m:", "m:lock", USER_FIELD, "m:past"))
local meta, why_not = read_meta(packed, old)
if not meta then
  return why_not
end
local lock = read_lock(packed_lock)
if lock or fence ~= "" then
  -- Includes: queue
  local refusal = refuse(old, old_locks, lock, fence, now, claim)
  if refusal then
    return refusal
  end
  dismiss(old, old_locks, lock, claim, mailbox)
  if release or fence == "" then
    redis.call("HDEL", old, "m:lock")
  elseif lock.is_listed then
    -- Nobody waits for it under the new key.
    lock.is_listed = false
    write_lock(old, lock)
  end
end
note_newest(writes, other_writes, meta, now, replay_window)
redis.call("RENAME", old, new)
bury(old, old_index, old_users, meta, "rotated", keep, string.sub(new, -ID_BYTES))
if kept > 0 then
  tell(events, kept, "ended", string.sub(old, -ID_BYTES), meta.user, told_user(user, past_before),
    "rotated", string.sub(new, -ID_BYTES))
end
meta.version, meta.deadline = token, nil
renew(meta, meta.mode, meta.span, default_age, idle, absolute)
local values = past ~= "" and {"m:", "", "m:past", past} or {"m:", ""}
write_meta(new, new_index, new_users, meta, values, "")
return {DONE, now, meta.deadline}
