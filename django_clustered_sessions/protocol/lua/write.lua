-- Functions of the scripts that write a session's record, and the bucket's keys beside it.

-- Options of every write: time in which it may be replayed (ms), default age (ms), idle timeout (ms,
-- 0 for none), absolute timeout (ms, 0 for none), largest size of all values (bytes), number of
-- events that a bucket keeps (0 for none), 1 where it wins over others' changes. In one argument,
-- as each argument costs the store time.
local OPTIONS = ">i8i8i8i8i8i8B"

-- Sets meta.mode, span, seen and deadline for a use of the session now. Ages are ms; `idle` is
-- the longest without a use, `absolute` the longest in all, 0 for any. A deadline that would move on
-- by less than a second stays, or by less than a hundredth of what is left, for a short life is to
-- last as long: expiry and index need no write then (meta.is_moved).
local function renew(meta, mode, span, default_age, idle, absolute)
  if mode == "r" then
    mode, span = "a", now + span
  end
  local deadline = span
  if mode ~= "a" then
    deadline = now + (mode == "s" and span or default_age)
  end
  if idle > 0 then
    deadline = math.min(deadline, now + idle)
  end
  if absolute > 0 then
    deadline = math.min(deadline, meta.created + absolute)
  end
  local before = meta.deadline
  local step = math.min(1000, (deadline - now) / 100)
  meta.is_moved = not before or deadline < before or deadline >= before + step
    or mode ~= meta.mode or span ~= meta.span
  meta.mode, meta.span, meta.seen = mode, span, now
  if meta.is_moved then
    meta.deadline = deadline
  end
end

-- Stores the meta and all that follows from it; `values` ("m:", room for the meta, then field, value,
-- ...); and the client that uses the session of a user, if it is told. The index is scored by deadline, negative for a session
-- without a user: both kinds are counted exactly, and the expired ones are the one range from -now
-- to now.
local function write_meta(record, index, users, meta, values, client)
  if client ~= "" and meta.user ~= NOBODY then
    redis.call("HSETNX", record, "m:first", client)
    values[#values + 1] = "m:last"
    values[#values + 1] = client
  end
  values[2] = struct.pack(META, FORMAT, meta.mode, meta.version, meta.created,
    meta.deadline, meta.span, meta.bytes, meta.seen, meta.user)
  -- In pieces: Lua's unpack fails near 8,000 values.
  for first = 1, #values, 1000 do
    redis.call("HSET", record, unpack(values, first, math.min(first + 999, #values)))
  end
  if meta.is_moved then
    redis.call("PEXPIREAT", record, meta.deadline)
    local id = string.sub(record, -ID_BYTES)
    if meta.user == NOBODY then
      redis.call("ZADD", index, -meta.deadline, id)
    elseif redis.call("ZADD", index, meta.deadline, id .. meta.user) == 1 then
      redis.call("HINCRBY", users, meta.user, 1)
      redis.call("HINCRBY", users, "", 1)
    end
  end
end
