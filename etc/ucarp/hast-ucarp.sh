#!/bin/sh
# What ucarp's hooks do; hast-ucarp.conf, beside this file, says what that is and has all settings.
#
# usage: hast-ucarp.sh up|down [-w] interface address [settings]
#        hast-ucarp.sh again [-w] [settings]
#        hast-ucarp.sh status [settings]
#        hast-ucarp.sh event settings event resource [oldrole newrole]
#
# How calls that race are kept apart: each one writes what it wants to $state/request, with a number one higher than
# the last, and starts a runner. Runners take turns ($state/lock); the one whose turn it is does the newest request, if
# no other has done it ($state/done). While it goes up it looks at $state/request: when that wants down, it gives up.
set -u
PATH=$PATH:/usr/sbin:/sbin:/usr/local/sbin:/usr/local/bin

OVERTAKEN=75 # exit code: a newer call wants the opposite

me=$(readlink -f "$0")
resources='' services='' start_service='systemctl start' stop_service='systemctl stop' prefix=32 demote=yes
role_timeout=120 device_timeout=15 fsck_timeout=600 mount_timeout=60 umount_timeout=20 service_timeout=60 term_timeout=3
hastctl=hastctl hast_conf=/etc/hast.conf down_role=secondary
log_file=/var/log/hast-ucarp.log state=/run/hast-ucarp
doing=''

# ---- the log ----

# say priority text...
say() {
	priority=$1
	shift
	[ -t 2 ] && echo "hast-ucarp: $*" >&2
	timeout 2 logger -t "hast-ucarp[$$]" -p "daemon.$priority" -- "$*" 2>/dev/null
	[ -z "$log_file" ] || echo "$(date '+%F %T') [$$] $priority: $*" >>"$log_file"
}

say_output() {
	while IFS= read -r line; do say info "| $line"; done <"$state/output"
}

die() {
	say err "$*"
	[ -t 2 ] || echo "hast-ucarp: $*" >&2
	exit 1
}

# ---- requests ----

# Sets generation, what, interface, address, ucarp: the newest request.
read_request() {
	[ -f "$state/request" ] && read -r generation what interface address ucarp <"$state/request"
}

# Sets done_generation, done_what, done_code: the request that was carried out last, and how that ended.
read_done() {
	done_generation=0 done_what=nothing done_code=0
	[ ! -f "$state/done" ] || read -r done_generation done_what done_code <"$state/done"
}

# Whether the newest request is not what is being done.
overtaken() (
	[ "$doing" = up ] && read_request && [ "$what" != up ]
)

# write_request what interface address ucarp; with "again" in place of all that, the last one with a new number.
write_request() {
	exec 8>"$state/request.lock" || return
	flock 8 || return
	generation=0
	if read_request; then [ "$1" != again ] || set -- "$what" "$interface" "$address" "$ucarp"; fi
	[ "$1" != again ] || die "again: nothing was asked for yet"
	generation=$((generation + 1)) what=$1
	if ! { echo "$generation $*" >"$state/request.new" && mv "$state/request.new" "$state/request"; }; then return 1; fi
	exec 8>&-
}

write_done() {
	echo "$generation $what $code" >"$state/done.new" && mv "$state/done.new" "$state/done"
}

# ---- steps ----

# bounded seconds command...: its exit code, 124 when it took too long, OVERTAKEN. Its output goes to the log. What
# it leaves running holds no lock of ours.
bounded() {
	limit=$1
	shift
	say info "$*"
	rm -f "$state/ended"
	timeout -k 2 "$limit" "$@" >"$state/output" 2>&1 </dev/null 9>&- &
	command=$!
	# Not "watch ... 9>&-": a shell keeps a copy of what it is to open again after a function.
	(exec 9>&- && watch "$command" $((limit + 4))) &
	watcher=$!
	wait "$command"
	code=$?
	kill "$watcher" 2>/dev/null
	wait "$watcher" 2>/dev/null
	say_output
	# It was, also if what has ended it was overtaken itself meanwhile.
	if [ -e "$state/ended" ] || overtaken; then return $OVERTAKEN; fi
	[ $code -ne 137 ] || code=124
	[ $code -ne 124 ] || say err "not done within $limit s: $*"
	return $code
}

# End a command whose request was overtaken, and stop waiting for one that not even SIGKILL ends.
watch() {
	nap='' gone=''
	# A signal may come before $nap is what was just started.
	trap 'gone=yes; [ -z "$nap" ] || kill "$nap" 2>/dev/null' TERM INT HUP
	left=$(($2 * 5))
	while [ $left -gt 0 ] && kill -0 "$1" 2>/dev/null; do
		sleep 0.2 &
		nap=$!
		[ -z "$gone" ] || kill "$nap" 2>/dev/null
		wait "$nap"
		[ -z "$gone" ] || exit 0
		left=$((left - 1))
		if overtaken; then
			: >"$state/ended"
			kill "$1" 2>/dev/null
		fi
	done
	[ -n "$gone" ] || kill -KILL "$1" 2>/dev/null
}

