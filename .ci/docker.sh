#!/usr/bin/env bash
# A container engine for tests: one that belongs to nobody else.
#
#   .ci/docker.sh start DIR [FLAG...]
#       installs docker.io and busybox-static where they are missing (Debian,
#       root), starts a dockerd (with these flags as well) that keeps everything in
#       DIR, imports the test image, and prints DOCKER_HOST=unix://DIR/docker.sock.
#       Running it again starts what is not running and repeats the line.
#   .ci/docker.sh stop DIR
#       removes that engine's containers, ends it, and removes its data.
#
# Only the engine whose socket and pid file are in DIR is ever touched. The image is
# made of busybox-static, since no registry can be relied on. DIR must be short: a
# socket's path has at most 107 bytes.
set -euo pipefail

IMAGE=cmdexec-test/busybox:1

usage() {
	sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '/^set /d' >&2
	exit 2
}

[ $# -ge 2 ] || usage
mkdir -p "$2"
DIR=$(cd "$2" && pwd)
FLAGS=("${@:3}")
SOCKET=$DIR/docker.sock
HOST=unix://$SOCKET

say() { echo "docker.sh: $*" >&2; }
die() {
	say "$*"
	exit 1
}
engine() { timeout 60 docker --host "$HOST" "$@"; }
answers() { [ -S "$SOCKET" ] && timeout 5 docker --host "$HOST" version >/dev/null 2>&1; }

# running prints the pid of this folder's dockerd, where it lives. A pid that was
# given to something else in the meantime does not count.
running() {
	local pid
	pid=$(cat "$DIR/pid" 2>/dev/null) || return 1
	[ -n "$pid" ] && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF -- "$DIR/data" || return 1
	echo "$pid"
}

install_missing() {
	local missing=()
	command -v dockerd >/dev/null || missing+=(docker.io)
	# Debian has the client in a package of its own since trixie.
	command -v docker >/dev/null || missing+=("$(apt-cache show docker-cli >/dev/null 2>&1 && echo docker-cli || echo docker.io)")
	busybox_static >/dev/null || missing+=(busybox-static)
	[ ${#missing[@]} = 0 ] && return
	[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || die "missing: ${missing[*]}"
	say "installing: ${missing[*]}"
	export DEBIAN_FRONTEND=noninteractive
	# docker.io starts a daemon of its own where it can; policy-rc.d keeps it from that.
	local policy=/usr/sbin/policy-rc.d made=
	if [ ! -e $policy ]; then
		printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && made=1
	fi
	local ok=1
	{ apt-get -q update && apt-get -q install -y --no-install-recommends "${missing[@]}" tini; } >&2 || ok=
	[ -z "$made" ] || rm -f $policy
	[ -n "$ok" ] || die "apt-get failed"
}

# busybox_static prints the path of a busybox that needs no libraries.
busybox_static() {
	local b
	for b in /bin/busybox /usr/bin/busybox; do
		if [ -x $b ] && ! ldd $b >/dev/null 2>&1; then
			echo $b
			return
		fi
	done
	return 1
}

# The engine's bridge is one of its own, named after the folder, so that docker0 and
# the machine's firewall stay as they are. Where none can be made, jobs that ask for
# a network are refused, and the tests expect that.
NUMBER=$(($(cksum <<<"$DIR" | cut -d' ' -f1) % 250))
BRIDGE=ce-test$NUMBER
make_bridge() {
	ip link show "$BRIDGE" >/dev/null 2>&1 && return
	ip link add "$BRIDGE" type bridge && ip address add "172.29.$NUMBER.1/24" dev "$BRIDGE" && ip link set "$BRIDGE" up
}

start_engine() {
	answers && return
	running >/dev/null && die "the engine in $DIR runs and does not answer; see $DIR/log"
	rm -f "$DIR/pid" "$SOCKET"
	make_bridge 2>/dev/null || BRIDGE=none
	setsid dockerd --host "$HOST" --data-root "$DIR/data" --exec-root "$DIR/exec" --pidfile "$DIR/pid" \
		--bridge=$BRIDGE --iptables=false --ip6tables=false "${FLAGS[@]}" >>"$DIR/log" 2>&1 </dev/null &
	local pid=$! i
	for ((i = 0; i < 300; i++)); do
		answers && return
		kill -0 $pid 2>/dev/null || { tail -5 "$DIR/log" >&2 && die "dockerd ended; see $DIR/log"; }
		sleep 0.1
	done
	die "dockerd does not answer after 30 s; see $DIR/log"
}

import_image() {
	engine image inspect $IMAGE >/dev/null 2>&1 && return
	local root busybox applet
	busybox=$(busybox_static)
	root=$(mktemp -d)
	mkdir -p "$root"/{bin,etc,tmp,root}
	cp "$busybox" "$root/bin/busybox"
	for applet in $("$busybox" --list); do
		[ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
	done
	printf '%s\n' root:x:0:0:root:/root:/bin/sh app:x:1234:1234::/:/bin/sh \
		alsoroot:x:0:0::/:/bin/sh nobody:x:65534:65534::/:/bin/sh >"$root/etc/passwd"
	printf '%s\n' root:x:0: app:x:1234: nogroup:x:65534: >"$root/etc/group"
	tar -C "$root" --owner=0 --group=0 -c . | engine import - $IMAGE >/dev/null
	rm -rf "$root"
}

case $1 in
start)
	install_missing
	[ ${#SOCKET} -le 100 ] || die "the path of $DIR is too long for a socket"
	start_engine
	import_image
	echo "DOCKER_HOST=$HOST"
	;;
stop)
	if answers; then
		engine ps -aq | xargs -r timeout 60 docker --host "$HOST" rm -fv >/dev/null || true
		engine network prune -f >/dev/null || true # their bridges would outlive the engine
	fi
	if pid=$(running); then
		kill "$pid"
		for ((i = 0; i < 200; i++)); do
			kill -0 "$pid" 2>/dev/null || break
			sleep 0.1
		done
		kill -0 "$pid" 2>/dev/null && kill -9 "$pid" && sleep 0.5
	fi
	# What the engine mounted and did not unmount (it was killed) is in the way.
	awk -v d="$DIR/" 'index($5, d) == 1 {print $5}' /proc/self/mountinfo | sort -r | xargs -r umount -l || true
	ip link delete "$BRIDGE" 2>/dev/null || true
	rm -rf "$DIR"
	;;
*) usage ;;
esac
