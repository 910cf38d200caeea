-- Wipes the keys of some agents of the life before.
--
-- Input   KEYS 1: meta. ARGV [2] most agents.
-- Output  1, how many are left
if meta[2] ~= 'rebuilding' then return { -1, meta[1] } end
local gone = call('ZPOPMIN', base .. 'agents', ARGV[2])
for i = 1, #gone, 2 do
  call('UNLINK', base .. 'slots:' .. gone[i], base .. 'queue:' .. gone[i], base .. 'agent:' .. gone[i])
end
return { 1, call('ZCARD', base .. 'agents') }
