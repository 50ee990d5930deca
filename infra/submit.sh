#!/usr/bin/env bash
# Submits one job to a Ray cluster:
#
#   infra/submit.sh [--print] [--no-wait] JOB [FLAGS OF THE JOB...]
#   infra/submit.sh train --pairs s3://archive/pairs --preset nano-x4 --output s3://archive/models/x4 --wait-for-nodes
#
# JOB is one of: make_pairs train evaluate promote upscale
# --print (or DRY_RUN=1) shows the command and submits nothing. From the environment:
#   RAY_API_SERVER_ADDRESS  the cluster; http://127.0.0.1:8265 when unset, where `kubectl port-forward` puts it
#   RAY_AUTH_MODE           token when unset; "disabled" for a cluster that was started without authentication
#   RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token: the token
#   DIFFSR_FORWARD_ENV      names of variables that the job gets with the values they have here; unset, it is the four
#                           places in FORWARD below
#   DIFFSR_SUBMISSION_ID    a name of your own for the submission: Ray refuses a name that it knows, so a night that is
#                           submitted twice under "nightly-2026-11-21" runs once
#
# Secrets: no key is forwarded unless you name it. A runtime environment is kept in the cluster's state and shown on its
# dashboard to everyone who has the token, so let the pods bring their own keys: the Secret `diffsr-s3` (ray/cluster.yaml)
# or the role of the node. What is forwarded goes through a pipe, never through the argument list.
set -euo pipefail

FORWARD="MLFLOW_TRACKING_URI AWS_ENDPOINT_URL AWS_DEFAULT_REGION AWS_REGION"

die() {
  printf 'submit.sh: %s\n' "$1" >&2
  exit 2
}

print_only=${DRY_RUN:-}
wait_flags=()
while [[ ${1:-} == -* ]]; do
  case $1 in
    --print) print_only=1 ;;
    --no-wait) wait_flags=(--no-wait) ;;
    -h | --help) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" && exit 0 ;;
    *) die "unknown option '$1' before the job; flags of the job come after its name" ;;
  esac
  shift
done

job=${1:-}
case $job in
  make_pairs | train | evaluate | promote | upscale) shift ;;
  *) die "'$job' is not a job; the jobs are: make_pairs train evaluate promote upscale" ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if commit=$(git rev-parse --verify --quiet HEAD); then
  short=${commit:0:10}
  [[ -z $(git status --porcelain) ]] || commit+="-dirty"
else
  commit=unknown short=unknown
  printf 'submit.sh: no git commit here: the runs will say that their code is unknown\n' >&2
fi

# JSON (which is YAML) by Python, from names: quoting is its business, and the values stay out of every argument list.
runtime_env() {
  DIFFSR_COMMIT=$commit python3 -c '
import json, os, sys
how, *names = sys.argv[1:]
shown = {name: "$" + name if how == "names" else os.environ[name] for name in names if name in os.environ}
print(json.dumps({"env_vars": {"DIFFSR_COMMIT": os.environ["DIFFSR_COMMIT"], **shown}}))' "$@"
}

read -r -a forward <<<"${DIFFSR_FORWARD_ENV-$FORWARD}"
for name in ${DIFFSR_FORWARD_ENV:-}; do
  printenv -- "$name" >/dev/null || die "DIFFSR_FORWARD_ENV names $name, which is not exported: do, or leave it out"
done

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
address=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
submission=${DIFFSR_SUBMISSION_ID:-$job-$(date -u +%Y-%m-%d)-$short-$(printf '%04x%04x' "$RANDOM" "$RANDOM")}
before=(ray job submit --address "$address" --working-dir . --submission-id "$submission" "${wait_flags[@]}")
after=(-- python "jobs/$job.py" "$@")

if [[ -n $print_only && $print_only != 0 ]]; then
  printf '# %s stands for the value that NAME has here\n' "\$NAME"
  printf 'RAY_AUTH_MODE=%q ' "$RAY_AUTH_MODE"
  printf '%q ' "${before[@]}" --runtime-env-json
  printf "'%s'" "$(runtime_env names "${forward[@]}")"
  printf ' %q' "${after[@]}"
  printf '\n'
  exit 0
fi

token_file=${RAY_AUTH_TOKEN_PATH:-${HOME:-}/.ray/auth_token}
if [[ $RAY_AUTH_MODE == token && -z ${RAY_AUTH_TOKEN:-} && ! -s $token_file ]]; then
  die "no token for $address: RAY_AUTH_TOKEN is not set and $token_file is not there.
KubeRay keeps it in the Secret that has the cluster's name; fetch it with
  mkdir -p ~/.ray && (umask 077 && kubectl get secret CLUSTER -o jsonpath='{.data.auth_token}' | base64 -d > ~/.ray/auth_token)
A Ray that was started on this machine wrote it to ~/.ray/auth_token itself (ray get-auth-token shows it).
For a cluster without authentication: RAY_AUTH_MODE=disabled infra/submit.sh ..."
fi
command -v ray >/dev/null || die "there is no 'ray' on PATH; activate the environment in which diffsr is installed"

# Through a pipe and not --runtime-env-json, which every user of this machine could read in the process list.
"${before[@]}" --runtime-env <(runtime_env values "${forward[@]}") "${after[@]}"
