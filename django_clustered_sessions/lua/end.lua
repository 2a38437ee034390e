#!lua flags=allow-oom
-- End a session and leave a tombstone, so that no request in flight brings it back.
--
-- KEYS[1]  record
-- KEYS[2]  index of the record's bucket
-- ARGV[1]  reason
-- ARGV[2]  how long the tombstone is kept (ms)
--
-- Returns  {1, now (ms)}           ended
--          {0, now (ms), reason}   was gone; the reason is empty if nothing is known of it
local record, index = KEYS[1], KEYS[2]
local reason, keep = ARGV[1], ARGV[2]

local now = store_clock()
local ended = redis.call("HGET", record, "m:end")
if ended or redis.call("EXISTS", record) == 0 then
  return {GONE, now, ended or ""}
end
bury(record, index, reason, keep)
return {DONE, now}
