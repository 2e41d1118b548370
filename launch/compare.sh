#!/usr/bin/env bash
# The same training twice with moe_locality's layer, experts in their usual order and placed by a
# plan, then the table. With --stock, DeepSpeed's own layer beside them (it counts no bytes).
#   launch/compare.sh [--hostfile FILE | --ranks N] [--plan FILE] [--out DIR] [--stock] [--dry-run]
#                     [--] [arguments]
#   See common.sh; the plan is plan.json by default, and the runs go to runs/compare.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

out=${out:-runs/compare} plan=${plan:-plan.json}
((${#script[@]} == 0)) || fail "compare.sh runs the example only: train your script twice with" \
  "launch/train.sh, without --plan and with it"
[[ -n $dry_run || -f $plan ]] || fail "there is no plan $plan: make one with launch/place.sh"

train() { # NAME CONFIG [ARGUMENTS]: the example
  show_and_run "${launcher[@]}" "$example" \
    --deepspeed_config "$2" "${@:3}" "${pass[@]}" --out "$out/$1"
}
ours=${CONFIG:-$root/configs/ds_zero1_moe_locality.json}
[[ -z $stock ]] ||
  train stock "${STOCK_CONFIG:-$root/configs/ds_zero1_stock.json}" --layer stock
train linear "$ours" --layer locality
train placed "$ours" --layer locality --plan "$plan"
show_and_run moe-locality compare "$out/linear" "$out/placed"
[[ -z $stock ]] || show_and_run moe-locality compare "$out/stock" "$out/placed"
