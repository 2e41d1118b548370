#!/usr/bin/env bash
# Train and record which experts the tokens use: the example with DeepSpeed's own MoE layer, or a
# script of yours that calls moe_locality.initialize.
#   launch/record.sh [--hostfile FILE | --ranks N] [--trace DIR] [--out DIR] [--dry-run] [--] [arguments]
#   See common.sh; traces/baseline and the run directory runs/baseline by default.
set -euo pipefail
takes="--trace --out"
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

trace=${trace:-traces/baseline} out=${out:-runs/baseline}
if ((${#script[@]} == 0)); then
  show_and_run "${launcher[@]}" "$example" \
    --deepspeed_config "${CONFIG:-$root/configs/ds_zero1_stock.json}" \
    --layer stock --trace "$trace" --out "$out" "${pass[@]}"
  exit
fi
run_script "$out" "trace.path=$trace" "trace.enabled:=true"
if [[ -z $dry_run && -z $(find "$trace" -newer "$out/ds_config.json" -print -quit 2>/dev/null) ]]; then
  echo "found nothing new in $trace on this machine: a script records where it calls" \
    "moe_locality.initialize instead of deepspeed.initialize (one that calls" \
    "moe_locality.attach names the directory itself)" >&2
  [[ -n $hostfile ]] || exit 1 # with hosts, the trace may be on another one
fi
