#!/bin/sh
# A reviewer gets the sandbox of a session that is done, looks at what it has left, and says what it thinks; nothing runs in it any more by then.
# usage: reviewer.sh MODEL SESSION        RUN_OPTIONS: more options of `harness run`
set -eu
model=$1 session=$2 reviewer=reviewer-$$
harness run --detach --session "$reviewer" --model "$model" ${RUN_OPTIONS:-} --ask write --ask edit \
    --task "Review what was done in this sandbox. Run the tests. Say what is wrong, and change nothing."
harness hand "$session" main --to "$reviewer"
harness wake "$reviewer"
echo "$reviewer"