# each function: call it with the words of each line of $resources; ends with the first that fails.
each() {
	while read -r name device point type options; do
		case $name in '' | '#'*) continue ;; esac
		"$1" "$name" "${device:--}" "${point:--}" "${type:-auto}" "${options:-defaults}" || return
	done <<-END
		$resources
	END
}

print_name() { echo "$1"; }

# Lines from stdin, the last one first.
reversed() { sed '1!G;h;$!d'; }

set_role() {
	# shellcheck disable=SC2046 # names are words
	bounded "$role_timeout" "$hastctl" role "$1" -c "$hast_conf" $(each print_name)
}

wait_device() {
	[ "$2" != - ] || return 0
	left=$((device_timeout * 10))
	until [ -b "$2" ]; do
		! overtaken || return $OVERTAKEN
		[ $left -gt 0 ] || {
			say err "$1: no block device $2 after $device_timeout s"
			return 1
		}
		left=$((left - 1))
		sleep 0.1
	done
}

# The device that is mounted on a directory, the topmost one; nothing when there is none.
mounted_on() {
	awk -v point="$1" '
		$5 == point { for (i = 7; $i != "-"; i++); source = $(i + 2) }
		END { print source }' /proc/self/mountinfo
}

check_file_system() {
	checker=$(command -v "fsck.$2") || {
		say notice "$1: there is no fsck.$2 here, mounting it unchecked"
		return 0
	}
	bounded "$fsck_timeout" "$checker" -p "$1"
	code=$?
	case $code in
	0 | "$OVERTAKEN") return "$code" ;;
	1 | 2 | 3) say notice "$1: fsck.$2 has repaired it" ;;
	*)
		say err "$1: fsck.$2 -p ended with $code: it needs a person (fsck.$2 $1)"
		return 1
		;;
	esac
}

mount_one() {
	[ "$3" != - ] || return 0
	source=$(mounted_on "$3")
	if [ -n "$source" ]; then
		[ "$source" != "$(readlink -f "$2")" ] || return 0
		say warning "$3: still has $source mounted, which is not what $2 is now"
		unmount "$1" "$2" "$3" || return
	fi
	check_file_system "$2" "$4" || return
	# _netdev: at shutdown systemd unmounts it before it stops hastd.
	bounded "$mount_timeout" mount -t "$4" -o "_netdev,$5" "$2" "$3" || return
	[ -n "$(mounted_on "$3")" ] || {
		say err "$3: the file system is mounted elsewhere: set the real path, without symbolic links"
		return 1
	}
}

# Processes that use what is below a directory. The links of /proc are read, nothing touches the file system itself.
users_of() {
	find /proc/[0-9]*/fd /proc/[0-9]*/map_files /proc/[0-9]*/cwd /proc/[0-9]*/root /proc/[0-9]*/exe -maxdepth 1 \
		\( -lname "$1" -o -lname "$1/*" \) -print 2>/dev/null | cut -d / -f 3 | sort -un | grep -vx $$
}

# unmount_within seconds directory: try until it is not mounted.
unmount_within() {
	left=$(($1 * 4))
	while [ -n "$(mounted_on "$2")" ]; do
		bounded "$umount_timeout" umount "$2"
		code=$?
		[ -n "$(mounted_on "$2")" ] || return 0
		[ $code -ne 124 ] && [ $left -gt 0 ] || return 1
		left=$((left - 1))
		sleep 0.25
	done
}

unmount() {
	point=$3
	[ "$point" != - ] || return 0
	unmount_within 0 "$point" && return 0
	for signal in TERM KILL; do
		for pid in $(users_of "$point"); do
			say warning "$point: SIG$signal for process $pid ($(cat "/proc/$pid/comm" 2>/dev/null)), which uses it"
			kill -$signal "$pid" 2>/dev/null
		done
		unmount_within "$term_timeout" "$point" && return 0
	done
	say err "$point: cannot be unmounted, taking it out of the directory tree; its device fails from now on"
	bounded "$umount_timeout" umount -l "$point"
	[ -z "$(mounted_on "$point")" ]
}

# The address as the interface has it, with its prefix; nothing when it does not have it.
address_there() {
	[ "$interface" = - ] || ip -o address show dev "$interface" 2>/dev/null |
		awk -v address="$address/" 'index($4, address) == 1 { print $4 }'
}

add_address() {
	[ "$interface" = - ] || [ -n "$(address_there)" ] ||
		bounded 10 ip address add "$address/$prefix" dev "$interface"
}

remove_address() {
	there=$(address_there)
	[ -z "$there" ] || bounded 10 ip address del "$there" dev "$interface"
}

# ---- up and down ----

go_up() {
	set_role primary || return
	each wait_device || return
	each mount_one || return
	add_address || return
	for service in $services; do
		# shellcheck disable=SC2086 # a command of several words
		bounded "$service_timeout" $start_service "$service" || return
	done
}

unmount_or_tell() {
	unmount "$@" || {
		say err "$3: is still mounted"
		trouble=1
	}
}

