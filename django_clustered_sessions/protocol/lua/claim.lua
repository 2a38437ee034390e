#!lua
-- Claim a place among a user's sessions, for a login that is not written yet.
--
-- KEYS[1]  claims of the user
-- ARGV[1]  public id of the session
-- ARGV[2]  most sessions of the user; 0: any number
-- ARGV[3]  life of a claim (ms)
-- ARGV[4]  number of sessions known to count, whose ids come first; then those known not to
-- ARGV[5..] public id, public id, ...
--
-- A sorted set: public id -> time of the claim (ms).
--
-- Returns  {1, now (ms)}                          claimed, or claimed anew
--          {-6, now (ms), public id, public id, ...}   too many: these claims, the oldest first,
--               are neither known to count nor known not to
--
-- Includes: prelude

local claims = KEYS[1]
local id, most, lapse, counting =
  ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local FIRST_ID = 5

redis.call("ZREMRANGEBYSCORE", claims, "-inf", string.format("%.0f", now - lapse))
local known = {[id] = true}
for i = FIRST_ID, #ARGV do
  known[ARGV[i]] = true
end
local reply = {FULL, now}
for _, claimed in ipairs(redis.call("ZRANGEBYSCORE", claims, "-inf", "+inf")) do
  if not known[claimed] then
    reply[#reply + 1] = claimed
  end
end
local others = counting + #reply - 2
if most > 0 and others >= most then
  return reply
end
redis.call("ZADD", claims, string.format("%.0f", now), id)
redis.call("PEXPIRE", claims, lapse)
return {DONE, now}
