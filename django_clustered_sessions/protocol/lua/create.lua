#!lua
-- Create a session; refuse where one exists, or was ended.
--
-- KEYS[1]  record
-- KEYS[2]  index of the record's bucket
-- KEYS[3]  users of the record's bucket
-- KEYS[4]  events of the record's bucket
-- ARGV[1]  token of this write, the version of all that it writes (8 bytes)
-- ARGV[2]  mode (d, b, s, a, r)
-- ARGV[3]  span (ms; for a: ms since the epoch)
-- ARGV[4]  options of a write (write.lua)
-- ARGV[5]  size of all values (bytes)
-- ARGV[6]  time of creation (ms) of a copy, whose values have their versions;
--          empty for a new one
-- ARGV[7]  tag of the user (8 bytes)
-- ARGV[8]  client that uses the session; empty: not kept, or among the values of a copy
-- ARGV[9..] field, value (codec and payload), field, value, ...
--
-- Returns  {1, now (ms), deadline (ms), swept}  created, or created by this token before; swept:
--               number of expired sessions of the bucket that have left the index
--          {1, now (ms), deadline (ms), swept}  deadline not after now: expired at once, nothing
--               stored
--          {-1, now (ms)}                exists
--
-- Includes: prelude
-- Includes: write

local record, index, users, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local token, mode, span = ARGV[1], ARGV[2], tonumber(ARGV[3])
local _, default_age, idle, absolute, _, kept = struct.unpack(OPTIONS, ARGV[4])
local bytes, created, user, client = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7], ARGV[8]
local FIRST_FIELD = 9
local version = created and "" or token

if redis.call("EXISTS", record) == 1 then
  local packed = redis.call("HGET", record, "m:")
  local meta = read_meta(packed, record)
  if meta and meta.version == token then
    -- A write, as a WAIT may follow, which asks whether replicas have this connection's writes.
    redis.call("HSET", record, "m:", packed)
    return {DONE, now, meta.deadline, 0}
  end
  return {EXISTS, now}
end

local meta = {version = token, created = created or now, bytes = bytes, user = user}
renew(meta, mode, span, default_age, idle, absolute)
if meta.deadline > now then
  local values = {"m:", ""}
  for i = FIRST_FIELD, #ARGV, 2 do
    values[#values + 1] = ARGV[i]
    values[#values + 1] = version .. ARGV[i + 1]
  end
  write_meta(record, index, users, meta, values, client)
end
local before_now = string.format("%.0f", now)
local swept = redis.call("ZCOUNT", index, "(-" .. before_now, "(" .. before_now)
if swept > 0 or kept > 0 then
  -- Includes: removal
  if kept > 0 and not created and meta.deadline > now then
    tell(events, kept, "created", string.sub(record, -ID_BYTES), user,
      redis.call("HGET", record, USER_FIELD))
  end
  swept = sweep(index, users, now, events, kept)
end
return {DONE, now, meta.deadline, swept}
