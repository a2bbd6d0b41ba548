#!/bin/sh
# A session that has used up its budget, or its model, is followed by another one: it gets the sandbox, and reads what was said.
# usage: successor.sh MODEL SESSION        RUN_OPTIONS: more options of `harness run`
set -eu
model=$1 session=$2 successor=successor-$$
task=$(mktemp)
trap 'rm -f "$task"' EXIT
{
    echo "You take over from a session that has stopped. Its sandbox is yours. This is what was said and done; go on from there."
    echo
    harness show "$session" | tail -n 200
} > "$task"
harness run --detach --session "$successor" --model "$model" ${RUN_OPTIONS:-} --task "$task"
if harness hand "$session" main --to "$successor"; then :; fi
harness wake "$successor"
echo "$successor"
