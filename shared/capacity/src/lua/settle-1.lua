-- An attempt is over: its slot goes to the next in the queue, or it leaves the queue. Anything else changes nothing.
--
-- Input   KEYS 1: meta. ARGV [5] member.
-- Output  released 0|1, dequeued 0|1, {member, agent} promoted
return settle(ARGV[5])
