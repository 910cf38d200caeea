-- The old hold goes, the new one waits at the head of its priority, and free slots are filled.
--
-- Input   KEYS 1: meta. ARGV [5] old member, [6] new member, [7] agent of the queue ('' the pool's), [8] priority,
--         [9] agent that is held back ('' none), [10] needs no dispatch 0|1,
--         [11] when the slot to be taken back was granted, ms ('' none), [12] when at the latest ('' none).
-- Output  released 0|1, dequeued 0|1, queued 0|1, {member, agent, ...} promoted
local old, new, target, refuser, granted, latest = ARGV[5], ARGV[6], ARGV[7], ARGV[9], ARGV[11], ARGV[12]
local promoted = {}

if old == new then
  -- It leaves only the very slot that is meant; whatever else it has by now it keeps.
  local at = call('HGET', where_key, old)
  local leaves = at and string.sub(at, 1, 1) == 's' and (refuser ~= '' or granted ~= '')
  if leaves and refuser ~= '' then leaves = at == 's' .. refuser end
  if leaves and (granted ~= '' or latest ~= '') then
    local since = tonumber(call('ZSCORE', slots_of(string.sub(at, 2)), old) or -1)
    leaves = (granted == '' or since == tonumber(granted)) and (latest == '' or since <= tonumber(latest))
  end
  if at and not leaves then return finish(false, { 0, 0, 0, 0, 0, promoted }) end
end

local kind, freed = withdraw(old)
local placed = call('HEXISTS', where_key, new) == 1
if not kind and placed then
  return finish(false, { 0, 0, 0, 0, 0, promoted })
end

if not placed then
  if refuser ~= '' then
    call('ZADD', agents_key, 0, refuser)
    call('HSET', base .. 'agent:' .. refuser, 'held_back', '1')
    note_closed(refuser)
  end
  if target ~= '' then
    call('ZADD', agents_key, 0, target)
    call('ZADD', queue_of(target), score(tonumber(ARGV[8]), head), new)
    call('HSET', where_key, new, 'q' .. target)
  else
    wait_for_pool(new, score(tonumber(ARGV[8]), head), ARGV[10] == '1')
  end
  head = head - 1
end

if kind == 's' then
  local agent = agent_of(freed)
  fill(agent, 1, promoted)
  note_free(agent)
end
-- Still waiting: any other free slot it could take.
if not placed and string.sub(call('HGET', where_key, new), 1, 1) ~= 's' then
  if target ~= '' then
    local agent = agent_of(target)
    if fill(agent, 1, promoted) > 0 then note_free(agent) end
  else
    fill_pool(1, promoted)
  end
end
return finish(true, { 0, 0, kind == 's' and 1 or 0, kind == 'q' and 1 or 0, placed and 0 or 1, promoted })
