#!lua
-- Write the changes of a request into a session that exists: all of them, or none.
--
-- Includes: write
-- Includes: lock
--
-- KEYS[1]  record
-- KEYS[2]  index of the record's bucket
-- KEYS[3]  locks of the record's bucket
-- KEYS[4]  users of the record's bucket
-- KEYS[5]  events of the record's bucket
-- KEYS[6]  recent writes to the bucket's sessions
-- KEYS[7]  the same, where it is the other one's turn
-- ARGV[1]  token of this write, the version of all that it writes (8 bytes)
-- ARGV[2]  time in which a write may be replayed (ms)
-- ARGV[3]  default age (ms)
-- ARGV[4]  idle timeout (ms, 0 for none)
-- ARGV[5]  absolute timeout (ms, 0 for none)
-- ARGV[6]  number of events that a bucket keeps (0 for none)
-- ARGV[7]  largest size of all values (bytes)
-- ARGV[8]  new mode (d, b, s, a, r), empty to leave mode and span as they are
-- ARGV[9]  new span (ms; for a: ms since the epoch)
-- ARGV[10] 1: write over others' changes; 0: report them
-- ARGV[11] 1: remove all stored values first; 0: do not
-- ARGV[12] token of the lock that this is written under, or empty: then it is refused while
--          another's lock is held, and ends one whose lease is over
-- ARGV[13] 1: release that lock once this is written; 0: keep it
-- ARGV[14] time that the next holder has to take the lock (ms)
-- ARGV[15] tag of the user, if that changes (8 bytes); empty: it does not
-- ARGV[16] client that uses the session; empty: not kept
-- ARGV[17] tag of the user to whom it has to belong still (8 bytes); empty: any
-- ARGV[18..] operation, field, version that was loaded (empty: there was none), operand; ...
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
--          {-2, now (ms), field, value, field, value, ...}   others changed these, or a counter
--               is no integer that Lua can add to; the value is the stored one, empty for none
--          {-3, now (ms), bytes}   too large
--          {-4, now (ms), ""}      written by a newer release
--          {-5, now (ms), since (ms), name}   another has held the lock since then
--          {-7, now (ms), since (ms), name}   the lock was lost; its holder now, empty if none
local record, index, locks, users, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local writes, other_writes = KEYS[6], KEYS[7]
local token, replay_window, default_age, idle, absolute, kept, max_bytes = ARGV[1],
  tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]),
  tonumber(ARGV[7])
local mode, span, overwrite, clear = ARGV[8], tonumber(ARGV[9]), ARGV[10] == "1", ARGV[11] == "1"
local fence, release, claim, user = ARGV[12], ARGV[13] == "1", tonumber(ARGV[14]), ARGV[15]
local client, whose = ARGV[16], ARGV[17]
local FIRST_CHANGE = 18
local EXACT = 2 ^ 53

-- Returns the earlier answer to this write; nothing where it is new, or too old to be replayed.
local function answer_before()
  return redis.call("HGET", writes, token) or redis.call("HGET", other_writes, token)
end

-- Keeps the answer for `replay_window` at least. The writes of one such stretch of time are in one
-- hash and those of the next in the other, which has expired by then: forgetting costs nothing.
local function keep_answer(answer, now)
  local stretch = math.floor(now / replay_window)
  if stretch % 2 == 1 then
    writes, other_writes = other_writes, writes
  end
  redis.call("HSET", writes, token, answer)
  redis.call("PEXPIREAT", writes, string.format("%.0f", (stretch + 2) * replay_window - 1))
end

-- Returns the answer of the newest write, of any age: its counters are as it left them.
local function newest_answer()
  local counters = {}
  for i = FIRST_CHANGE, #ARGV, 4 do
    if ARGV[i] == "+" then
      counters[#counters + 1] = string.sub(redis.call("HGET", record, ARGV[i + 1]) or "", 10)
    end
  end
  return table.concat(counters, " ")
end

-- Returns the integer in a stored value, 0 where there is none, nil where it is no exact integer.
local function counter(stored)
  if not stored then
    return 0
  end
  local codec, payload = string.sub(stored, 9, 9), string.sub(stored, 10)
  if codec == "i" and string.match(payload, "^%-?%d+$") then
    local number = tonumber(payload)
    return math.abs(number) < EXACT and number or nil
  end
end

local now = store_clock()
local meta, why_not = read_meta(record, now)
if not meta then
  local answer = redis.call("HGET", record, "m:end") == "" and answer_before()
  if answer then
    write_again(record, "m:end")
    return {DONE, now, now, 0, answer, ""}
  end
  return why_not
end
local first_answer = answer_before() or (meta.version == token and newest_answer())
if first_answer then
  write_again(record, "m:")
  return {DONE, now, meta.deadline, 0, first_answer, ""}
end
if whose ~= "" and meta.user ~= whose and meta.user ~= user then
  return {GONE, now, "rotated"}
end
local lock = read_lock(record)
local refusal = refuse(record, locks, lock, fence, now, claim)
if refusal then
  return refusal
end

local sets, removes, counters = {}, {}, {}
local conflicts, overwritten = {CONFLICT, now}, 0
local bytes = clear and 0 or meta.bytes
for i = FIRST_CHANGE, #ARGV, 4 do
  local operation, field, loaded, operand = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local stored = not clear and redis.call("HGET", record, field) or nil
  if stored == "" then
    -- Another program damaged it. In a reply it could not be told from no value.
    stored = nil
  end
  local changed_by_others
  if operation == "+" then
    local number = counter(stored)
    number = number and number + tonumber(operand)
    if number and math.abs(number) < EXACT then
      operand = string.format("%.0f", number)
      counters[#counters + 1] = operand
      operand = "i" .. operand
    else
      changed_by_others = true
    end
  else
    changed_by_others = not clear and loaded ~= (stored and string.sub(stored, 1, 8) or "")
      and (stored or operation ~= "-")
    if changed_by_others and overwrite and operation ~= "#" then
      changed_by_others = false
      overwritten = overwritten + 1
    end
  end
  if changed_by_others then
    conflicts[#conflicts + 1] = field
    conflicts[#conflicts + 1] = stored or ""
  end
  if stored then
    bytes = bytes - #field - #stored
  end
  if operation == "-" then
    removes[#removes + 1] = field
  else
    sets[#sets + 1] = field
    sets[#sets + 1] = token .. operand
    bytes = bytes + #field + 8 + #operand
  end
end
if #conflicts > 2 then
  return conflicts
end
if bytes > max_bytes and bytes > meta.bytes then
  return {TOO_LARGE, now, bytes}
end

if clear then
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

local answer = table.concat(counters, " ")
keep_answer(answer, now)

if mode == "" then
  mode, span = meta.mode, meta.span
end
local before = meta.version
meta.version, meta.bytes = token, bytes
if user ~= "" then
  change_user(record, index, users, meta, user, now)
end
renew(meta, mode, span, now, default_age, idle, absolute)
if meta.deadline > now then
  write_meta(record, index, users, meta, sets)
  note_client(record, meta, client)
  if lock and (release or fence == "") then
    local queue = read_queue(record, locks, lock)
    hand_on(record, locks, queue, now, claim)
  end
else
  dismiss(record, locks, lock and read_queue(record, locks, lock) or {}, claim)
  tell_expired(events, kept, record, meta)
  forget(record, index, users, meta)
  -- For a replay of this write, which is no write to a session that is gone.
  redis.call("HSET", record, "m:end", "")
  redis.call("PEXPIRE", record, replay_window)
end
return {DONE, now, meta.deadline, overwritten, answer, before}
