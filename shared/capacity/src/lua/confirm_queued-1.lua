-- The submission of a hold that waits is in the log now.
--
-- Input   KEYS 1: meta. ARGV [5] member.
-- Output  1 it waits in a queue | 0 it does not, nothing changed
local at = call('HGET', where_key, ARGV[5])
-- A promotion that came in between has to be confirmed by who dispatches it.
if not at or string.sub(at, 1, 1) == 's' then return finish(false, { 0, 0, 0 }) end
local removed = call('ZREM', unconfirmed_key, ARGV[5])
return finish(removed == 1, { 0, 0, 1 })
