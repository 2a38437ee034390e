-- Functions of the scripts that respect a session's lock: its holder, and its waiters.
--
-- The holder is in the record, so that one step compares the owner and writes:
--   m:lock   token of the holder (16), end of the lease (6, ms), beginning (6, ms)
--
-- The waiters are in the bucket's hash of locks, under the session's id, while the lock is held:
-- entries one behind the other, the holder's first, then the waiters', first come first. An
-- entry: token (16), end of the wait (6, ms; of no meaning in the holder's), beginning (6, ms),
-- 1 if it counts against the caps (1), length of the name (1), the name.
--
-- A lease that is over stays its holder's until another grant, or another's write, lands. One that
-- began in the future is over: the clock was set back, and a dead holder would keep it for as long.
-- A waiter is woken by a push into a list of its own, <record>:<its token>, in the record's slot.

local LOCK, LOCK_BYTES = ">c16I6I6", 28
local ENTRY, ENTRY_BYTES = ">c16I6I6BB", 30

-- Returns the lock, or nil where it is free.
local function read_lock(record)
  local packed = redis.call("HGET", record, "m:lock")
  if packed and #packed == LOCK_BYTES then
    local lock = {}
    lock.token, lock.lease, lock.since = struct.unpack(LOCK, packed)
    return lock
  end
end

local function is_over(lock, now)
  return lock.lease <= now or lock.since > now
end

local function write_lock(record, lock)
  redis.call("HSET", record, "m:lock", struct.pack(LOCK, lock.token, lock.lease, lock.since))
end

-- Returns the entries of a session, and the holder's apart where it is among them.
local function read_queue(record, locks, lock)
  local packed = redis.call("HGET", locks, session_id(record)) or ""
  local queue, holder, at = {}, nil, 1
  while at + ENTRY_BYTES - 1 <= #packed do
    local entry, capped, length = {}, nil, nil
    entry.token, entry.waits_until, entry.since, capped, length, at =
      struct.unpack(ENTRY, packed, at)
    entry.capped, entry.name = capped == 1, string.sub(packed, at, at + length - 1)
    at = at + length
    if lock and entry.token == lock.token then
      holder = entry
    else
      queue[#queue + 1] = entry
    end
  end
  return queue, holder
end

local function write_queue(record, locks, holder, queue)
  local packed = {}
  for i = holder and 0 or 1, #queue do
    local entry = i == 0 and holder or queue[i]
    packed[#packed + 1] = struct.pack(ENTRY, entry.token, entry.waits_until, entry.since,
      entry.capped and 1 or 0, #entry.name) .. entry.name
  end
  if #packed > 0 then
    redis.call("HSET", locks, session_id(record), table.concat(packed))
  else
    redis.call("HDEL", locks, session_id(record))
  end
end

-- Removes the waiters whose time is over.
local function drop_late(queue, now)
  for i = #queue, 1, -1 do
    if queue[i].waits_until <= now then
      table.remove(queue, i)
    end
  end
end

local function wake(record, token, claim)
  local mailbox = record .. ":" .. token
  redis.call("RPUSH", mailbox, "1")
  redis.call("PEXPIRE", mailbox, claim)
end

-- Gives the lock to the first waiter, which has `claim` ms to take it, and frees it where none
-- waits. Returns the new lock, or nil. The token `asks` is not woken: it gets the answer anyway.
local function hand_on(record, locks, queue, now, claim, asks)
  drop_late(queue, now)
  local holder = table.remove(queue, 1)
  local lock
  if holder then
    lock = {token = holder.token, lease = now + claim, since = now}
    write_lock(record, lock)
    if holder.token ~= asks then
      wake(record, holder.token, claim)
    end
  else
    redis.call("HDEL", record, "m:lock")
  end
  write_queue(record, locks, holder, queue)
  return lock, holder
end

-- Wakes all waiters for a session that has ended, or has left this key.
local function dismiss(record, locks, queue, claim)
  for _, entry in ipairs(queue) do
    wake(record, entry.token, claim)
  end
  redis.call("HDEL", locks, session_id(record))
end

-- Returns nothing where a write under `fence` (empty: no lock) may go on, or the reply that
-- refuses it: the lock is another's, or was.
local function refuse(record, locks, lock, fence, now, claim)
  if lock and lock.token == fence then
    return
  end
  local queue, holder
  if lock then
    queue, holder = read_queue(record, locks, lock)
    if is_over(lock, now) then
      drop_late(queue, now)
      if #queue > 0 then
        lock, holder = hand_on(record, locks, queue, now, claim)
      elseif fence == "" then
        return
      end
    end
  end
  if fence ~= "" then
    return {LOST, now, lock and lock.since or 0, holder and holder.name or ""}
  end
  if lock then
    return {HELD, now, lock.since, holder and holder.name or ""}
  end
end
