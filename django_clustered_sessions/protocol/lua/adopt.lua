#!lua
-- Take a session over from another engine, once.
-- Refuse where one exists, or was ended, and where it was taken over before, even if it is gone.
--
-- KEYS[1]  record
-- KEYS[2]  index of the record's bucket
-- KEYS[3]  users of the record's bucket
-- KEYS[4]  sessions taken over into the record's bucket
-- KEYS[5]  events of the record's bucket
-- ARGV[1]  token of this write, the version of all that it writes (8 bytes)
-- ARGV[2]  mode (d, b, s, a, r)
-- ARGV[3]  span (ms; for a: ms since the epoch)
-- ARGV[4]  options of a write (write.lua)
-- ARGV[5]  size of all values (bytes)
-- ARGV[6]  tag of the user (8 bytes)
-- ARGV[7]  rest of its life, as the other engine says (ms)
-- ARGV[8]  life of the note that it was taken over (ms)
-- ARGV[9..] field, value (codec and payload), field, value, ...
--
-- Returns  {1, now (ms), deadline (ms), swept}  taken over; swept: as in create.lua
--          {-1, now (ms)}                       exists, or has existed
--
-- Includes: prelude
-- Includes: write
-- Includes: removal

local record, index, users, moved, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local token, mode, span = ARGV[1], ARGV[2], tonumber(ARGV[3])
local _, default_age, idle, absolute, _, kept = struct.unpack(OPTIONS, ARGV[4])
local bytes, user, left, memory = tonumber(ARGV[5]), ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local FIRST_FIELD = 9

local id = string.sub(record, -ID_BYTES)
if redis.call("EXISTS", record) == 1 or redis.call("ZSCORE", moved, id) then
  return {EXISTS, now}
end
local meta = {version = token, created = now, bytes = bytes, user = user}
renew(meta, mode, span, default_age, idle, absolute)
meta.deadline = math.min(meta.deadline, now + left)
if meta.deadline > now then
  local values = {"m:", ""}
  for i = FIRST_FIELD, #ARGV, 2 do
    values[#values + 1] = ARGV[i]
    values[#values + 1] = token .. ARGV[i + 1]
  end
  write_meta(record, index, users, meta, values, "")
end
local forgotten = string.format("%.0f", now + memory)
redis.call("ZADD", moved, forgotten, id)
redis.call("ZREMRANGEBYSCORE", moved, 0, string.format("%.0f", now))
-- For as long as the last of them; without NX a key that has no end would count as the last.
redis.call("PEXPIREAT", moved, forgotten, "NX")
redis.call("PEXPIREAT", moved, forgotten, "GT")
return {DONE, now, meta.deadline, sweep(index, users, now, events, kept)}
