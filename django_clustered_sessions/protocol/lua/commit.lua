#!lua
-- Write the changes of a request into a session that exists: all of them, or none.
--
-- KEYS[1]  record
-- KEYS[2]  index of the record's bucket
-- KEYS[3]  locks of the record's bucket
-- KEYS[4]  users of the record's bucket
-- KEYS[5]  events of the record's bucket
-- KEYS[6]  recent writes to the bucket's sessions
-- KEYS[7]  the same, where it is the other one's turn
-- KEYS[8]  mailbox of the session
-- KEYS[9]  mailbox of the lock's token; only under a lock
-- ARGV[1]  token of this write, the version of all that it writes (8 bytes)
-- ARGV[2]  token of the lock that this is written under, or empty: then it is refused while
--          another's lock is held, and ends one whose lease is over
-- ARGV[3]  packed: options of a write (write.lua); 1: release that lock once this is written, 0: keep
--          it; time that the next holder has to take the lock (ms); 1: remove all stored values
--          first, 0: do not; new mode (d, b, s, a, r), "-" to leave mode and span as they are; new
--          span (ms; for a: ms since the epoch); behind its length (1 byte), tag of the user, if that
--          changes (8 bytes); empty: it does not; in the same way, tag of the user to whom it has to
--          belong still (8 bytes); empty: any; client that uses the session; empty: not kept
-- ARGV[4..] operation, field, version that was loaded (empty: there was none), operand; ...
--            =  set the field to the operand (codec and payload)
--            #  the same, and never over others' changes: the operand is a sum made by the client
--            -  remove the field; the operand is empty
--            +  add the operand (an integer) to a counter; the version is not looked at
--
-- Returns  {1, now (ms), deadline (ms), overwritten fields, counters, version}   written, or
--               written by this token before; counters: the new values, a space between them;
--               version: the record's before, empty if written before
--          {1, now (ms), deadline (ms), ...}   deadline not after now: expired by this write
--          {0, now (ms), reason}   gone; the reason is empty if nothing is known of the session,
--               "rotated" where it is another user's
--          {0, now (ms), "rotated", counters}   written by this token before it moved to another key
--          {-2, now (ms), field, value, field, value, ...}   others changed these, or a counter
--               is no integer that Lua can add to; the value is the stored one, empty for none
--          {-3, now (ms), bytes}   too large
--          {-4, now (ms), ""}      written by a newer release
--          {-5, now (ms), since (ms), name}   another has held the lock since then
--          {-7, now (ms), since (ms), name}   the lock was lost; its holder now, empty if none
--
-- Includes: prelude
-- Includes: write

local record, index, locks, users, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local writes, other_writes, ended_mailbox, mailbox = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local token, fence, packed = ARGV[1], ARGV[2], ARGV[3]
local replay_window, default_age, idle, absolute, max_bytes, kept, overwrites, behind =
  struct.unpack(OPTIONS, packed)
local release, claim, clear, mode, span, user, whose, behind =
  struct.unpack(">Bi8Bc1i8Bc0Bc0", packed, behind)
local client = string.sub(packed, behind)
local FIRST_CHANGE = 4
local EXACT = 2 ^ 53

