-- Functions of the scripts that write a session's record, and the bucket's keys beside it.

-- HSET in pieces: Lua's unpack fails near 8,000 values.
local function put(record, list)
  for first = 1, #list, 1000 do
    redis.call("HSET", record, unpack(list, first, math.min(first + 999, #list)))
  end
end

-- Sets meta.mode, span and deadline for a use of the session at `now`. Ages are ms; `idle` is the
-- longest without a use, `absolute` the longest in all, 0 for any.
local function renew(meta, mode, span, now, default_age, idle, absolute)
  if mode == "r" then
    mode, span = "a", now + span
  end
  meta.mode, meta.span, meta.seen = mode, span, now
  if mode == "a" then
    meta.deadline = span
  else
    meta.deadline = now + (mode == "s" and span or default_age)
  end
  if idle > 0 then
    meta.deadline = math.min(meta.deadline, now + idle)
  end
  if absolute > 0 then
    meta.deadline = math.min(meta.deadline, meta.created + absolute)
  end
end

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
    local user = redis.call("HGET", record, USER_FIELD)
    tell(events, kept, "expired", session_id(record), meta.user, user)
  end
end

local function forget(record, index, users, meta)
  redis.call("DEL", record)
  unlist(index, users, session_id(record), meta and meta.user or NOBODY)
end

-- Stores the meta and all that follows from it; and `values` (field, value, ...), if any. The index
-- is scored by deadline, negative for a session without a user: both kinds are counted exactly, and
-- the expired ones are the one range from -now to now.
local function write_meta(record, index, users, meta, values)
  values = values or {}
  values[#values + 1] = "m:"
  values[#values + 1] = struct.pack(META, FORMAT, meta.mode, meta.version, meta.created,
    meta.deadline, meta.span, meta.bytes, meta.seen, meta.user)
  put(record, values)
  local deadline, id = string.format("%.0f", meta.deadline), session_id(record)
  redis.call("PEXPIREAT", record, deadline)
  if meta.user == NOBODY then
    redis.call("ZADD", index, "-" .. deadline, id)
  elseif redis.call("ZADD", index, deadline, id .. meta.user) == 1 then
    add_user(users, meta.user, 1)
  end
end

-- Notes the client that uses the session of a user, if it is told.
local function note_client(record, meta, client)
  if client ~= "" and meta.user ~= NOBODY then
    if redis.call("HEXISTS", record, "m:first") == 0 then
      redis.call("HSET", record, "m:first", client)
    end
    redis.call("HSET", record, "m:last", client)
  end
end

-- Gives the session to another user from now on, or to none. Its life begins anew with a login.
local function change_user(record, index, users, meta, user, now)
  if user ~= meta.user then
    unlist(index, users, session_id(record), meta.user)
    redis.call("HDEL", record, "m:first", "m:last")
    meta.user = user
    meta.created = user == NOBODY and meta.created or now
  end
end

-- Writes a field's value once more. WAIT asks whether replicas have its own connection's writes, so
-- a reply without a write would count as acknowledged by replicas that have nothing.
local function write_again(record, field)
  redis.call("HSET", record, field, redis.call("HGET", record, field))
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
