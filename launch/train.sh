#!/usr/bin/env bash
# Train with moe_locality's layer; give the placement with --plan FILE.
#   launch/train.sh [--hostfile FILE | --ranks N] [--dry-run] [arguments of examples/train_lm.py]
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

show_and_run "${launcher[@]}" examples/train_lm.py \
  --deepspeed_config "${CONFIG:-configs/ds_zero1_moe_locality.json}" \
  --layer locality --out runs/placed "${pass[@]}"
