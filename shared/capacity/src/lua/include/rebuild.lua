-- Put in front of the steps of a rebuild: is it still the caller's?
--
-- Input   KEYS[1] meta. ARGV[1] epoch of the rebuild; steps begin at [2].
-- Output  0 nothing there, -1 another rebuild or already committed (second: epoch)
local meta_key = KEYS[1]
local base = string.sub(meta_key, 1, -5)
local call = redis.call
local meta = call('HMGET', meta_key, 'epoch', 'state', 'tail', 'head')
if not meta[1] then return { 0 } end
if meta[1] ~= ARGV[1] then return { -1, meta[1] } end
