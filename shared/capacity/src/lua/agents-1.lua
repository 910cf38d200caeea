-- All agents that have keys, in order: a page. Changes nothing.
--
-- Input   KEYS 1: meta. ARGV [5] after which agent ('' from the start), [6] most agents.
-- Output  {agent, ...}
local from = ARGV[5] == '' and '-' or '(' .. ARGV[5]
return { 1, tonumber(meta[3]), call('ZRANGEBYLEX', agents_key, from, '+', 'LIMIT', 0, ARGV[6]) }
