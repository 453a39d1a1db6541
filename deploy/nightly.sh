#!/bin/sh
# Update a workspace with the events that its server has received, then remove the weights of old stages.
#
#   nightly.sh WORKSPACE                  once, for cron and timers
#   nightly.sh --daily HH:MM WORKSPACE    every day at this time until SIGTERM, for a container
#
# The exit status is that of peso: 0 after an update, 0 if there is nothing to do, not 0 if the update failed. Whether
# the new stage serves is decided by the gate of the workspace (gate.enabled). If the update fails, no weights are
# removed. With --daily, a failure is reported and the next update is tried on the next day.
#
# Environment variables: PESO_COMMAND is the program (default: peso), PESO_KEEP the number of newest stages that keep
# their weights (default: 7), PESO_ALERT a command that is run as by `peso update --alert` (default: none).
set -u

command="${PESO_COMMAND:-peso}"
keep="${PESO_KEEP:-7}"
child=
stopped=

# Run a command and return its status. SIGTERM and SIGINT are passed on, and the command may finish.
run() {
    [ -z "$stopped" ] || return 143
    "$@" &
    child=$!
    [ -z "$stopped" ] || kill -TERM "$child" 2>/dev/null # a signal that came before the child had a name
    wait "$child"
    status=$?
    while kill -0 "$child" 2>/dev/null; do
        wait "$child"
        status=$?
    done
    child=
    return "$status"
}

update() {
    run "$command" update --from-events ${PESO_ALERT:+--alert "$PESO_ALERT"} -w "$1" || return
    run "$command" prune --keep "$keep" --yes -w "$1"
}

# Print the number of seconds until a time of day; fail if it is not one.
seconds_until() {
    now=$(date +%s)
    next=$(date -d "today $1" +%s) || return
    [ "$next" -gt "$now" ] || next=$(date -d "tomorrow $1" +%s) || return
    echo $((next - now))
}

trap 'stopped=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT

case "$#:${1:-}" in
1:-*) ;;
1:?*)
    update "$1"
    exit
    ;;
3:--daily)
    while [ -z "$stopped" ]; do
        seconds=$(seconds_until "$2") || exit 2
        run sleep "$seconds"
        [ -n "$stopped" ] || update "$3" || echo "the update failed with status $?; the next one starts at $2" >&2
    done
    exit 0
    ;;
esac
echo "usage: $0 [--daily HH:MM] WORKSPACE" >&2
exit 2
