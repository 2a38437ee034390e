#!lua flags=allow-oom
-- Renew a session's deadline, as every use of a sliding session does.
--
-- KEYS[1]  record
-- KEYS[2]  index of the record's bucket
-- KEYS[3]  users of the record's bucket
-- KEYS[4]  events of the record's bucket
-- ARGV[1]  options of a write (write.lua)
-- ARGV[2]  1: write in any case, for a WAIT that follows; 0: only where the deadline moves or a
--          second has passed
-- ARGV[3]  client that uses the session; empty: not kept
--
-- Returns  {1, now (ms), deadline (ms), mode}
--          {0, now (ms), reason}   gone; the reason is empty if nothing is known of the session
--          {-4, now (ms), ""}      written by a newer release
--
-- Includes: prelude
-- Includes: write

local record, index, users, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local _, default_age, idle, absolute, _, kept = struct.unpack(OPTIONS, ARGV[1])
local always, client = ARGV[2] == "1", ARGV[3]

local meta, why_not = read_meta(redis.call("HGET", record, "m:"), record)
if not meta then
  return why_not
end
local seen = meta.seen
renew(meta, meta.mode, meta.span, default_age, idle, absolute)
if meta.deadline <= now then
  -- Includes: removal
  tell_expired(events, kept, record, meta)
  forget(record, index, users, meta)
  return {GONE, now, ""}
end
-- Once a second is enough: a page with thirty requests writes one touch.
if always or meta.is_moved or now - seen >= 1000 then
  write_meta(record, index, users, meta, {"m:", ""}, client)
end
return {DONE, now, meta.deadline, meta.mode}
