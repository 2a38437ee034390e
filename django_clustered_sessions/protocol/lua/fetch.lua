#!lua flags=no-writes
-- Read a session, unless it is as the asker knows it.
--
-- KEYS[1]  record
-- ARGV[1]  version that the asker knows (8 bytes)
--
-- Returns  {field, value, field, value, ...}   all fields of the record; none if there is none
--          the meta field alone                where the session has that version
local record = KEYS[1]
local known = ARGV[1]

local packed = redis.call("HGET", record, "m:")
if packed and string.sub(packed, 3, 10) == known then
  return packed
end
return redis.call("HGETALL", record)
