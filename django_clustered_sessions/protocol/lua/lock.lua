-- Reads the lock in a session's record, where one step compares the owner and writes.
--
-- A lease that is over stays its holder's until another grant, or another's write, lands. One that
-- began in the future is over: the clock was set back, and a dead holder would keep it for as long.

-- Returns the lock in the field m:lock, or nil where it is free.
local function read_lock(packed)
  if packed and #packed >= LOCK_BYTES then
    local token, lease, since, is_listed = struct.unpack(LOCK, packed)
    return {token = token, lease = lease, since = since, is_listed = is_listed == 1,
      name = string.sub(packed, LOCK_BYTES + 1)}
  end
end
