#!/usr/bin/env bash
# Generate with a Hugging Face model whose experts are spread over the ranks, without and with a
# placement: the example, or a script of yours that calls moe_locality.register.
#   launch/generate.sh [--hostfile FILE | --ranks N] [--out DIR] [--dry-run] [--] [arguments]
#   See common.sh; the directory of traces, plan and figures is runs/hf_generate by default.
set -euo pipefail
takes="--out"
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if ((${#script[@]} == 0)); then
  show_and_run "${launcher[@]}" "$root/examples/hf_generate.py" \
    --out "${out:-runs/hf_generate}" "${pass[@]}"
else
  [[ -z $out ]] || fail "found --out $out, expected none for ${script[0]}: give it after --"
  show_and_run "${launcher[@]}" "${script[@]}"
fi
