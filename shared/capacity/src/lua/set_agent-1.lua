-- What the log says of an agent now. An older setting than the stored one is ignored. Free slots are filled.
--
-- Input   KEYS 1: meta. ARGV [5] agent, [6] capacity, [7] open 0|1, [8] setting sequence, [9] most promotions,
--         [10] takes only what needs no dispatch 0|1.
-- Output  applied 0|1, {member, agent, ...} promoted, more 0|1
local id, key = ARGV[5], base .. 'agent:' .. ARGV[5]
local stored = call('HMGET', key, 'capacity', 'open', 'setting_seq', 'external_only')
if stored[3] and tonumber(ARGV[8]) < tonumber(stored[3]) then
  return finish(false, { 0, 0, 0, {}, 0 })
end
local changed = stored[1] ~= ARGV[6] or stored[2] ~= ARGV[7] or stored[3] ~= ARGV[8] or stored[4] ~= ARGV[10]
if changed then
  call('ZADD', agents_key, 0, id)
  call('HSET', key, 'capacity', ARGV[6], 'open', ARGV[7], 'setting_seq', ARGV[8],
    'external_only', ARGV[10])
  if stored[4] ~= ARGV[10] then note_closed(id) end
end
local agent, promoted = agent_of(id), {}
fill(agent, tonumber(ARGV[9]), promoted)
note_free(agent)
local more = has_room(agent) and waiting_for(agent) > 0
return finish(changed or #promoted > 0, { 0, 0, 1, promoted, more and 1 or 0 })
