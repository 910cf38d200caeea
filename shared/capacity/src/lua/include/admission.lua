-- What both admissions share. Follows slots.lua.

-- The answer for a hold that has a place already, or nothing: kind, agent or rank from 1, already: 1, or 2 when that place is
-- not the one asked for, which is on or for the agent `target` ('' any that takes such work: `external`, needs no dispatch).
local function present(member, target, priority, external)
  local at = call('HGET', where_key, member)
  if not at then return nil end
  local kind, id = string.sub(at, 1, 1), string.sub(at, 2)
  if kind == 's' then
    local fits = target == id or target == '' and (external or not agent_of(id).external_only)
    return { 0, 0, 'granted', id, fits and 1 or 2, {} }
  end
  local queue = kind == 'q' and queue_of(id) or pool_queue
  local banded = tonumber(call('ZSCORE', queue, member) or 0)
  local fits = target == id and (kind == 'x') == external and math.floor(banded / BAND) == priority
  return { 0, 0, 'queued', (call('ZRANK', queue, member) or 0) + 1, fits and 1 or 2, {} }
end

-- The answer for a hold that was put into `queue` (index entry `at`) and may have been promoted by now. If it still waits
-- and there are too many before it came, it is taken out again.
local function queued_or_full(member, queue, depth, promoted)
  local at = call('HGET', where_key, member)
  if string.sub(at, 1, 1) == 's' then
    -- It is the hold's own grant, not one of the others'.
    local others = {}
    for i = 1, #promoted, 2 do
      if promoted[i] ~= member then
        others[#others + 1] = promoted[i]
        others[#others + 1] = promoted[i + 1]
      end
    end
    return finish(true, { 0, 0, 'granted', string.sub(at, 2), 0, others })
  end
  if call('ZCARD', queue) - 1 >= depth then
    call('ZREM', queue, member)
    call('ZREM', external_key, member)
    call('HDEL', where_key, member)
    return finish(#promoted > 0, { 0, 0, 'full', '', 0, promoted })
  end
  call('ZADD', unconfirmed_key, now, member)
  return finish(true, { 0, 0, 'queued', call('ZRANK', queue, member) + 1, 0, promoted })
end
