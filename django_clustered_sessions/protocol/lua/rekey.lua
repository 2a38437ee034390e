#!lua
-- Write fields of a session with another key; no use of the session, and no change of its values.
-- A field is left alone that has changed since it was read. Versions stay: whoever has loaded the
-- session has the values that are written here.
--
-- KEYS[1]  record
-- ARGV[1..] field, its bytes as they were read (empty: none), its new bytes (empty: remove it); ...
--
-- Returns  {1, now (ms), fields written}
--          {0, now (ms), reason}   gone; the reason is empty if nothing is known of the session
--          {-4, now (ms), ""}      written by a newer release
--
-- Includes: prelude
-- Includes: write

local record = KEYS[1]

local meta, why_not = read_meta(redis.call("HGET", record, "m:"), record)
if not meta then
  return why_not
end
local values, written = {"m:", ""}, 0
for i = 1, #ARGV, 3 do
  local field, before, after = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if (redis.call("HGET", record, field) or "") == before then
    written = written + 1
    if after == "" then
      redis.call("HDEL", record, field)
    else
      values[#values + 1] = field
      values[#values + 1] = after
    end
    if string.sub(field, 1, 2) ~= "m:" then
      meta.bytes = meta.bytes + #after - #before
    end
  end
end
if written > 0 then
  -- The deadline is not moved, so index and users are not written.
  write_meta(record, nil, nil, meta, values, "")
end
return {DONE, now, written}
