#!/bin/sh
# A planner looks and writes a plan; a coder gets its sandbox, with the plan in it, and does what it says.
# usage: planner-coder.sh MODEL DIRECTORY TASK        RUN_OPTIONS: more options of `harness run`
set -eu
model=$1 directory=$2 task=$3
planner=planner-$$ coder=coder-$$
harness run --session "$planner" --model "$model" --workspace "$directory:ro" ${RUN_OPTIONS:-} \
    --system "You plan and change nothing. Read what is there and write a short plan to /tmp/PLAN.md." --task "$task"
harness run --detach --session "$coder" --model "$model" --workspace "$directory" ${RUN_OPTIONS:-} \
    --system "The planner's sandbox is called \`plan\`; your own is \`main\`." \
    --task "Read /tmp/PLAN.md in the sandbox \`plan\` and do what it says in yours."
harness hand "$planner" main --to "$coder" --as plan
harness wake "$coder"
echo "$coder"
