#!lua flags=allow-oom
-- Take a session out of its bucket's index if it is gone: the store may have evicted it.
-- It may have expired since the index was read, so an event tells that it expired.
--
-- KEYS[1]  record
-- KEYS[2]  index of the record's bucket
-- KEYS[3]  users of the record's bucket
-- KEYS[4]  events of the record's bucket
-- ARGV[1]  tag of the user to whom it belonged (8 bytes)
-- ARGV[2]  number of events that a bucket keeps (0 for none)
--
-- Returns  {1, now (ms)}
-- Includes: prelude
-- Includes: removal

local record, index, users, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local user, kept = ARGV[1], tonumber(ARGV[2])

local meta, why_not = read_meta(redis.call("HGET", record, "m:"), record)
if not meta or meta.user ~= user then
  local was_listed = unlist(index, users, string.sub(record, -ID_BYTES), user)
  if was_listed and why_not and why_not[1] == GONE and why_not[3] == "" then
    tell(events, kept, "expired", string.sub(record, -ID_BYTES), user)
  end
end
return {DONE, now}
