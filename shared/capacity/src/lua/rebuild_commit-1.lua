-- The pool is complete and may be used. Repeating it is fine.
--
-- Input   KEYS 1: meta. ARGV [2] log sequence, [3] now in ms.
-- Output  1, version
if meta[2] == 'ready' then return { 1, tonumber(call('HGET', meta_key, 'version')) } end
call('HSET', meta_key, 'state', 'ready', 'log_seq', ARGV[2], 'since_ms', ARGV[3])
return { 1, call('HINCRBY', meta_key, 'version', 1) }