# Goes on whatever fails: the less this node holds, the better.
go_down() (
	trouble=0
	# First: the other node may have it already.
	remove_address || trouble=1
	# shellcheck disable=SC2086 # words
	for service in $(printf '%s\n' $services | reversed); do
		bounded "$service_timeout" $stop_service "$service" || trouble=1
	done
	set_aside=$resources
	resources=$(echo "$set_aside" | reversed)
	each unmount_or_tell
	resources=$set_aside
	set_role "$down_role" || trouble=1
	exit $trouble
)

# Carry out the request that was read: 0, 1 or OVERTAKEN.
carry_out() {
	doing=$what
	say notice "$what: $interface $address"
	if [ "$what" = down ]; then
		go_down && return 0
		say err "down: not everything could be given up, see above"
		return 1
	fi
	go_up
	code=$?
	[ $code -ne 0 ] || return 0
	if [ $code -eq $OVERTAKEN ]; then
		say notice "up: overtaken by a call for down"
		return $OVERTAKEN
	fi
	say err "up: failed, giving up what was taken"
	doing=down
	go_down
	return 1
}

# This node cannot serve: ucarp is not to keep the address.
tell_ucarp() {
	[ "$demote" = yes ] && [ "$(cat "/proc/$ucarp/comm" 2>/dev/null)" = ucarp ] || return 0
	say notice "telling ucarp (process $ucarp) to become the backup"
	kill -USR2 "$ucarp"
}

run() {
	wanted=$1
	cd /
	exec 9>"$state/lock"
	flock 9 || die "$wanted: cannot lock $state/lock"
	trap 'die "ended by a signal while going $doing"' TERM INT HUP
	while read_request && read_done && [ "$generation" != "$done_generation" ]; do
		carry_out
		code=$?
		[ $code -ne $OVERTAKEN ] || continue
		write_done || die "$what: cannot write $state/done"
		if [ $code -eq 0 ]; then
			say notice "$what: done"
		elif [ "$what" = up ]; then
			tell_ucarp
		fi
	done
	[ "$wanted" = "$done_what" ] || exit $OVERTAKEN
	exit "$done_code"
}

is_another() { [ "$1" != "$wanted" ]; }

# What hastd's `exec` is told: event resource [oldrole newrole]. A resource that is to be up here, and has lost its role
# without a down, is served by nobody until the other node does it.
event() {
	wanted=$2
	[ "$1 ${3-} ${4-}" = "role primary init" ] || exit 0
	! each is_another || exit 0
	# What is under way may be a down, or an up that finds it out by itself.
	exec 9>"$state/lock"
	if ! { flock 9 && read_request && read_done; }; then exit 0; fi
	[ "$what $generation 0" = "up $done_generation $done_code" ] || exit 0
	say err "$wanted: hastd cannot serve it any more, see its log"
	exec 9>&-
	tell_ucarp
}

status() {
	read_request || {
		echo "nothing was asked for yet"
		exit 0
	}
	# A runner that was just started may not have its turn yet.
	for _ in 1 2 3 4 5; do
		read_done
		if [ "$generation" = "$done_generation" ] || ! flock -n "$state/lock" true; then break; fi
		sleep 0.2
	done
	if [ "$generation" != "$done_generation" ]; then
		if flock -n "$state/lock" true; then echo "going $what was interrupted"; else echo "going $what"; fi
		exit $OVERTAKEN
	fi
	if [ "$done_code" -eq 0 ]; then echo "$what"; else echo "$what has failed"; fi
	exit "$done_code"
}

# ---- the command line ----

usage() {
	sed -n 's/^# \(usage: .*\)/\1/p; s/^#  \( *hast-ucarp.sh .*\)/  \1/p' "$me" >&2
	exit 64
}

verb=${1-}
[ $# -eq 0 ] || shift
if [ "$verb" = event ]; then
	[ $# -ge 3 ] || usage
	settings=$1
	shift
fi
wait=no
if [ "${1-}" = -w ]; then
	wait=yes
	shift
fi
case $verb in
up | down)
	[ $# -ge 2 ] || usage
	request="$verb $1 $2 $PPID"
	settings=${3-}
	;;
again | status | run)
	request=again
	settings=${1-}
	;;
event) ;;
*) usage ;;
esac
settings=$(readlink -f "${settings:-$(dirname "$me")/hast-ucarp.conf}")
[ -r "$settings" ] || die "cannot read the settings: $settings"
# shellcheck source=/dev/null
. "$settings"
(umask 077 && mkdir -p "$state") || die "cannot make the directory $state"
case $verb in
status) status ;;
run) run "$2" ;;
event)
	event "$@"
	exit
	;;
esac
# shellcheck disable=SC2086 # words, none of which can be empty
write_request $request || die "$verb: cannot write $state/request"
# Neither the terminal nor whoever called takes the runner along when it ends.
setsid "$me" run "$settings" "$what" </dev/null >/dev/null 2>&1 &
[ $wait = no ] || wait $!
