#!lua
-- Take a session's lock, or a place in the queue for it. First come, first served.
--
-- KEYS[1]  record
-- KEYS[2]  locks of the record's bucket
-- ARGV[1]  token of the request (16 characters)
-- ARGV[2]  its name, for others to see (255 bytes at most)
-- ARGV[3]  token of a holder inside whose lock this request runs, or empty
-- ARGV[4]  packed: longest wait from now on (ms); lease (ms); time that the next holder has to take
--          the lock (ms); largest number of waiters, -1: this one does not count; life of a bucket's
--          hash of locks after the last one was listed (ms)
--
-- Returns  {1, now (ms), since (ms)}                  the lock is this token's, since then
--          {2, now (ms), since (ms)}                  the lock is the token's of ARGV[7]
--          {0, now (ms), reason}                      gone; empty if nothing is known of it
--          {-4, now (ms), ""}                         written by a newer release
--          {-5, now (ms), since (ms), name, lease left (ms), place, token, left (ms)}   another
--               holds it; this one has that place in the queue, behind that token, whose lease or
--               wait has so much left
--          {-6, now (ms), since (ms), name, waiting}  another holds it, and too many wait
--
-- Includes: prelude
-- Includes: lock

local record, locks = KEYS[1], KEYS[2]
local token, name, inside = ARGV[1], ARGV[2], ARGV[3]
local wait, lease, claim, most, remember = struct.unpack(">i8i8i8i8i8", ARGV[4])

local stored = redis.call("HMGET", record, "m:", "m:lock")
local meta, why_not = read_meta(stored[1], record)
if not meta then
  return why_not
end
local lock = read_lock(stored[2])
if lock and lock.token == inside then
  return {INSIDE, now, lock.since}
end
if lock and lock.token ~= token then
  -- Includes: queue
  local queue = read_queue(record, locks, lock)
  if is_over(lock, now) then
    lock = hand_on(record, locks, queue, now, claim)
  end
  if lock and lock.token ~= token then
    drop_late(queue, now)
    local place, waiting = nil, 0
    for i, other in ipairs(queue) do
      if other.token == token then
        place = i
      elseif other.capped then
        waiting = waiting + 1
      end
    end
    if not place then
      if wait <= 0 or (most >= 0 and waiting >= most) then
        return {FULL, now, lock.since, lock.name, waiting}
      end
      place = #queue + 1
      queue[place] =
        {token = token, waits_until = now + wait, since = now, capped = most >= 0, name = name}
      list_lock(record, locks, lock, queue, now, remember)
    end
    local before = place > 1 and queue[place - 1] or lock
    return {HELD, now, lock.since, lock.name, lock.lease - now, place, before.token,
      (before.waits_until or before.lease) - now}
  end
end
local since, is_listed = now, 0
if lock then
  since, is_listed = math.min(lock.since, now), lock.is_listed and 1 or 0
end
redis.call("HSET", record, "m:lock", struct.pack(LOCK, token, now + lease, since, is_listed) .. name)
return {DONE, now, since}
