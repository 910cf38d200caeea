-- A reservation came to nothing: as in settle, but only while nobody has confirmed it.
--
-- Input   KEYS 1: meta. ARGV [5] member.
-- Output  as in settle
if not call('ZSCORE', unconfirmed_key, ARGV[5]) then return finish(false, { 0, 0, 0, 0, {} }) end
return settle(ARGV[5])
