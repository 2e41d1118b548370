#!/usr/bin/env bash
# Train with moe_locality's layer, and with --plan FILE under a placement: the example, or a script
# of yours that calls moe_locality.initialize.
#   launch/train.sh [--hostfile FILE | --ranks N] [--plan FILE] [--out DIR] [--dry-run] [--] [arguments]
#   See common.sh; the run directory is runs/placed by default; your script, given neither --plan
#   nor --out, runs as it is.
set -euo pipefail
takes="--plan --out"
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ -n $dry_run || -z $plan || -f $plan ]] || fail "there is no plan $plan: make one with place.sh"
if ((${#script[@]} == 0)); then
  show_and_run "${launcher[@]}" "$example" \
    --deepspeed_config "${CONFIG:-$root/configs/ds_zero1_moe_locality.json}" \
    --layer locality ${plan:+--plan "$plan"} --out "${out:-runs/placed}" "${pass[@]}"
elif [[ -n $plan$out ]]; then
  run_script "${out:-runs/placed}" ${plan:+"plan=$plan"}
else
  show_and_run "${launcher[@]}" "${script[@]}"
fi
