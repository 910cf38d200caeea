-- A grant is in the log now. Given in another epoch and unknown here, it is taken again if a slot is free.
--
-- Input   KEYS 1: meta. ARGV [5] agent, [6] member, [7] epoch of the grant.
-- Output  'confirmed' | 'crowded' | 'reclaimed' | 'lost'
local id, member = ARGV[5], ARGV[6]
local at = call('HGET', where_key, member)

if at == 's' .. id then
  local removed = call('ZREM', unconfirmed_key, member)
  local agent = agent_of(id)
  local crowded = agent.known and agent.held > agent.capacity
  return finish(removed == 1, { 0, 0, crowded and 'crowded' or 'confirmed' })
end
-- In its own epoch a missing slot was settled or reclaimed: taking it again would leak it.
local elsewhere = at and string.sub(at, 1, 1) == 's'
if ARGV[7] == meta[1] or elsewhere then
  return finish(false, { 0, 0, 'lost' })
end
local agent = agent_of(id)
if not has_room(agent) then
  return finish(false, { 0, 0, 'lost' })
end
if at then withdraw(member) end
grant(agent, member)
call('ZREM', unconfirmed_key, member)
note_free(agent)
return finish(true, { 0, 0, 'reclaimed' })
