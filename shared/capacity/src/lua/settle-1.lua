-- An attempt is over: its slot goes to the next in the queue, or it leaves the queue. Anything else changes nothing.
--
-- Input   KEYS 1: meta. ARGV [5] member.
-- Output  released 0|1, dequeued 0|1, {member, agent} promoted
local kind, id = withdraw(ARGV[5])
if kind ~= 's' then
  local dequeued = kind == 'q'
  return finish(dequeued, { 0, 0, 0, dequeued and 1 or 0, {} })
end
-- A slot was freed in this very step: the only reason to promote, and for one only.
local agent, promoted = agent_of(id), {}
fill(agent, 1, promoted)
note_free(agent)
return finish(true, { 0, 0, 1, 0, promoted })
