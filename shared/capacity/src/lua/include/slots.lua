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
  local f = call('HMGET', base .. 'agent:' .. id, 'capacity', 'open', 'held_back')
  return {
    id = id,
    known = f[1] ~= false,
    capacity = tonumber(f[1] or 0),
    open = f[2] == '1' and f[3] ~= '1',
    held_back = f[3] == '1',
    held = call('ZCARD', slots_of(id)),
  }
end

-- The only test that a grant or promotion must pass.
local function has_room(agent)
  return agent.open and agent.held < agent.capacity
end

-- Keeps the index of agents that may be offered work. Load in millionths: below 2^53 and floored, so the same everywhere.
local function note_free(agent)
  if has_room(agent) then
    call('ZADD', free_key, whole(math.floor(agent.held * 1000000 / agent.capacity)), agent.id)
  else
    call('ZREM', free_key, agent.id)
  end
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
    grant(agent, heads[i])
    out[#out + 1] = heads[i]
    out[#out + 1] = agent.id
  end
  return #heads / 2
end

-- Own queue first, then the pool's.
local function fill(agent, limit, out)
  local own = promote_from(queue_of(agent.id), agent, limit, out)
  return own + promote_from(pool_queue, agent, limit - own, out)
end

-- One promotion at a time into the least loaded agent, while somebody waits for the pool.
local function fill_pool(limit, out)
  local done = 0
  while done < limit and call('ZCARD', pool_queue) > 0 do
    local id = call('ZRANGE', free_key, 0, 0)[1]
    if not id then break end
    local agent = agent_of(id)
    done = done + fill(agent, 1, out)
    note_free(agent)
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
  return 'q', id
end
