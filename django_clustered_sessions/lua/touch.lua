#!lua flags=allow-oom
-- Renew a session's deadline, as every use of a sliding session does.
--
-- KEYS[1]  record
-- KEYS[2]  index of the record's bucket
-- ARGV[1]  default age (ms)
-- ARGV[2]  idle timeout (ms, 0 for none)
-- ARGV[3]  1: write in any case, for a WAIT that follows; 0: only where the deadline moves on
--
-- Returns  {1, now (ms), deadline (ms), mode}
--          {0, now (ms), reason}   gone; the reason is empty if nothing is known of the session
--          {-4, now (ms), ""}      written by a newer release
local record, index = KEYS[1], KEYS[2]
local default_age, idle, always = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3] == "1"

local now = store_clock()
local meta, why_not = read_meta(record, now)
if not meta then
  return why_not
end
local before = meta.deadline
renew(meta, meta.mode, meta.span, now, default_age, idle)
if meta.deadline <= now then
  forget(record, index)
  return {GONE, now, ""}
end
-- Once a second is enough: a page with thirty requests writes one touch.
if always or meta.deadline < before or meta.deadline - before >= 1000 then
  write_meta(record, index, meta)
end
return {DONE, now, meta.deadline, meta.mode}
