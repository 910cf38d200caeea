-- A slot of one agent for a hold, or a place in the agent's queue. A hold that has a place keeps it.
--
-- Input   KEYS 1: meta. ARGV [5] agent, [6] member, [7] priority, [8] queue depth, [9] most promotions.
-- Output  'granted', agent, already, {member, agent, ...} promoted | 'queued', position, already, promoted | 'full', '', 0, promoted
--         already: 0 no, 1 there as asked, 2 there in another place or priority
local id, member, depth = ARGV[5], ARGV[6], tonumber(ARGV[8])

local before = present(member, id, tonumber(ARGV[7]), false)
if before then return finish(false, before) end

local agent, queue = agent_of(id), queue_of(id)
local waiting, room = call('ZCARD', queue), has_room(agent)

if room and waiting == 0 then
  grant(agent, member)
  note_free(agent)
  return finish(true, { 0, 0, 'granted', id, 0, {} })
end
if not room and waiting >= depth then
  return finish(false, { 0, 0, 'full', '', 0, {} })
end

if not agent.known then call('ZADD', agents_key, 0, id) end
call('ZADD', queue, score(tonumber(ARGV[7]), tail), member)
call('HSET', where_key, member, 'q' .. id)
tail = tail + 1
-- A slot is free although others wait: serve them in their order, this one among them.
local promoted = {}
if promote_from(queue, agent, tonumber(ARGV[9]), promoted) > 0 then note_free(agent) end
return queued_or_full(member, queue, depth, promoted)
