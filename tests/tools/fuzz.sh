#!/usr/bin/env bash
# Runs every fuzz target of the given module folders for a few seconds each, and
# stops when the total is used up, naming what it did not reach. Run from the
# workspace root; `make fuzz` calls it. A failing input stays in testdata/fuzz.
#
# Each package is compiled once, instrumented, for all of its targets.
set -euo pipefail

each=${FUZZ_SECONDS:-3}
total=${FUZZ_TOTAL:-300} # compiling included, most of it the first time
ran=0 left=0 failed=0
SECONDS=0

corpus=$(go env GOCACHE)/fuzz-cmdexec
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# Lines of "folder target", one for each func FuzzX in a _test.go file.
targets=$(grep -rHoE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' "$@" |
	sed -E 's|/[^/]*_test\.go:func | |' | sort -u || true)

built='' state=''
while read -r dir target; do
	[ -n "$dir" ] || continue
	if [ "$dir" != "$built" ]; then
		built=$dir state=ready
		out=$(CGO_ENABLED=0 timeout -k 5 $((total > SECONDS ? total - SECONDS : 1)) \
			go test -c -vet=off -fuzz=. -o "$tmp/fuzz.test" "$dir" 2>&1) || {
			if (($? == 124)); then state=late; else
				state=broken
				printf 'fuzz: %s does not compile\n%s\n' "$dir" "$out"
			fi
		}
	fi
	if [ "$state" = broken ]; then
		failed=$((failed + 1))
	elif [ "$state" = late ] || ((SECONDS + each > total)); then
		echo "fuzz: not reached within ${total}s: $dir $target"
		left=$((left + 1))
	elif out=$(cd "$dir" && timeout -k 5 $((each + 60)) "$tmp/fuzz.test" -test.run='^$' -test.fuzz="^$target\$" \
		-test.fuzztime="${each}s" -test.fuzzminimizetime=2s -test.fuzzcachedir="$corpus/${dir#./}" 2>&1); then
		ran=$((ran + 1))
	else
		failed=$((failed + 1))
		printf 'fuzz: %s %s failed\n%s\n' "$dir" "$target" "$out"
	fi
done <<<"$targets"

echo "fuzz: $ran targets ran ${each}s each, $failed failed, $left not reached (${SECONDS}s)"
((failed == 0))
