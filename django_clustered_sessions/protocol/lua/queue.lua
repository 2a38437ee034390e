-- Functions of the scripts that meet a lock which is another's, or which others wait for.
--
-- The waiters are in the bucket's hash of locks, under the session's id: entries one behind the
-- other, the holder's first, then the waiters', first come first. An entry: token (16), end of the
-- wait (6, ms; of no meaning in the holder's), beginning (6, ms), 1 if it counts against the caps
-- (1), length of the name (1), the name. A lock that nobody waits for is there only once its holder
-- has renewed it, for others to see.
--
-- A waiter sleeps at the mailbox of the one before it, <record>:<token>: the one who leaves pushes
-- into its own, whose name it knows, and so wakes the next. Nobody but the store knows who waits,
-- and a script is to be given all keys that it touches. All sleep at the session's mailbox as well,
-- <record>:ended.

local ENTRY, ENTRY_BYTES = ">c16I6I6BB", 30

local function is_over(lock, now)
  return lock.lease <= now or lock.since > now
end

local function write_lock(record, lock)
  redis.call("HSET", record, "m:lock", struct.pack(LOCK, lock.token, lock.lease, lock.since,
    lock.is_listed and 1 or 0) .. lock.name)
end

-- Returns the entries of those who wait for a lock.
local function read_queue(record, locks, lock)
  local packed = lock.is_listed and redis.call("HGET", locks, string.sub(record, -ID_BYTES)) or ""
  local queue, at = {}, 1
  while at + ENTRY_BYTES - 1 <= #packed do
    local entry, capped, length = {}, nil, nil
    entry.token, entry.waits_until, entry.since, capped, length, at =
      struct.unpack(ENTRY, packed, at)
    entry.capped, entry.name = capped == 1, string.sub(packed, at, at + length - 1)
    at = at + length
    if entry.token ~= lock.token then
      queue[#queue + 1] = entry
    end
  end
  return queue
end

-- Writes the entries of a lock that is listed, and removes them where it is not.
local function write_queue(record, locks, lock, queue)
  if not lock or not lock.is_listed then
    redis.call("HDEL", locks, string.sub(record, -ID_BYTES))
    return
  end
  local packed = {}
  for i = 0, #queue do
    local entry = i == 0 and lock or queue[i]
    packed[#packed + 1] = struct.pack(ENTRY, entry.token, entry.waits_until or entry.lease,
      entry.since, entry.capped and 1 or 0, #entry.name) .. entry.name
  end
  redis.call("HSET", locks, string.sub(record, -ID_BYTES), table.concat(packed))
end

-- Writes the entries of a lock that may not be listed yet, and keeps the bucket's hash for
-- `remember` ms at least. Forgets locks whose holders died and whose sessions were not used since.
local function list_lock(record, locks, lock, queue, now, remember)
  if not lock.is_listed then
    lock.is_listed = true
    write_lock(record, lock)
  end
  write_queue(record, locks, lock, queue)
  if redis.call("PTTL", locks) < remember then
    redis.call("PEXPIRE", locks, remember)
  end
  if redis.call("HLEN", locks) > 64 then
    local all = redis.call("HGETALL", locks)
    for i = 1, #all, 2 do
      local _, _, since = struct.unpack(ENTRY, all[i + 1])
      if since + remember < now then
        redis.call("HDEL", locks, all[i])
      end
    end
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

-- Gives the lock to the first waiter, which has `claim` ms to take it, and frees it where none
-- waits. Returns the new lock, or nil. With the `mailbox` of the one who had it, the waiter is woken;
-- without, its lease is over, and the waiter will look by itself.
local function hand_on(record, locks, queue, now, claim, mailbox)
  drop_late(queue, now)
  local first = table.remove(queue, 1)
  local lock
  if first then
    lock = {token = first.token, lease = now + claim, since = now, is_listed = #queue > 0,
      name = first.name}
    write_lock(record, lock)
    if mailbox then
      redis.call("RPUSH", mailbox, "1")
      redis.call("PEXPIRE", mailbox, claim)
    end
  else
    redis.call("HDEL", record, "m:lock")
  end
  write_queue(record, locks, lock, queue)
  return lock
end

-- Wakes all who wait for the lock of a session that has ended, or has left this key.
local function dismiss(record, locks, lock, claim, mailbox)
  if lock.is_listed then
    for _ in ipairs(read_queue(record, locks, lock)) do
      redis.call("RPUSH", mailbox, "1")
    end
    redis.call("PEXPIRE", mailbox, claim)
    redis.call("HDEL", locks, string.sub(record, -ID_BYTES))
  end
end

-- Returns nothing where a write under `fence` (empty: no lock) may go on, or the reply that
-- refuses it: the lock is another's, or was.
local function refuse(record, locks, lock, fence, now, claim)
  if lock and lock.token == fence then
    return
  end
  if lock and is_over(lock, now) then
    local queue = read_queue(record, locks, lock)
    drop_late(queue, now)
    if #queue > 0 then
      lock = hand_on(record, locks, queue, now, claim)
    elseif fence == "" then
      return
    end
  end
  if fence ~= "" then
    return {LOST, now, lock and lock.since or 0, lock and lock.name or ""}
  end
  if lock then
    return {HELD, now, lock.since, lock.name}
  end
end
