-- Functions of the scripts that take sessions out of a bucket, and tell of it.

local function add_user(users, user, count)
  for _, name in ipairs({user, ""}) do
    if redis.call("HINCRBY", users, name, count) <= 0 then
      redis.call("HDEL", users, name)
    end
  end
end

-- Takes a session of a user, or of NOBODY, out of the index. Returns whether it was in it.
local function unlist(index, users, id, user)
  local was_listed = redis.call("ZREM", index, user == NOBODY and id or id .. user) == 1
  if was_listed and user ~= NOBODY then
    add_user(users, user, -1)
  end
  return was_listed
end

-- Returns the user's field of a session as it is told, empty for none. An encrypted one (codec e) of
-- a session that has moved can only be read with its past, the field m:past: then the codec is E,
-- and length (2) and bytes of the past stand behind it.
local function told_user(user, past)
  if user and past and string.sub(user, 9, 9) == "e" then
    return string.sub(user, 1, 8) .. "E" .. struct.pack(">I2", #past) .. past .. string.sub(user, 10)
  end
  return user or ""
end

-- Writes an event, where the newest `kept` of a bucket are kept; none for 0.
local function tell(events, kept, what, id, tag, user, why, successor)
  if kept > 0 then
    redis.call("XADD", events, "MAXLEN", kept, "*", "what", what, "id", id, "tag", tag,
      "user", user or "", "why", why or "", "successor", successor or "")
  end
end

-- Takes sessions that expired unnoticed out of the index, and tells of them; some at a time: a
-- bucket that fills also empties. Returns their number. A session exists until the end of the
-- millisecond of its deadline.
local function sweep(index, users, now, events, kept)
  local before_now, swept = string.format("%.0f", now), 0
  if kept == 0 then
    swept = redis.call("ZREMRANGEBYSCORE", index, "(-" .. before_now, "-0")
  end
  for _, member in ipairs(redis.call("ZRANGEBYSCORE", index, "(-" .. before_now,
    "(" .. before_now, "LIMIT", 0, 100)) do
    local id, tag = string.sub(member, 1, ID_BYTES), string.sub(member, ID_BYTES + 1)
    tag = tag == "" and NOBODY or tag
    unlist(index, users, id, tag)
    if #id == ID_BYTES and #tag == #NOBODY then
      tell(events, kept, "expired", id, tag)
    end
    swept = swept + 1
  end
  return swept
end

-- Tells that a session has expired whose record still exists.
local function tell_expired(events, kept, record, meta)
  if kept > 0 then
    local user = told_user(unpack(redis.call("HMGET", record, USER_FIELD, "m:past")))
    tell(events, kept, "expired", string.sub(record, -ID_BYTES), meta.user, user)
  end
end

local function forget(record, index, users, meta)
  redis.call("DEL", record)
  unlist(index, users, string.sub(record, -ID_BYTES), meta and meta.user or NOBODY)
end

-- Leaves a tombstone (kept for `keep` ms) where the session was. For the session of a user it has
-- the id under which that goes on, but not for an anonymous one: its new key is its next user's.
local function bury(record, index, users, meta, reason, keep, successor)
  forget(record, index, users, meta)
  redis.call("HSET", record, "m:end", reason)
  if successor and meta.user ~= NOBODY then
    redis.call("HSET", record, "m:next", successor)
  end
  redis.call("PEXPIRE", record, keep)
end
