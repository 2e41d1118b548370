#!/usr/bin/env bash
# Train with DeepSpeed's own MoE layer and record which experts its tokens use.
#   launch/record.sh [--hostfile FILE | --ranks N] [--dry-run] [arguments of examples/train_lm.py]
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

show_and_run "${launcher[@]}" examples/train_lm.py \
  --deepspeed_config "${CONFIG:-configs/ds_zero1_stock.json}" \
  --layer stock --trace traces/baseline --out runs/baseline "${pass[@]}"
