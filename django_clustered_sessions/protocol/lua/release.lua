#!lua flags=allow-oom
-- Give up a session's lock, or the place in the queue for it.
--
-- Includes: lock
--
-- KEYS[1]  record
-- KEYS[2]  locks of the record's bucket
-- KEYS[3]  mailbox of the token
-- ARGV[1]  token that gives up
-- ARGV[2]  time that the next holder has to take the lock (ms)
--
-- Returns  {1, now (ms), since (ms)}   the lock was this token's since then
--          {0, now (ms), ""}           it was not
local record, locks, mailbox = KEYS[1], KEYS[2], KEYS[3]
local token, claim = ARGV[1], tonumber(ARGV[2])

local now = store_clock()
redis.call("DEL", mailbox)
local lock = read_lock(record)
if not lock then
  return {GONE, now, ""}
end
local queue, holder = read_queue(record, locks, lock)
if lock.token == token then
  hand_on(record, locks, queue, now, claim)
  return {DONE, now, lock.since}
end
for i, entry in ipairs(queue) do
  if entry.token == token then
    table.remove(queue, i)
    write_queue(record, locks, holder, queue)
    break
  end
end
return {GONE, now, ""}