local names = {"m:", "m:lock", ARGV[FIRST_CHANGE + 1]}
for i = FIRST_CHANGE + 5, #ARGV, 4 do
  names[#names + 1] = ARGV[i]
end
local stored = {}
-- In pieces: Lua's unpack fails near 8,000 values.
for first = 1, #names, 1000 do
  local piece = redis.call("HMGET", record, unpack(names, first, math.min(first + 999, #names)))
  if first == 1 then
    stored = piece
  else
    for i, value in ipairs(piece) do
      stored[first + i - 1] = value
    end
  end
end
local meta, why_not = read_meta(stored[1], record)
if not meta then
  local ended = redis.call("HGET", record, "m:end")
  local answer = (ended == "" or ended == "rotated")
    and (redis.call("HGET", writes, token) or redis.call("HGET", other_writes, token))
  if answer and ended ~= "" then
    return {GONE, now, ended, answer}
  elseif answer then
    -- A write, as a WAIT may follow, which asks whether replicas have this connection's writes.
    redis.call("HSET", record, "m:end", "")
    return {DONE, now, now, 0, answer, ""}
  end
  return why_not
end
local before, is_before_noted, first_answer = meta.version, true, nil
if before == token then
  -- The newest write, of any age: its counters are as it left them.
  local counters = {}
  for i = FIRST_CHANGE, #ARGV, 4 do
    if ARGV[i] == "+" then
      counters[#counters + 1] = string.sub(stored[(i - FIRST_CHANGE) / 4 + 3] or "", 10)
    end
  end
  first_answer = table.concat(counters, " ")
elseif now - meta.seen < replay_window then
  -- Otherwise no write from before the last use of the session can come again.
  local one = redis.call("HMGET", writes, token, before)
  local other = redis.call("HMGET", other_writes, token, before)
  first_answer, is_before_noted = one[1] or other[1], one[2] or other[2]
end
if first_answer then
  -- As above: a write for a WAIT.
  redis.call("HSET", record, "m:", stored[1])
  return {DONE, now, meta.deadline, 0, first_answer, ""}
end
if whose ~= "" and meta.user ~= whose and meta.user ~= user then
  return {GONE, now, "rotated"}
end
local lock
if stored[2] then
  -- Includes: lock
  lock = read_lock(stored[2])
end
if (lock and lock.token or "") ~= fence then
  -- Includes: queue
  local refusal = refuse(record, locks, lock, fence, now, claim)
  if refusal then
    return refusal
  end
end

local sets, removes, counters = {"m:", ""}, {}, {}
local conflicts, overwritten = nil, 0
local bytes = clear == 1 and 0 or meta.bytes
for i = FIRST_CHANGE, #ARGV, 4 do
  local operation, field, loaded, operand = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local value = clear == 0 and stored[(i - FIRST_CHANGE) / 4 + 3] or nil
  if value == "" then
    -- Another program damaged it. In a reply it could not be told from no value.
    value = nil
  end
  local changed_by_others
  if operation == "+" then
    local digits = value and string.match(value, "^i(%-?%d+)$", 9)
    local number = (digits or not value) and (tonumber(digits) or 0)
    local sum = number and math.abs(number) < EXACT and number + tonumber(operand)
    if sum and math.abs(sum) < EXACT then
      operand = string.format("%.0f", sum)
      counters[#counters + 1] = operand
      operand = "i" .. operand
    else
      changed_by_others = true
    end
  else
    changed_by_others = clear == 0 and loaded ~= (value and string.sub(value, 1, 8) or "")
      and (value or operation ~= "-")
    if changed_by_others and overwrites == 1 and operation ~= "#" then
      changed_by_others = false
      overwritten = overwritten + 1
    end
  end
  if changed_by_others then
    conflicts = conflicts or {CONFLICT, now}
    conflicts[#conflicts + 1] = field
    conflicts[#conflicts + 1] = value or ""
  end
  if value then
    bytes = bytes - #field - #value
  end
  if operation == "-" then
    removes[#removes + 1] = field
  else
    sets[#sets + 1] = field
    sets[#sets + 1] = token .. operand
    bytes = bytes + #field + 8 + #operand
  end
end
if conflicts then
  return conflicts
end
if bytes > max_bytes and bytes > meta.bytes then
  return {TOO_LARGE, now, bytes}
end

if clear == 1 then
  for _, field in ipairs(redis.call("HKEYS", record)) do
    local kind = string.sub(field, 1, 2)
    if kind == "d:" or kind == "k:" then
      redis.call("HDEL", record, field)
    end
  end
end
for _, field in ipairs(removes) do
  redis.call("HDEL", record, field)
end

meta.version, meta.bytes = token, bytes
if user ~= "" and user ~= meta.user then
  -- The session's life begins anew with a login.
  -- Includes: removal
  unlist(index, users, string.sub(record, -ID_BYTES), meta.user)
  redis.call("HDEL", record, "m:first", "m:last")
  meta.created = user == NOBODY and meta.created or now
  meta.user, meta.deadline = user, nil
end
if mode == "-" then
  mode, span = meta.mode, meta.span
end
renew(meta, mode, span, default_age, idle, absolute)
local answer = table.concat(counters, " ")
local notes = is_before_noted and {} or {before, ""}
if answer ~= "" or meta.deadline <= now then
  notes[#notes + 1] = token
  notes[#notes + 1] = answer
end
if #notes > 0 then
  -- Includes: notes
  note(writes, other_writes, notes, now, replay_window)
end
if meta.deadline > now then
  write_meta(record, index, users, meta, sets, client)
  if lock and (release == 1 or fence == "") then
    if lock.is_listed then
      -- Includes: queue
      hand_on(record, locks, read_queue(record, locks, lock), now, claim,
        mailbox)
    else
      redis.call("HDEL", record, "m:lock")
    end
  end
else
  -- Includes: removal
  -- Includes: queue
  if lock then
    dismiss(record, locks, lock, claim, ended_mailbox)
  end
  tell_expired(events, kept, record, meta)
  forget(record, index, users, meta)
  -- For a replay of this write, which is no write to a session that is gone.
  redis.call("HSET", record, "m:end", "")
  redis.call("PEXPIRE", record, replay_window)
end
return {DONE, now, meta.deadline, overwritten, answer, before}
