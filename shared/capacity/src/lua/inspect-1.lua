-- One agent: setting, counts, and a page of its slots and of its queue. Changes nothing.
--
-- Input   KEYS 1: meta. ARGV [5] agent, [6] first rank, [7] most members of each.
-- Output  capacity, open, setting sequence, external only, held back ('' where unknown), held count, {member, granted at, ...}, queue length,
--         {member, score, ...}
local id, from, count = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
local f = call('HMGET', base .. 'agent:' .. id, 'capacity', 'open', 'setting_seq', 'external_only', 'held_back')
local slots, queue = base .. 'slots:' .. id, base .. 'queue:' .. id
local function page(set)
  if count == 0 then return {} end
  return call('ZRANGE', set, from, from + count - 1, 'WITHSCORES')
end
return {
  1, tonumber(meta[3]),
  f[1] or '', f[2] or '', f[3] or '', f[4] or '', f[5] or '',
  call('ZCARD', slots), page(slots), call('ZCARD', queue), page(queue),
}
