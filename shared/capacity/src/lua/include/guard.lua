-- Put in front of every operation but the ones of a rebuild: is this the data that the caller means?
--
-- Input   KEYS[1] <prefix>:{<pool>}:meta, the only declared key; all others share its hash tag and are named from it.
--         ARGV[1] epoch the caller knows, [2] highest version it has seen, [3] now in ms, [4] log sequence; operations begin at [5];
--         the last one: the log sequence that this pool has reflected, by the log.
-- Output  first element: 1 done (second: version now), 0 not ready, -1 another epoch (second: which), -2 moved backwards.
--
-- All numbers are integers below 2^53, so Lua's doubles carry them exactly; they are written with %.0f because Lua's own
-- conversion keeps 14 digits only.
local meta_key = KEYS[1]
local base = string.sub(meta_key, 1, -5)
local where_key, free_key, pool_queue = base .. 'where', base .. 'free', base .. 'queue'
local unconfirmed_key, agents_key = base .. 'unconfirmed', base .. 'agents'
-- What in the pool's queue needs no dispatch (same scores), and the free agents that take nothing else.
local external_key, free_external_key = base .. 'external', base .. 'free_external'
local call = redis.call

local function whole(number)
  return string.format('%.0f', number)
end

local meta = call('HMGET', meta_key, 'epoch', 'state', 'version', 'log_seq', 'tail', 'head')
if not meta[1] or meta[2] ~= 'ready' then return { 0 } end
if meta[1] ~= ARGV[1] then return { -1, meta[1] } end
if tonumber(meta[3]) < tonumber(ARGV[2]) or tonumber(meta[4]) < tonumber(ARGV[#ARGV]) then return { -2 } end

local now = ARGV[3]
local tail, head = tonumber(meta[5]), tonumber(meta[6])

-- The end of every operation that may change something: counts the change, and notes how far the log is reflected.
-- Only fields that differ are written: most operations move neither end of the order.
local function finish(changed, out)
  local version, log_seq = tonumber(meta[3]), ARGV[4]
  local further = tonumber(log_seq) > tonumber(meta[4])
  if changed or further then
    version = version + 1
    if further then
      call('HSET', meta_key, 'version', whole(version), 'log_seq', log_seq)
    else
      call('HSET', meta_key, 'version', whole(version))
    end
    if tail ~= tonumber(meta[5]) then call('HSET', meta_key, 'tail', whole(tail)) end
    if head ~= tonumber(meta[6]) then call('HSET', meta_key, 'head', whole(head)) end
  end
  out[1], out[2] = 1, version
  return out
end
