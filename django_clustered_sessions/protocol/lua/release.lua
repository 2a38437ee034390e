#!lua flags=allow-oom
-- Give up a session's lock, or the place in the queue for it.
--
-- KEYS[1]  record
-- KEYS[2]  locks of the record's bucket
-- KEYS[3]  mailbox of the token
-- ARGV[1]  token that gives up
-- ARGV[2]  time that the next holder has to take the lock (ms)
--
-- Returns  {1, now (ms), since (ms)}   the lock was this token's since then
--          {0, now (ms), ""}           it was not
--
-- Includes: prelude
-- Includes: lock

local record, locks, mailbox = KEYS[1], KEYS[2], KEYS[3]
local token, claim = ARGV[1], tonumber(ARGV[2])

local lock = read_lock(redis.call("HGET", record, "m:lock"))
local is_holder = lock and lock.token == token
if is_holder and not lock.is_listed then
  redis.call("HDEL", record, "m:lock")
elseif lock then
  -- Includes: queue
  local queue = read_queue(record, locks, lock)
  if is_holder then
    hand_on(record, locks, queue, now, claim, mailbox)
  end
  for i, entry in ipairs(is_holder and {} or queue) do
    if entry.token == token then
      table.remove(queue, i)
      write_queue(record, locks, lock, queue)
      -- The one behind it is behind another now.
      redis.call("RPUSH", mailbox, "1")
      redis.call("PEXPIRE", mailbox, claim)
      break
    end
  end
end
if is_holder then
  return {DONE, now, lock.since}
end
return {GONE, now, ""}
