#!/usr/bin/env bash
# The same training twice, with DeepSpeed's own layer and with ours under a plan, then the table.
#   launch/compare.sh [--hostfile FILE | --ranks N] [--dry-run] [arguments of examples/train_lm.py]
#   PLAN names the plan (plan.json), OUT the directory of both runs (runs/compare).
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

out=${OUT:-runs/compare} plan=${PLAN:-plan.json}
[[ -n $dry_run || -f $plan ]] || fail "there is no plan $plan: make one with launch/place.sh"
show_and_run "${launcher[@]}" examples/train_lm.py \
  --deepspeed_config "${STOCK_CONFIG:-configs/ds_zero1_stock.json}" \
  --layer stock "${pass[@]}" --out "$out/stock"
show_and_run "${launcher[@]}" examples/train_lm.py \
  --deepspeed_config "${CONFIG:-configs/ds_zero1_moe_locality.json}" \
  --layer locality --plan "$plan" "${pass[@]}" --out "$out/placed"
show_and_run moe-locality compare "$out/stock" "$out/placed"
