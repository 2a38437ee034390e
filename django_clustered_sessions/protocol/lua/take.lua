#!lua flags=allow-oom
-- Take events of a bucket to handle them: those taken and not finished in time, then new ones.
-- All workers are one consumer: only the time since an event was taken counts, and former workers
-- leave nothing behind.
--
-- KEYS[1]  events of the bucket
-- ARGV[1]  largest number of events
-- ARGV[2]  time to finish an event (ms)
--
-- Returns  {1, now (ms), event, event, ...}   each: its id in the stream, and a list of its fields
--               and their values
--
-- Includes: prelude

local events = KEYS[1]
local most, lease = tonumber(ARGV[1]), ARGV[2]

local function has_group()
  for _, group in ipairs(redis.call("XINFO", "GROUPS", events)) do
    if group[2] == "workers" then
      return true
    end
  end
end

local taken = {DONE, now}
if redis.call("EXISTS", events) == 0 then
  return taken
end
if not has_group() then
  -- From the beginning: events before the first worker are handled as well.
  redis.call("XGROUP", "CREATE", events, "workers", 0)
end
local from, left = "-", most
repeat
  local found = redis.call("XAUTOCLAIM", events, "workers", "worker", lease, from, "COUNT", left)
  from = found[1]
  for _, event in ipairs(found[2]) do
    taken[#taken + 1] = event
  end
  left = most - #taken + 2
until from == "0-0" or left <= 0
if left > 0 then
  local found = redis.call("XREADGROUP", "GROUP", "workers", "worker", "COUNT", left, "STREAMS",
    events, ">")
  for _, event in ipairs(found and found[1][2] or {}) do
    taken[#taken + 1] = event
  end
end
return taken
