-- Fills the agent's free slots: a repair, the end of a rebuild, the rest of a batch.
--
-- Input   KEYS 1: meta. ARGV [5] agent, [6] most promotions.
-- Output  applied 1, {member, agent, ...} promoted, more 0|1
local agent, promoted = agent_of(ARGV[5]), {}
fill(agent, tonumber(ARGV[6]), promoted)
note_free(agent)
local more = has_room(agent) and waiting_for(agent) > 0
return finish(#promoted > 0, { 0, 0, 1, promoted, more and 1 or 0 })
