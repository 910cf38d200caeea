-- What was admitted or promoted and never confirmed, oldest first. Changes nothing.
--
-- Input   KEYS 1: meta. ARGV [5] before, ms (exclusive), [6] most members.
-- Output  {member, since, place, granted at, ...}; place as in scan
local found = call('ZRANGEBYSCORE', unconfirmed_key, '-inf', '(' .. ARGV[5], 'WITHSCORES', 'LIMIT', 0, ARGV[6])
local out = {}
for i = 1, #found, 2 do
  local member = found[i]
  local at, granted = call('HGET', where_key, member) or '', ''
  if string.sub(at, 1, 1) == 's' then
    granted = call('ZSCORE', base .. 'slots:' .. string.sub(at, 2), member) or ''
  end
  for _, field in ipairs({ member, found[i + 1], at, granted }) do out[#out + 1] = field end
end
return { 1, tonumber(meta[3]), out }
