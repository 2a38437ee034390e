#!lua flags=allow-oom
-- Find the sessions of one user in a bucket; mend the bucket's count of users where it is wrong.
--
-- KEYS[1]  index of the bucket
-- KEYS[2]  users of the bucket
-- ARGV[1]  tag of the user (8 bytes)
--
-- Returns  {1, now (ms), id, id, ...}
-- Includes: prelude
-- Includes: removal

local index, users = KEYS[1], KEYS[2]
local user = ARGV[1]

-- Counts the users anew: another program has changed the index or the count.
local function mend()
  redis.call("DEL", users)
  for _, member in ipairs(redis.call("ZRANGEBYSCORE", index, 0, "+inf")) do
    if #member == ID_BYTES + #NOBODY then
      add_user(users, string.sub(member, ID_BYTES + 1), 1)
    else
      redis.call("ZREM", index, member)
    end
  end
end

local found = {DONE, now}
local listed = redis.call("ZCOUNT", index, 0, "+inf")
if tonumber(redis.call("HGET", users, "") or 0) ~= listed then
  mend()
end
if redis.call("HEXISTS", users, user) == 1 then
  local after_now = string.format("(%.0f", now)
  for _, member in ipairs(redis.call("ZRANGEBYSCORE", index, after_now, "+inf")) do
    if string.sub(member, ID_BYTES + 1) == user then
      found[#found + 1] = string.sub(member, 1, ID_BYTES)
    end
  end
end
return found
