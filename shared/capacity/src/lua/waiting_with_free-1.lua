-- Open agents with a free slot although work waits that could take it: a page of the two indexes of free agents. Changes nothing.
--
-- Input   KEYS 1: meta. ARGV [5] first rank, [6] most agents looked at.
-- Output  how many were looked at, {agent, ...}
local from, count = tonumber(ARGV[5]), tonumber(ARGV[6])
local looked_at, out = 0, {}
for _, key in ipairs({ free_key, free_external_key }) do
  local page = {}
  if looked_at < count then page = call('ZRANGE', key, from, from + count - looked_at - 1) end
  local pool_waits = call('ZCARD', key == free_key and pool_queue or external_key) > 0
  for _, id in ipairs(page) do
    if pool_waits or call('ZCARD', base .. 'queue:' .. id) > 0 then out[#out + 1] = id end
  end
  looked_at = looked_at + #page
  from = math.max(from - call('ZCARD', key), 0)
end
return { 1, tonumber(meta[3]), looked_at, out }
