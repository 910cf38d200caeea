-- A slot of the least loaded open agent for a hold, or a place in the pool's queue. A hold that has a place keeps it.
-- What needs no dispatch goes to agents that take nothing else, if one of them has a slot.
--
-- Input   KEYS 1: meta. ARGV [5] member, [6] priority, [7] queue depth, [8] most promotions, [9] needs no dispatch 0|1.
-- Output  as in admit_to_agent
local member, depth, external = ARGV[5], tonumber(ARGV[7]), ARGV[9] == '1'

local before = present(member, '', tonumber(ARGV[6]), external)
if before then return finish(false, before) end

local waiting = call('ZCARD', pool_queue)
local first = external and call('ZRANGE', free_external_key, 0, 0)[1] or call('ZRANGE', free_key, 0, 0)[1]

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

wait_for_pool(member, score(tonumber(ARGV[6]), tail), external)
tail = tail + 1
-- A slot is free although others wait: serve them in their order, this one among them.
local promoted = {}
fill_pool(tonumber(ARGV[8]), promoted)
return queued_or_full(member, pool_queue, depth, promoted)
