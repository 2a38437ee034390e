-- Functions of all scripts: the packing of a record, and the deadline that its mode gives it.
--
-- A record is one hash:
--   m:         meta, packed by META below
--   m:lock     holder of the session's lock (lock.lua)
--   m:first    client that used it first since its user logged in, opaque here
--   m:last     client that used it last
--   m:end      reason why the session ended; such a record is a tombstone and has no value. Empty:
--              a write let it expire, and may be replayed
--   m:next     in a tombstone: id under which the session goes on, where a user's got a new key
--   d:<key>    a value: version of the write that put it there (8), codec (1), payload
--   k:<key>    the same, for a session key that is no string: <key> as the serialiser wrote it
--
-- Beside the records of a bucket are kept, by the same scripts:
--   index   a sorted set of its sessions by their deadline: id, and behind it the user's tag
--   users   a hash: user's tag -> number of that user's sessions in the index; under the empty
--           name the number of all sessions with a user
--   events  a stream of events of its sessions that no worker has handled, where the site wants
--           them: kind (created, ended, expired), id, the user's tag, the field with the user,
--           reason of the tombstone, and the id under which the session goes on
--   evenwrites, oddwrites   hashes of recent writes, by turns: token (8 bytes) -> the answer
-- A user's tag is 8 bytes that a client makes of the user's key; NOBODY without a user.
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
-- format, mode, version, created (ms), deadline (ms), span (ms), size of all values (bytes), last
-- used (ms), tag of the user
local META, META_BYTES = ">Bc1c8I6I6I6I4I6c8", 46
local NOBODY = string.rep("\0", 8)
local ID_BYTES = 43
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
  meta.format, meta.mode, meta.version, meta.created, meta.deadline, meta.span, meta.bytes,
    meta.seen, meta.user = struct.unpack(META, packed)
  return meta
end

local function session_id(record)
  return string.match(record, "[^:]*$")
end
