-- Loads some of the pool. A hold that has a place keeps it, so a batch may be repeated.
--
-- Input   KEYS 1: meta. ARGV from [2], six each:
--         'a', agent, capacity, open 0|1, setting sequence, takes only what needs no dispatch 0|1 | 's', agent, member, granted at, '', ''
--         | 'q', agent ('' the pool's queue), member, priority, order, needs no dispatch 0|1
-- Output  1
if meta[2] ~= 'rebuilding' then return { -1, meta[1] } end
local BAND, MIDDLE = 562949953421312, 281474976710656
local tail, head, touched = tonumber(meta[3]), tonumber(meta[4]), {}

-- What lies under the name of an agent that this rebuild has not met is left over from an earlier life.
local function register(id)
  if call('ZADD', base .. 'agents', 'NX', 0, id) == 1 then
    call('UNLINK', base .. 'slots:' .. id, base .. 'queue:' .. id, base .. 'agent:' .. id)
  end
  touched[id] = true
end

for i = 2, #ARGV, 6 do
  local kind, id, a, b, c, external = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5]
  if id ~= '' then register(id) end
  if kind == 'a' then
    call('HSET', base .. 'agent:' .. id, 'capacity', a, 'open', b, 'setting_seq', c, 'external_only', external)
  elseif kind == 's' then
    if call('HSETNX', base .. 'where', a, 's' .. id) == 1 then call('ZADD', base .. 'slots:' .. id, b, a) end
  elseif call('HSETNX', base .. 'where', a, id ~= '' and 'q' .. id or external == '1' and 'x' or 'p') == 1 then
    local order = tonumber(c)
    local queue = id == '' and base .. 'queue' or base .. 'queue:' .. id
    local rank = string.format('%.0f', tonumber(b) * BAND + MIDDLE + order)
    call('ZADD', queue, rank, a)
    if id == '' and external == '1' then call('ZADD', base .. 'external', rank, a) end
    tail, head = math.max(tail, order + 1), math.min(head, order - 1)
  end
end
call('HSET', meta_key, 'tail', string.format('%.0f', tail), 'head', string.format('%.0f', head))

for id in pairs(touched) do
  local f = call('HMGET', base .. 'agent:' .. id, 'capacity', 'open', 'external_only')
  local capacity, held = tonumber(f[1] or 0), call('ZCARD', base .. 'slots:' .. id)
  call('ZREM', base .. 'free', id)
  call('ZREM', base .. 'free_external', id)
  if f[2] == '1' and held < capacity then
    local key = f[3] == '1' and 'free_external' or 'free'
    call('ZADD', base .. key, string.format('%.0f', math.floor(held * 1000000 / capacity)), id)
  end
end
return { 1 }
