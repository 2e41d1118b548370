#!/usr/bin/env bash
# Serve a JSONL file of requests with a Hugging Face model whose experts are spread over the ranks:
# moe-locality serve on every rank.
#   launch/serve.sh [--hostfile FILE | --ranks N] [--plan FILE] [--dry-run] REQUESTS --model DIR --out DIR [options]
#   See common.sh, and moe-locality serve --help for the options. The first SIGTERM or Ctrl-C drains
#   (with a hostfile: where the nodes share DIR), the second one ends the ranks.
set -euo pipefail
takes="--plan --out -o"
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

((${#script[@]} == 0)) || fail "found a script after --, expected REQUESTS --model DIR --out DIR"
[[ -z $plan ]] || pass+=(--plan "$plan")
[[ -z $out ]] || pass+=(--out "$out")
command=("${launcher[@]}" --no_local_rank --module moe_locality.cli serve "${pass[@]}")
[[ -n $dry_run || -z $out ]] && { show_and_run "${command[@]}" && exit; }

# The launcher would end the ranks at the first signal, so it has a session of its own.
asked="" ranks_pid=""
on_signal() {
  [[ -z $asked ]] || { kill -TERM -- "-$ranks_pid" 2>/dev/null || true; return; }  # they may have ended
  asked=1
  echo "draining: what has begun is finished; a second signal ends the ranks"
}
trap on_signal INT TERM  # from the first line of output on
dry_run=1 show_and_run "${command[@]}"
setsid "${command[@]}" &
ranks_pid=$!
while kill -0 "$ranks_pid" 2>/dev/null; do
  # again and again: a job that is still starting removes the file of the one before. What fails here
  # (no room for the file, a sleep that Ctrl-C ends) must not end the script before its ranks.
  [[ -z $asked ]] || { mkdir -p "$out" && touch "$out/drain"; } || true
  sleep 1 || true
done
wait "$ranks_pid"
