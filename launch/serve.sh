#!/usr/bin/env bash
# Serve a JSONL file of requests with a Hugging Face model whose experts are spread over the ranks:
# moe-locality serve on every rank.
#   launch/serve.sh [--hostfile FILE | --ranks N] [--plan FILE] [--dry-run] REQUESTS --model DIR --out DIR [options]
#   See common.sh, and moe-locality serve --help for the options.
set -euo pipefail
takes="--plan"
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

((${#script[@]} == 0)) || fail "found a script after --, expected REQUESTS --model DIR --out DIR"
[[ -z $plan ]] || pass+=(--plan "$plan")
show_and_run "${launcher[@]}" --no_local_rank --module moe_locality.cli serve "${pass[@]}"
