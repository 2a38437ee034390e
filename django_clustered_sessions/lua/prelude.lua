-- What all scripts share: how a record is packed, and how its deadline follows from its mode.
--
-- A record is one hash:
--   m:         meta, packed by META below
--   m:replay   recent writes: token (8 bytes), when (6, ms), length of the answer (2), the answer
--   m:lock     who holds the session's lock (lock.lua)
--   m:end      why the session ended; such a record is a tombstone and has no other field
--   d:<key>    a value: version of the write that put it there (8), codec (1), payload
--   k:<key>    the same, for a session key that is no string: <key> as the serialiser wrote it
--
-- Modes: "d" slides by the site's default age, "b" the same and the cookie ends with the browser,
-- "s" slides by a span (ms) of its own, "a" ends at its span (ms since the epoch). Callers may
-- also send "r": ends a span (ms) from now, which is stored as "a".
--
-- Every reply starts with a status: 1 done, 2 inside another's lock, 0 gone, -1 exists,
-- -2 conflict, -3 too large, -4 written by a newer release, -5 another holds the lock, -6 and too
-- many wait for it, -7 the lock was lost; then the store's clock in ms.

local DONE, INSIDE, GONE, EXISTS, CONFLICT, TOO_LARGE, NEWER = 1, 2, 0, -1, -2, -3, -4
local HELD, FULL, LOST = -5, -6, -7
local FORMAT = 1
-- format, mode, version, created (ms), deadline (ms), span (ms), size of all values (bytes)
local META, META_BYTES = ">Bc1c8I6I6I6I4", 32
local USER_FIELD = "d:_auth_user_id"

-- The version in a packed meta.
local function version_in(packed)
  return string.sub(packed, 3, 10)
end

local function store_clock()
  local time = redis.call("TIME")
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Returns the record's meta; or nil and the reply that says why there is none.
local function read_meta(record, now)
  local packed = redis.call("HGET", record, "m:")
  if packed and packed ~= "" and string.byte(packed) ~= FORMAT then
    return nil, {NEWER, now, ""}
  end
  if not packed or #packed ~= META_BYTES or not string.find(packed, "^.[dbsa]") then
    return nil, {GONE, now, redis.call("HGET", record, "m:end") or ""}
  end
  local meta = {}
  meta.format, meta.mode, meta.version, meta.created, meta.deadline, meta.span, meta.bytes =
    struct.unpack(META, packed)
  return meta
end

-- Sets meta.mode, span and deadline for a use of the session at `now`. Ages and idle are ms,
-- idle 0 means no idle timeout.
local function renew(meta, mode, span, now, default_age, idle)
  if mode == "r" then
    mode, span = "a", now + span
  end
  meta.mode, meta.span = mode, span
  if mode == "a" then
    meta.deadline = span
  else
    meta.deadline = now + (mode == "s" and span or default_age)
  end
  if idle > 0 then
    meta.deadline = math.min(meta.deadline, now + idle)
  end
end

local function session_id(record)
  return string.match(record, "[^:]*$")
end

local function forget(record, index)
  redis.call("DEL", record)
  redis.call("ZREM", index, session_id(record))
end

-- Stores the meta and all that follows from it. The index is scored by deadline, negative for a
-- session without a user: both kinds are counted exactly, and what has expired is the one range
-- from -now to now.
local function write_meta(record, index, meta)
  redis.call("HSET", record, "m:", struct.pack(META, FORMAT, meta.mode, meta.version,
    meta.created, meta.deadline, meta.span, meta.bytes))
  redis.call("PEXPIREAT", record, string.format("%.0f", meta.deadline))
  local sign = redis.call("HEXISTS", record, USER_FIELD) == 1 and "" or "-"
  redis.call("ZADD", index, sign .. string.format("%.0f", meta.deadline), session_id(record))
end

-- HSET in pieces: Lua's unpack fails near 8,000 values.
local function put(record, list)
  for first = 1, #list, 1000 do
    redis.call("HSET", record, unpack(list, first, math.min(first + 999, #list)))
  end
end

-- Writes what a field has once more. WAIT asks whether replicas have what its own connection wrote,
-- so a reply without a write would be taken for acknowledged by replicas that have nothing.
local function write_again(record, field)
  redis.call("HSET", record, field, redis.call("HGET", record, field))
end

-- Leaves a tombstone (kept for `keep` ms) where the session was.
local function bury(record, index, reason, keep)
  forget(record, index)
  redis.call("HSET", record, "m:end", reason)
  redis.call("PEXPIRE", record, keep)
end
