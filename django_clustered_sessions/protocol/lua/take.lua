#!lua flags=allow-oom
-- Take events of a bucket to handle them: what was taken and not finished in time, then new ones.
-- All workers are one consumer: what counts is how long ago an event was taken, and those that are
-- no more leave nothing behind.
--
-- KEYS[1]  events of the bucket
-- ARGV[1]  how many at most
-- ARGV[2]  how long who takes an event has to finish it (ms)
--
-- Returns  {1, now (ms), event, event, ...}   each: its id in the stream, and a list of its fields
--               and their values
local events = KEYS[1]
local most, lease = tonumber(ARGV[1]), ARGV[2]

local function has_group()
  for _, group in ipairs(redis.call("XINFO", "GROUPS", events)) do
    if group[2] == "workers" then
      return true
    end
  end
end

local now = store_clock()
local taken = {DONE, now}
if redis.call("EXISTS", events) == 0 then
  return taken
end
if not has_group() then
  -- From the beginning: what happened before there was a worker is handled as well.
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
