#!/usr/bin/env bash
# Compute a placement from a recorded trace, for the cluster of a hostfile or --nodes N
# --ranks-per-node R or --cluster FILE.
#   launch/place.sh [--hostfile FILE] [--dry-run] [arguments of `moe-locality place`]
#   TRACE and PLAN name the trace and the plan to write (traces/baseline, plan.json).
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cluster=()
[[ -z $hostfile ]] || cluster=(--hostfile "$hostfile")
show_and_run moe-locality place "${TRACE:-traces/baseline}" "${cluster[@]}" \
  -o "${PLAN:-plan.json}" "${pass[@]}"
