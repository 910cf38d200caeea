-- The agent left the pool: closes it for good (its setting stays as a mark, so that an older one can't bring it back)
-- and takes out what it has, a batch at a time.
--
-- Input   KEYS 1: meta. ARGV [5] agent, [6] setting sequence, [7] most members.
-- Output  applied 0|1, {member, score, ...} queued, {member, granted at, ...} held, more 0|1
local id, count, key = ARGV[5], tonumber(ARGV[7]), base .. 'agent:' .. ARGV[5]
local stored = call('HMGET', key, 'capacity', 'open', 'setting_seq', 'external_only')
if stored[3] and tonumber(ARGV[6]) < tonumber(stored[3]) then
  return finish(false, { 0, 0, 0, {}, {}, 0 })
end
local changed = stored[1] ~= '0' or stored[2] ~= '0' or stored[3] ~= ARGV[6] or stored[4] ~= '0'
if changed then
  call('ZADD', agents_key, 0, id)
  call('HSET', key, 'capacity', '0', 'open', '0', 'setting_seq', ARGV[6], 'external_only', '0')
  call('HDEL', key, 'held_back')
  note_closed(id)
end

local function take(set, most)
  local taken = most > 0 and call('ZPOPMIN', set, most) or {}
  for i = 1, #taken, 2 do
    call('HDEL', where_key, taken[i])
    call('ZREM', unconfirmed_key, taken[i])
  end
  return taken
end

local queued = take(queue_of(id), count)
local held = take(slots_of(id), count - #queued / 2)
local more = call('EXISTS', queue_of(id), slots_of(id)) > 0
return finish(changed or #queued + #held > 0, { 0, 0, 1, queued, held, more and 1 or 0 })
