-- A slot of the least loaded open agent for a hold, or a place in the pool's queue. A hold that has a place keeps it.
--
-- Input   KEYS 1: meta. ARGV [5] member, [6] priority, [7] queue depth, [8] most promotions.
-- Output  as in admit_to_agent
local member, depth = ARGV[5], tonumber(ARGV[7])

local before = present(member)
if before then return finish(false, before) end

local waiting = call('ZCARD', pool_queue)
local first = call('ZRANGE', free_key, 0, 0)[1]

if first and waiting == 0 and call('ZCARD', queue_of(first)) == 0 then
  local agent = agent_of(first)
  if has_room(agent) then
    grant(agent, member)
    note_free(agent)
    return finish(true, { 0, 0, 'granted', first, 0, {} })
  end
end
if not first and waiting >= depth then
  return finish(false, { 0, 0, 'full', '', 0, {} })
end

call('ZADD', pool_queue, score(tonumber(ARGV[6]), tail), member)
call('HSET', where_key, member, 'p')
tail = tail + 1
-- A slot is free although others wait: serve them in their order, this one among them.
local promoted = {}
fill_pool(tonumber(ARGV[8]), promoted)
return queued_or_full(member, pool_queue, depth, promoted)
