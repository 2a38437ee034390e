#!lua
-- Move a session to a new key with everything in it, and bury the old key.
--
-- KEYS[1]  record
-- KEYS[2]  index of the record's bucket
-- KEYS[3]  record under the new key
-- KEYS[4]  index of the new record's bucket
-- ARGV[1]  token of this write, the record's new version (8 bytes)
-- ARGV[2]  how long the tombstone is kept (ms)
-- ARGV[3]  default age (ms)
-- ARGV[4]  idle timeout (ms, 0 for none)
--
-- Returns  {1, now (ms), deadline (ms)}   moved, or moved by this token before
--          {0, now (ms), reason}          gone; the reason is empty if nothing is known of it
--          {-1, now (ms)}                 the new key exists
--          {-4, now (ms), ""}             written by a newer release
local old, old_index, new, new_index = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local token, keep, default_age, idle =
  ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])

local now = store_clock()
if redis.call("EXISTS", new) == 1 then
  local moved = read_meta(new, now)
  if moved and moved.version == token then
    return {DONE, now, moved.deadline}
  end
  return {EXISTS, now}
end
local meta, why_not = read_meta(old, now)
if not meta then
  return why_not
end

redis.call("RENAME", old, new)
redis.call("HDEL", new, "m:replay")
bury(old, old_index, "rotated", keep)
meta.version = token
renew(meta, meta.mode, meta.span, now, default_age, idle)
write_meta(new, new_index, meta)
return {DONE, now, meta.deadline}
