# shellcheck shell=bash disable=SC2034
# Shared by the scripts beside it: reads --hostfile FILE, --ranks N and --dry-run, keeps the rest in
# "${pass[@]}", and makes "${launcher[@]}", the start of a deepspeed command line.
# DEEPSPEED_ARGS holds further arguments of the launcher, such as "--include worker-0:0,1".
fail() { printf '%s\n' "$*" >&2 && exit 2; }
[[ -f examples/train_lm.py ]] || fail "run $0 from the top directory of moe_locality"

hostfile="" ranks="" dry_run="" pass=()
while (($#)); do
  case $1 in
    --hostfile) hostfile=${2:?--hostfile needs a file} && shift 2 ;;
    --ranks) ranks=${2:?--ranks needs a number} && shift 2 ;;
    --dry-run) dry_run=1 && shift ;;
    *) pass+=("$1") && shift ;;
  esac
done
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
