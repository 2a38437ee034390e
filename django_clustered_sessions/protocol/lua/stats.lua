#!lua flags=allow-oom
-- Add the counts of a process to its node's figures, and once in a while to their history.
--
-- KEYS[1]  figures of the bucket
-- KEYS[2]  history of the bucket
-- ARGV[1]  name of the node
-- ARGV[2]  the node's clock less the store's (ms)
-- ARGV[3]  silence after which the figures of a node join those of all former nodes (ms)
-- ARGV[4]  length of a slot of the history (ms)
-- ARGV[5]  number of slots kept
-- ARGV[6]  additions to the history, in lines "age (ms) counter counter ..."; empty for nothing
-- ARGV[7..] addition to each counter, in the order of the release's list of counters; behind a "^"
--          the least that it is to be, behind a "v" the most (0: any)
--
-- Figures are a hash: node name -> "last report (ms) its clock offset (ms) counter
-- counter ...", and under the empty name the sum over the former nodes. History is a
-- hash: "slot node name" -> "counter counter ...".
--
-- Returns  {1, now (ms)}
-- Includes: prelude

local figures, history = KEYS[1], KEYS[2]
local node, offset, silence = ARGV[1], ARGV[2], tonumber(ARGV[3])
local slot_length, slots, past = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local FIRST_COUNT = 7

local function numbers(line)
  local list = {}
  for number in string.gmatch(line or "", "%S+") do
    list[#list + 1] = tonumber(number)
  end
  return list
end

local function words(list)
  for i, number in ipairs(list) do
    list[i] = string.format("%.0f", number)
  end
  return table.concat(list, " ")
end

local counts, marks = {}, {}
for i = FIRST_COUNT, #ARGV do
  local mark, number = string.match(ARGV[i], "^([%^v]?)(%-?%d+)$")
  counts[#counts + 1] = tonumber(number)
  marks[#counts] = mark
end

local function combined(mark, one, other)
  if mark == "^" then
    return math.max(one, other)
  elseif mark == "v" and one > 0 and other > 0 then
    return math.min(one, other)
  end
  return one + other
end

local function add(name, when, clock_offset, counts)
  local line = numbers(redis.call("HGET", figures, name))
  line[1], line[2] = when, clock_offset
  for i, count in ipairs(counts) do
    line[i + 2] = combined(marks[i], line[i + 2] or 0, count)
  end
  redis.call("HSET", figures, name, words(line))
end

local function add_to_history(slot, counts)
  local name = string.format("%.0f %s", slot, node)
  local line = numbers(redis.call("HGET", history, name))
  for i, count in ipairs(counts) do
    line[i] = (line[i] or 0) + count
  end
  redis.call("HSET", history, name, words(line))
end

-- A node that is new to the bucket is rare, and the moment to look for those that are gone.
if redis.call("HEXISTS", figures, node) == 0 then
  local all = redis.call("HGETALL", figures)
  for i = 1, #all, 2 do
    local line = numbers(all[i + 1])
    if all[i] ~= "" and line[1] + silence < now then
      add("", line[1], 0, {unpack(line, 3)})
      redis.call("HDEL", figures, all[i])
    end
  end
end
add(node, now, tonumber(offset), counts)

if past ~= "" then
  local oldest = math.floor(now / slot_length) - slots
  for line in string.gmatch(past, "[^\n]+") do
    local span = numbers(line)
    local slot = math.floor((now - table.remove(span, 1)) / slot_length)
    add_to_history(slot, span)
  end
  for _, name in ipairs(redis.call("HKEYS", history)) do
    local slot = tonumber(string.match(name, "^%d+"))
    if not slot or slot <= oldest then
      redis.call("HDEL", history, name)
    end
  end
  redis.call("PEXPIRE", history, string.format("%.0f", slots * slot_length))
end
return {DONE, now}
