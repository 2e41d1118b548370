#!/usr/bin/env bash
# Compute a placement from a recorded trace, for the cluster of a hostfile or --nodes N
# --ranks-per-node R or --cluster FILE.
#   launch/place.sh [--hostfile FILE] [--trace DIR] [--plan FILE] [--dry-run] [arguments of
#   `moe-locality place`]
#   The trace and the plan to write are traces/baseline and plan.json by default.
set -euo pipefail
takes="--trace --plan"
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

((${#script[@]} == 0)) || fail "found ${script[*]}, expected no script: $0 only reads a trace"
cluster=()
[[ -z $hostfile ]] || cluster=(--hostfile "$hostfile")
show_and_run moe-locality place "${trace:-traces/baseline}" "${cluster[@]}" \
  -o "${plan:-plan.json}" "${pass[@]}"
