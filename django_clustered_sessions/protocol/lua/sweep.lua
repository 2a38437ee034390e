#!lua flags=allow-oom
-- Take expired sessions out of a bucket's index, and tell of them; some at a time.
--
-- KEYS[1]  index of the bucket
-- KEYS[2]  users of the bucket
-- KEYS[3]  events of the bucket
-- ARGV[1]  number of events that a bucket keeps (0 for none)
--
-- Returns  {1, now (ms), swept}   swept: number that have left the index; 0: all have
-- Includes: prelude
-- Includes: removal

local index, users, events = KEYS[1], KEYS[2], KEYS[3]
local kept = tonumber(ARGV[1])

return {DONE, now, sweep(index, users, now, events, kept)}
