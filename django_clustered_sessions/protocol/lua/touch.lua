#!lua flags=allow-oom
-- Renew a session's deadline, as every use of a sliding session does.
--
-- Includes: write
--
-- KEYS[1]  record
-- KEYS[2]  index of the record's bucket
-- KEYS[3]  users of the record's bucket
-- KEYS[4]  events of the record's bucket
-- ARGV[1]  default age (ms)
-- ARGV[2]  idle timeout (ms, 0 for none)
-- ARGV[3]  absolute timeout (ms, 0 for none)
-- ARGV[4]  number of events that a bucket keeps (0 for none)
-- ARGV[5]  1: write in any case, for a WAIT that follows; 0: only where a second has passed
-- ARGV[6]  client that uses the session; empty: not kept
--
-- Returns  {1, now (ms), deadline (ms), mode}
--          {0, now (ms), reason}   gone; the reason is empty if nothing is known of the session
--          {-4, now (ms), ""}      written by a newer release
local record, index, users, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local default_age, idle, absolute, kept, always, client = tonumber(ARGV[1]), tonumber(ARGV[2]),
  tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5] == "1", ARGV[6]

local now = store_clock()
local meta, why_not = read_meta(record, now)
if not meta then
  return why_not
end
local before, seen = meta.deadline, meta.seen
renew(meta, meta.mode, meta.span, now, default_age, idle, absolute)
if meta.deadline <= now then
  tell_expired(events, kept, record, meta)
  forget(record, index, users, meta)
  return {GONE, now, ""}
end
-- Once a second is enough: a page with thirty requests writes one touch.
if always or meta.deadline < before or math.max(meta.deadline - before, now - seen) >= 1000 then
  write_meta(record, index, users, meta)
  note_client(record, meta, client)
end
return {DONE, now, meta.deadline, meta.mode}
