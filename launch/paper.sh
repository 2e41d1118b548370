#!/usr/bin/env bash
# The experiment of arXiv 2604.23150 in a running decoder over the ranks: examples/paper_decoder.py.
#   launch/paper.sh [--hostfile FILE | --ranks N] [--trace TRACE] [--out DIR] [--dry-run] [arguments]
#   See common.sh; the directory of model, plans and report is runs/paper by default, and all nodes
#   have to see it.
set -euo pipefail
takes="--out --trace"
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

((${#script[@]} == 0)) || fail "found a script after --, expected arguments of examples/paper_decoder.py"
[[ -z $trace ]] || pass+=(--trace "$trace")
show_and_run "${launcher[@]}" "$root/examples/paper_decoder.py" --out "${out:-runs/paper}" "${pass[@]}"
