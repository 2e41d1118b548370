# shellcheck shell=bash disable=SC2034
# Shared by the scripts beside it. They take
#   --hostfile FILE | --ranks N   where to run (default: the accelerators of this machine, else 4)
#   --plan FILE, --trace DIR, --out DIR (-o DIR), --stock   those of the variable `takes`; also
#                                 PLAN, TRACE and OUT in the environment
#   --dry-run                     print the command lines only
#   -- SCRIPT [ARGUMENTS]         your own training script instead of the example
# What else they are given goes to the example. DEEPSPEED_ARGS holds further arguments of the
# launcher, such as "--include worker-0:0,1".
fail() { printf '%s\n' "$*" >&2 && exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
example=$root/examples/train_lm.py

hostfile="" ranks="" dry_run="" stock="" pass=() script=()
plan=${PLAN:-} trace=${TRACE:-} out=${OUT:-}
while (($#)); do
  case $1 in
    --hostfile=* | --ranks=* | --plan=* | --trace=* | --out=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
    -o?*) set -- -o "${1#-o}" "${@:2}" && continue ;;
    --plan | --trace | --out | -o | --stock)
      [[ " $takes " == *" $1 "* ]] || { pass+=("$1") && shift && continue; } ;;&
    --hostfile) hostfile=${2:?--hostfile needs a file} && shift 2 ;;
    --ranks) ranks=${2:?--ranks needs a number} && shift 2 ;;
    --plan) plan=${2:?--plan needs a file} && shift 2 ;;
    --trace) trace=${2:?--trace needs a directory} && shift 2 ;;
    --out | -o) out=${2:?--out needs a directory} && shift 2 ;;
    --stock) stock=1 && shift ;;
    --dry-run) dry_run=1 && shift ;;
    --) script=("${@:2}") && break ;;
    *) pass+=("$1") && shift ;;
  esac
done
[[ ${1:-} != -- || ${#script[@]} -gt 0 ]] || fail "found no script after --"
[[ ${#script[@]} -eq 0 || ${#pass[@]} -eq 0 ]] ||
  fail "found ${pass[*]} before --, expected options of $0 there; those of ${script[0]} follow it"
[[ -z $hostfile || -f $hostfile ]] || fail "there is no hostfile $hostfile"

if [[ -z $ranks ]]; then
  ranks=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true
  ((ranks > 0)) || ranks=4
fi
read -r -a extra <<<"${DEEPSPEED_ARGS:-}"
if [[ -n $hostfile ]]; then
  launcher=(deepspeed --hostfile "$hostfile" "${extra[@]}")
else
  launcher=(deepspeed --num_accelerators "$ranks" "${extra[@]}")
fi

show_and_run() {
  local line
  printf -v line '%q ' "$@" && printf '%s\n' "${line% }"
  [[ -n $dry_run ]] || "$@"
}

# run_script DIR [KEY=TEXT | KEY:=JSON]...: run the user's script with DIR/ds_config.json in the
# place of its ds_config: a copy in which these keys of the "moe_locality" section are set, and
# which writes the run directory DIR.
run_script() {
  local words=("${script[@]}") at="" flag="" i config=$1/ds_config.json
  set -- "$@" "tracking.run_dir=$1"
  for i in "${!script[@]}"; do
    case ${script[i]} in
      --deepspeed_config=* | --deepspeed=*.json) at=$i flag=${script[i]%%=*}= ;;
      --deepspeed_config) at=$((i + 1)) flag="" ;;
      --deepspeed) [[ ${script[i + 1]:-} != *.json ]] || at=$((i + 1)) flag="" ;;
    esac
  done
  [[ -n $at && -n ${script[at]:-} ]] ||
    fail "found no --deepspeed_config FILE (or --deepspeed FILE.json) among the arguments of" \
      "${script[0]}, expected one: $0 gives the script a copy of it with ${*:2} in the section" \
      '"moe_locality". Without such a file, set that in your script and call deepspeed yourself'
  local base=${script[at]#"$flag"}
  [[ -f $base ]] || fail "there is no ds_config $base"
  printf '# %s: %s with %s in "moe_locality"\n' "$config" "$base" "${*:2}"
  [[ -n $dry_run ]] || python3 - "$base" "$config" "${@:2}" <<'PYTHON'
import json, pathlib, sys

base, config, *settings = sys.argv[1:]
try:
    content = json.loads(pathlib.Path(base).read_text(encoding="utf-8"))
except ValueError as error:
    sys.exit(f"the ds_config {base} is not valid JSON: {error}: correct it")
our = content.setdefault("moe_locality", {})
if not our.get("tracking"):
    our["tracking"] = {"mode": "disabled"}  # a run directory, and no wandb unless it is asked for
for setting in settings:
    name, value = setting.split("=", 1)
    *groups, last = name.removesuffix(":").split(".")
    section = our
    for group in groups:
        if not isinstance(section.get(group), dict):
            section[group] = {}
        section = section[group]
    section[last] = json.loads(value) if name.endswith(":") else value
pathlib.Path(config).parent.mkdir(parents=True, exist_ok=True)
pathlib.Path(config).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
PYTHON
  words[at]=$flag$config
  show_and_run "${launcher[@]}" "${words[@]}"
}
