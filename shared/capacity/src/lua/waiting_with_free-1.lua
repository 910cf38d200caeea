-- Open agents with a free slot although work waits that could take it: a page of the index of free agents. Changes nothing.
--
-- Input   KEYS 1: meta. ARGV [5] first rank, [6] most agents looked at.
-- Output  how many were looked at, {agent, ...}
local from, count = tonumber(ARGV[5]), tonumber(ARGV[6])
local free = call('ZRANGE', free_key, from, from + count - 1)
local pool_waits = call('ZCARD', pool_queue) > 0
local out = {}
for _, id in ipairs(free) do
  if pool_waits or call('ZCARD', base .. 'queue:' .. id) > 0 then out[#out + 1] = id end
end
return { 1, tonumber(meta[3]), #free, out }
