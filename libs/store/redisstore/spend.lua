-- GCRA for several keys at once. KEYS are the keys; ARGV has two numbers for each:
-- the nanoseconds between two events, and how many nanoseconds a key may be ahead
-- of the clock. The clock is Redis's own, so that processes whose clocks differ
-- share one budget. Keys are charged in order, up to the first that has to wait.
-- The reply has two numbers for each key that was looked at: how far it is ahead,
-- and how long it has to wait (0: it was charged).
--
-- A value is the moment until which a key is taken, "seconds:nanoseconds". The two
-- are kept apart since a number of Lua has 53 bits; what is computed with are
-- differences, which are small.
local clock = redis.call('TIME')
local sec, nsec = tonumber(clock[1]), tonumber(clock[2]) * 1000
local reply = {}
for i, key in ipairs(KEYS) do
  local interval, burst = tonumber(ARGV[2 * i - 1]), tonumber(ARGV[2 * i])
  local ahead = 0
  local value = redis.call('GET', key)
  if value then
    local s, n = string.match(value, '^(%d+):(%d+)$')
    if s then
      ahead = (tonumber(s) - sec) * 1000000000 + (tonumber(n) - nsec)
    end
  end
  if ahead < 0 then
    ahead = 0
  elseif ahead > burst then
    -- Only a clock that was set back, or a limit that was lowered, can do this. The
    -- key has to wait as after a full burst, not until the clock is there again.
    ahead = burst
  end
  local after = ahead + interval
  if after > burst then
    reply[2 * i - 1], reply[2 * i] = ahead, after - burst
    return reply
  end
  local sum = nsec + after
  local value = string.format('%.0f:%.0f', sec + math.floor(sum / 1000000000), sum % 1000000000)
  redis.call('SET', key, value, 'PX', math.ceil(after / 1000000))
  reply[2 * i - 1], reply[2 * i] = after, 0
end
return reply
