-- Ends a hold-back and fills free slots. Not held back: nothing happens.
--
-- Input   KEYS 1: meta. ARGV [5] agent, [6] most promotions.
-- Output  applied 0|1, {member, agent, ...} promoted, more 0|1
local id = ARGV[5]
if call('HDEL', base .. 'agent:' .. id, 'held_back') == 0 then
  return finish(false, { 0, 0, 0, {}, 0 })
end
local agent, promoted = agent_of(id), {}
fill(agent, tonumber(ARGV[6]), promoted)
note_free(agent)
local more = has_room(agent) and waiting_for(agent) > 0
return finish(true, { 0, 0, 1, promoted, more and 1 or 0 })
