#!lua
-- Create a session; refuse where one exists, or was ended.
--
-- Includes: write
--
-- KEYS[1]  record
-- KEYS[2]  index of the record's bucket
-- KEYS[3]  users of the record's bucket
-- KEYS[4]  events of the record's bucket
-- ARGV[1]  token of this write, the version of all that it writes (8 bytes)
-- ARGV[2]  mode (d, b, s, a, r)
-- ARGV[3]  span (ms; for a: ms since the epoch)
-- ARGV[4]  default age (ms)
-- ARGV[5]  idle timeout (ms, 0 for none)
-- ARGV[6]  absolute timeout (ms, 0 for none)
-- ARGV[7]  number of events that a bucket keeps (0 for none)
-- ARGV[8]  size of all values (bytes)
-- ARGV[9]  time of creation (ms) of a copy, whose values have their versions;
--          empty for a new one
-- ARGV[10] tag of the user (8 bytes)
-- ARGV[11] client that uses the session; empty: not kept, or among the values of a copy
-- ARGV[12..] field, value (codec and payload), field, value, ...
--
-- Returns  {1, now (ms), deadline (ms), swept}  created, or created by this token before; swept:
--               number of expired sessions of the bucket that have left the index
--          {1, now (ms), deadline (ms), swept}  deadline not after now: expired at once, nothing
--               stored
--          {-1, now (ms)}                exists
local record, index, users, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local token, mode, span = ARGV[1], ARGV[2], tonumber(ARGV[3])
local default_age, idle, absolute = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local kept, bytes, created = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local user, client = ARGV[10], ARGV[11]
local FIRST_FIELD = 12
local version = created and "" or token

local now = store_clock()
if redis.call("EXISTS", record) == 1 then
  local meta = read_meta(record, now)
  if meta and meta.version == token then
    write_again(record, "m:")
    return {DONE, now, meta.deadline, 0}
  end
  return {EXISTS, now}
end

local meta = {version = token, created = created or now, bytes = bytes, user = user}
renew(meta, mode, span, now, default_age, idle, absolute)
if meta.deadline > now then
  local values = {}
  for i = FIRST_FIELD, #ARGV, 2 do
    values[#values + 1] = ARGV[i]
    values[#values + 1] = version .. ARGV[i + 1]
  end
  write_meta(record, index, users, meta, values)
  note_client(record, meta, client)
  if kept > 0 and not created then
    tell(events, kept, "created", session_id(record), user, redis.call("HGET", record, USER_FIELD))
  end
end
return {DONE, now, meta.deadline, sweep(index, users, now, events, kept)}
