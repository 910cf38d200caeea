-- Moves a hold from the slot in which it was found to the one where it runs, because the log says so, whatever the
-- capacity is. Only if it still has that very slot: what was granted since is not what was found.
--
-- Input   KEYS 1: meta. ARGV [5] agent found on, [6] member, [7] granted at as found, ms, [8] agent it runs on,
--         [9] since when, ms.
-- Output  1 moved | 0 nothing changed
local found, member, id = ARGV[5], ARGV[6], ARGV[8]
local at = call('HGET', where_key, member)
local since = call('ZSCORE', slots_of(found), member)
if found == id or at ~= 's' .. found or not since or tonumber(since) ~= tonumber(ARGV[7]) then
  return finish(false, { 0, 0, 0 })
end
withdraw(member)
note_free(agent_of(found))
call('ZADD', agents_key, 0, id)
call('ZADD', slots_of(id), ARGV[9], member)
call('HSET', where_key, member, 's' .. id)
note_free(agent_of(id))
return finish(true, { 0, 0, 1 })
