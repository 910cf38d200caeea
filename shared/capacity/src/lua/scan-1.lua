-- A page of all holds with their places. Changes nothing.
--
-- Input   KEYS 1: meta. ARGV [5] cursor, [6] about how many.
-- Output  next cursor (0: end), {member, place, granted at, ...}; place is s<agent>, q<agent>, p or x
local found = call('HSCAN', where_key, ARGV[5], 'COUNT', ARGV[6])
local out = {}
for i = 1, #found[2], 2 do
  local member, at = found[2][i], found[2][i + 1]
  local since = ''
  if string.sub(at, 1, 1) == 's' then
    since = call('ZSCORE', base .. 'slots:' .. string.sub(at, 2), member) or ''
  end
  out[#out + 1], out[#out + 2], out[#out + 3] = member, at, since
end
return { 1, tonumber(meta[3]), found[1], out }
