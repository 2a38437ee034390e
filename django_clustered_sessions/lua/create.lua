#!lua
-- Create a session; refuse where one is, or where one was ended.
--
-- KEYS[1]  record
-- KEYS[2]  index of the record's bucket
-- ARGV[1]  token of this write, the version of all that it writes (8 bytes)
-- ARGV[2]  mode (d, b, s, a, r)
-- ARGV[3]  span (ms; for a: ms since the epoch)
-- ARGV[4]  default age (ms)
-- ARGV[5]  idle timeout (ms, 0 for none)
-- ARGV[6]  size of all values (bytes)
-- ARGV[7]  when it was created (ms) where it is a copy: then the values bring their versions;
--          empty for a new one
-- ARGV[8..] field, value (codec and payload), field, value, ...
--
-- Returns  {1, now (ms), deadline (ms)}  created, or created by this token before
--          {1, now (ms), deadline (ms)}  deadline not after now: expired at once, nothing stored
--          {-1, now (ms)}                exists
local record, index = KEYS[1], KEYS[2]
local token, mode, span, default_age, idle, bytes =
  ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local created = tonumber(ARGV[7])
local version = created and "" or token

local now = store_clock()
if redis.call("EXISTS", record) == 1 then
  local meta = read_meta(record, now)
  if meta and meta.version == token then
    write_again(record, "m:")
    return {DONE, now, meta.deadline}
  end
  return {EXISTS, now}
end

local meta = {version = token, created = created or now, bytes = bytes}
renew(meta, mode, span, now, default_age, idle)
if meta.deadline > now then
  local values = {}
  for i = 8, #ARGV, 2 do
    values[#values + 1] = ARGV[i]
    values[#values + 1] = version .. ARGV[i + 1]
  end
  put(record, values)
  write_meta(record, index, meta)
end
-- What expired without anybody asking leaves the index here: a bucket that fills also empties.
redis.call("ZREMRANGEBYSCORE", index, string.format("-%.0f", now), string.format("%.0f", now))
return {DONE, now, meta.deadline}
