-- Functions of all scripts: the packing of a record, and the deadline that its mode gives it.
--
-- A record is one hash:
--   m:         meta, packed by META below
--   m:lock     the session's lock, while it is held (lock.lua)
--   m:first    client that used it first since its user logged in, opaque here
--   m:last     client that used it last
--   m:past     of a session with encrypted values that has moved: names that it had, opaque here
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
--   locks   a hash: id -> holder of its lock and waiters for it (queue.lua)
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
local NOBODY = "\0\0\0\0\0\0\0\0"
local ID_BYTES = 43
-- token of the holder, end of the lease (ms), beginning (ms), 1 where the bucket's hash of locks has
-- an entry of it; then the holder's name
local LOCK, LOCK_BYTES = ">c16I6I6B", 29
local USER_FIELD = "d:_auth_user_id"

-- The store's clock (ms).
local time = redis.call("TIME")
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Returns the meta that the field m: of a record has; or nil and the reply that says why it has
-- none.
local function read_meta(packed, record)
  if packed and #packed == META_BYTES and string.find(packed, "^\1[dbsa]") then
    local _, mode, version, created, deadline, span, bytes, seen, user =
      struct.unpack(META, packed)
    -- With room for what is added: a table that grows costs more than all else here.
    return {mode = mode, version = version, created = created, deadline = deadline, span = span,
      bytes = bytes, seen = seen, user = user, is_moved = false}
  end
  if packed and packed ~= "" and string.byte(packed) ~= FORMAT then
    return nil, {NEWER, now, ""}
  end
  return nil, {GONE, now, redis.call("HGET", record, "m:end") or ""}
end
