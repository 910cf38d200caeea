-- What settle and reclaim share. Follows slots.lua.

local function settle(member)
  local kind, id = withdraw(member)
  if kind ~= 's' then
    local dequeued = kind == 'q'
    return finish(dequeued, { 0, 0, 0, dequeued and 1 or 0, {} })
  end
  -- A slot was freed in this very step: the only reason to promote, and for one only.
  local agent, promoted = agent_of(id), {}
  fill(agent, 1, promoted)
  note_free(agent)
  return finish(true, { 0, 0, 1, 0, promoted })
end
