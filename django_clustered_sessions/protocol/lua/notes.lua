-- Functions of the scripts that note writes which may come again: token (8 bytes) -> answer.
--
-- A write notes the one before it, whose token is the record's version until then, and itself only
-- where its answer is more than "written": a session that is written less often than a write can
-- come again needs no note. The notes of one such stretch of time are in one hash and those of the
-- next in the other, which has expired by then: forgetting costs nothing.

-- Writes `notes` (token, answer, ...) for `window` ms at least.
local function note(writes, other_writes, notes, now, window)
  local stretch = math.floor(now / window)
  if stretch % 2 == 1 then
    writes, other_writes = other_writes, writes
  end
  redis.call("HSET", writes, unpack(notes))
  redis.call("PEXPIREAT", writes, (stretch + 2) * window - 1)
end

-- Notes the newest write to a session that leaves this key: its repeat comes to the tombstone.
local function note_newest(writes, other_writes, meta, now, window)
  if now - meta.seen < window and redis.call("HEXISTS", writes, meta.version) == 0
    and redis.call("HEXISTS", other_writes, meta.version) == 0 then
    note(writes, other_writes, {meta.version, ""}, now, window)
  end
end
