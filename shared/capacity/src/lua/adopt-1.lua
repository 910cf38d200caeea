-- Records what runs already, because the log says so, whatever the capacity is. Not a grant.
--
-- Input   KEYS 1: meta. ARGV [5] agent, [6] member, [7] granted at, ms.
-- Output  1 recorded | 0 it had a slot, nothing changed
local id, member = ARGV[5], ARGV[6]
local at = call('HGET', where_key, member)
if at and string.sub(at, 1, 1) == 's' then return finish(false, { 0, 0, 0 }) end
if at then withdraw(member) end
call('ZADD', agents_key, 0, id)
call('ZADD', slots_of(id), ARGV[7], member)
call('HSET', where_key, member, 's' .. id)
note_free(agent_of(id))
return finish(true, { 0, 0, 1 })
