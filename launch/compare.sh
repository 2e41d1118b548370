#!/usr/bin/env bash
# The same training twice with moe_locality's layer, experts in their usual order and placed by a
# plan, then the table. With --stock, DeepSpeed's own layer beside them (it counts no bytes).
#   launch/compare.sh [--hostfile FILE | --ranks N] [--plan FILE] [--out DIR] [--stock] [--dry-run]
#                     [--] [arguments]
#   See common.sh; the plan is plan.json by default, and the runs go to runs/compare.
set -euo pipefail
takes="--plan --out --stock"
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

out=${out:-runs/compare} plan=${plan:-plan.json}
[[ -n $dry_run || -f $plan ]] || fail "there is no plan $plan: make one with launch/place.sh"

runs=(linear placed)
[[ -z $stock ]] || runs=(stock linear placed)
for run in "${runs[@]}"; do
  layer=locality config=${CONFIG:-$root/configs/ds_zero1_moe_locality.json} placed=()
  [[ $run != stock ]] || layer=stock config=${STOCK_CONFIG:-$root/configs/ds_zero1_stock.json}
  if ((${#script[@]} == 0)); then
    [[ $run != placed ]] || placed=(--plan "$plan")
    show_and_run "${launcher[@]}" "$example" --deepspeed_config "$config" --layer "$layer" \
      "${placed[@]}" "${pass[@]}" --out "$out/$run"
  else
    placed=(plan:=null)
    [[ $run != placed ]] || placed=("plan=$plan")
    [[ $run != stock ]] || placed+=(enabled:=false online:=null)
    run_script "$out/$run" trace:=null tracking.every_n_steps:=1 "${placed[@]}"
  fi
done
show_and_run moe-locality compare "$out/linear" "$out/placed"
[[ -z $stock ]] || show_and_run moe-locality compare "$out/stock" "$out/placed"
