#!lua flags=allow-oom
-- Add what a process has counted to its node's figures.
--
-- KEYS[1]  figures of the bucket
-- ARGV[1]  name of the node
-- ARGV[2]  the node's clock less the store's (ms)
-- ARGV[3]  how long a node may be silent before its figures join those of all former nodes (ms)
-- ARGV[4..] what to add to each counter, in the order of the release's list of counters; behind a
--          "^" what it is to be at least
--
-- A hash: node name -> "when it last reported (ms) its clock offset (ms) counter counter ...",
-- and under the empty name the sum over the nodes that are no more.
--
-- Returns  {1, now (ms)}
local figures = KEYS[1]
local node, offset, silence = ARGV[1], ARGV[2], tonumber(ARGV[3])

local function numbers(line)
  local list = {}
  for number in string.gmatch(line or "", "%S+") do
    list[#list + 1] = tonumber(number)
  end
  return list
end

local counts, is_maximum = {}, {}
for i = 4, #ARGV do
  local mark, number = string.match(ARGV[i], "^(%^?)(%-?%d+)$")
  counts[#counts + 1] = tonumber(number)
  is_maximum[#counts] = mark ~= ""
end

local function add(name, when, clock_offset, counts)
  local line = numbers(redis.call("HGET", figures, name))
  line[1], line[2] = when, clock_offset
  for i, count in ipairs(counts) do
    local before = line[i + 2] or 0
    line[i + 2] = is_maximum[i] and math.max(before, count) or before + count
  end
  for i, number in ipairs(line) do
    line[i] = string.format("%.0f", number)
  end
  redis.call("HSET", figures, name, table.concat(line, " "))
end

local now = store_clock()
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
return {DONE, now}
