-- A new life of the pool: nothing is granted from here to the commit. The agents' keys are wiped by rebuild_wipe.
--
-- Input   KEYS 1: meta. ARGV [1] new epoch, [2] now in ms.
-- Output  1 | -1, epoch there, which the new one does not sort after
local base = string.sub(KEYS[1], 1, -5)
local there = redis.call('HGET', KEYS[1], 'epoch')
if there and there >= ARGV[1] then return { -1, there } end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'state', 'rebuilding', 'version', '1', 'log_seq', '0', 'tail', '0',
  'head', '-1', 'since_ms', ARGV[2])
redis.call('UNLINK', base .. 'where', base .. 'free', base .. 'unconfirmed', base .. 'queue',
  base .. 'external', base .. 'free_external')
return { 1 }
