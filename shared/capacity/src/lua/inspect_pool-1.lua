-- The pool's queue: a page of it. Changes nothing.
--
-- Input   KEYS 1: meta. ARGV [5] first rank, [6] most members.
-- Output  agents with a free slot, queue length, {member, score, ...}
local from, count = tonumber(ARGV[5]), tonumber(ARGV[6])
local page = {}
if count > 0 then page = call('ZRANGE', pool_queue, from, from + count - 1, 'WITHSCORES') end
local free = call('ZCARD', free_key) + call('ZCARD', free_external_key)
return { 1, tonumber(meta[3]), free, call('ZCARD', pool_queue), page }
