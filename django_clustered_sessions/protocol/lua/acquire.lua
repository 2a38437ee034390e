#!lua
-- Take a session's lock, or a place in the queue for it. First come, first served.
--
-- Includes: lock
--
-- KEYS[1]  record
-- KEYS[2]  locks of the record's bucket
-- ARGV[1]  token of the request (16 characters)
-- ARGV[2]  its name, for others to see (255 bytes at most)
-- ARGV[3]  longest wait from now on (ms)
-- ARGV[4]  lease (ms)
-- ARGV[5]  time that the next holder has to take the lock (ms)
-- ARGV[6]  largest number of waiters; -1: this one does not count
-- ARGV[7]  token of a holder inside whose lock this request runs, or empty
-- ARGV[8]  life of a bucket's hash of locks after the last one was taken (ms)
--
-- Returns  {1, now (ms), since (ms)}                  the lock is this token's, since then
--          {2, now (ms), since (ms)}                  the lock is the token's of ARGV[7]
--          {0, now (ms), reason}                      gone; empty if nothing is known of it
--          {-4, now (ms), ""}                         written by a newer release
--          {-5, now (ms), since (ms), name, lease left (ms), place}   another holds it; this one
--               has that place in the queue
--          {-6, now (ms), since (ms), name, waiting}  another holds it, and too many wait
local record, locks = KEYS[1], KEYS[2]
local token, name, wait, lease, claim, most, inside, remember =
  ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]),
  ARGV[7], tonumber(ARGV[8])

-- Forgets locks whose holders died and whose sessions were not used since.
local function tidy(now)
  local all = redis.call("HGETALL", locks)
  for i = 1, #all, 2 do
    local _, _, since = struct.unpack(ENTRY, all[i + 1])
    if since + remember < now then
      redis.call("HDEL", locks, all[i])
    end
  end
end

local now = store_clock()
local meta, why_not = read_meta(record, now)
if not meta then
  return why_not
end
local lock = read_lock(record)
if lock and lock.token == inside then
  return {INSIDE, now, lock.since}
end
local entry = {token = token, waits_until = now + wait, since = now, capped = most >= 0, name = name}
local queue, holder = {}, nil
if lock then
  queue, holder = read_queue(record, locks, lock)
  if is_over(lock, now) and lock.token ~= token then
    lock, holder = hand_on(record, locks, queue, now, claim, token)
  end
end

if not lock or lock.token == token then
  lock = {token = token, lease = now + lease, since = lock and math.min(lock.since, now) or now}
  write_lock(record, lock)
  if not holder then
    write_queue(record, locks, entry, queue)
  end
  redis.call("PEXPIRE", locks, remember)
  if redis.call("HLEN", locks) > 64 then
    tidy(now)
  end
  return {DONE, now, lock.since}
end

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
  if wait <= 0 or (entry.capped and waiting >= most) then
    return {FULL, now, lock.since, holder and holder.name or "", waiting}
  end
  queue[#queue + 1] = entry
  place = #queue
  write_queue(record, locks, holder, queue)
  redis.call("PEXPIRE", locks, remember)
end
return {HELD, now, lock.since, holder and holder.name or "", lock.lease - now, place}
