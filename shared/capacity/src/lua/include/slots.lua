-- Slots, queues and promotion, for the operations that need them. Follows guard.lua.
--
-- A score in a queue is priority * 2^49 + 2^48 + order, with order in (-2^48, 2^48): arrivals count up from 0 (tail),
-- requeues count down from -1 (head). The largest is below 10 * 2^49 < 2^53: exact.
local BAND, MIDDLE = 562949953421312, 281474976710656

local function slots_of(id) return base .. 'slots:' .. id end
local function queue_of(id) return base .. 'queue:' .. id end

local function score(priority, order)
  return whole(priority * BAND + MIDDLE + order)
end

-- The agent as it is now. `open` is false for one that is unknown, closed or held back.
local function agent_of(id)
  local f = call('HMGET', base .. 'agent:' .. id, 'capacity', 'open', 'held_back', 'external_only')
  return {
    id = id,
    known = f[1] ~= false,
    capacity = tonumber(f[1] or 0),
    open = f[2] == '1' and f[3] ~= '1',
    held_back = f[3] == '1',
    external_only = f[4] == '1',
    held = call('ZCARD', slots_of(id)),
  }
end

-- The only test that a grant or promotion must pass.
local function has_room(agent)
  return agent.open and agent.held < agent.capacity
end

-- Keeps the index of agents that may be offered work. Load in millionths: below 2^53 and floored, so the same everywhere.
local function note_free(agent)
  local key = agent.external_only and free_external_key or free_key
  if has_room(agent) then
    call('ZADD', key, whole(math.floor(agent.held * 1000000 / agent.capacity)), agent.id)
  else
    call('ZREM', key, agent.id)
  end
end

local function note_closed(id)
  call('ZREM', free_key, id)
  call('ZREM', free_external_key, id)
end

-- Puts a hold into the pool's queue.
local function wait_for_pool(member, rank, external)
  call('ZADD', pool_queue, rank, member)
  if external then call('ZADD', external_key, rank, member) end
  call('HSET', where_key, member, external and 'x' or 'p')
end

-- The part of the pool's queue that the agent may be given.
local function pool_part(agent)
  return agent.external_only and external_key or pool_queue
end

-- How many wait that the agent may be given.
local function waiting_for(agent)
  return call('ZCARD', queue_of(agent.id)) + call('ZCARD', pool_part(agent))
end

local function grant(agent, member)
  call('ZADD', slots_of(agent.id), now, member)
  call('HSET', where_key, member, 's' .. agent.id)
  call('ZADD', unconfirmed_key, now, member)
  agent.held = agent.held + 1
end

-- Promotes up to `limit` heads of one queue into free slots of the agent; appends member, agent to `out`.
local function promote_from(queue, agent, limit, out)
  if not has_room(agent) or limit <= 0 then return 0 end
  local count = math.min(limit, agent.capacity - agent.held)
  local heads = call('ZPOPMIN', queue, count)
  for i = 1, #heads, 2 do
    if queue == pool_queue then call('ZREM', external_key, heads[i]) end
    if queue == external_key then call('ZREM', pool_queue, heads[i]) end
    grant(agent, heads[i])
    out[#out + 1] = heads[i]
    out[#out + 1] = agent.id
  end
  return #heads / 2
end

-- Own queue first, then the pool's.
local function fill(agent, limit, out)
  local own = promote_from(queue_of(agent.id), agent, limit, out)
  return own + promote_from(pool_part(agent), agent, limit - own, out)
end

-- One promotion at a time into the least loaded agent, while somebody waits for the pool. First those that take nothing
-- but what needs no dispatch: the others are all that the rest has.
local function fill_pool(limit, out)
  local done = 0
  for _, key in ipairs({ free_external_key, free_key }) do
    local part = key == free_external_key and external_key or pool_queue
    while done < limit and call('ZCARD', part) > 0 do
      local id = call('ZRANGE', key, 0, 0)[1]
      if not id then break end
      local agent = agent_of(id)
      done = done + fill(agent, 1, out)
      note_free(agent)
    end
  end
  return done
end

-- Gives the hold's slot or place back. Answers what it was: 's' and the agent, 'q', or nothing.
local function withdraw(member)
  local at = call('HGET', where_key, member)
  if not at then return nil end
  call('HDEL', where_key, member)
  call('ZREM', unconfirmed_key, member)
  local kind, id = string.sub(at, 1, 1), string.sub(at, 2)
  if kind == 's' then
    -- Only who really was in the set has freed something.
    if call('ZREM', slots_of(id), member) == 1 then return 's', id end
    return nil
  end
  call('ZREM', kind == 'q' and queue_of(id) or pool_queue, member)
  if kind == 'x' then call('ZREM', external_key, member) end
  return 'q', id
end
