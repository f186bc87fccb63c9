#!/usr/bin/env bash
# Prepares a rented node, once or again: installs, moves caches to the volume, writes ~/.saccade_env.
#
#   bash launch/setup_node.sh [VOLUME]      (default: /workspace)
#
# ssh that runs a command reads no login files, so launch/run.py reads ~/.saccade_env on every host.
# It holds what an allow-list takes from the container's own environment, where caches lie, and what
# NCCL has to be told. Values are never printed; the file can be read by its owner only.
set -euo pipefail
umask 077

volume=${1:-/workspace}
install=${SETUP_INSTALL:-1}                      # 0: no Python packages
environ=${SETUP_ENVIRON:-/proc/1/environ}        # of the container, NAME=VALUE ended by zeros
net=${SETUP_NET:-/sys/class/net}
infiniband=${SETUP_INFINIBAND:-/dev/infiniband}
file=$HOME/.saccade_env

# Names that vlm/nodes/agent/environment.py lets through, too.
allowed='^(HF_[A-Z0-9_]*|WANDB_[A-Z0-9_]*|AWS_[A-Z0-9_]*|NCCL_[A-Z0-9_]*|GLOO_[A-Z0-9_]*|TORCH_[A-Z0-9_]*|UCX_[A-Z0-9_]*|DEEPSPEED_TIMEOUT|DS_ACCELERATOR|OMP_NUM_THREADS|TOKENIZERS_PARALLELISM)$'

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

[ -d "$volume" ] || die "found no folder $volume; mount the volume there, or name another one"
[ -w "$volume" ] || die "$volume cannot be written to"
[ -f vlm/__init__.py ] || die "start this in the checkout: bash launch/setup_node.sh"

names=()
declare -A values
put() { [ -n "${values[$1]+x}" ] || names+=("$1"); values[$1]=$2; }

# Caches: models are shared by all nodes; what compilers write is each node's own, for their lock
# files do not work on network volumes.
own=$volume/.cache/$(hostname)
put HF_HOME "$volume/.cache/huggingface"
put PIP_CACHE_DIR "$volume/.cache/pip"
put TORCH_EXTENSIONS_DIR "$own/torch_extensions"
put TRITON_CACHE_DIR "$own/triton"
put TMPDIR "$own/tmp"
for name in "${names[@]}"; do mkdir -p -- "${values[$name]}"; done

# NCCL and gloo: Instant Clusters have several ens interfaces between nodes, and eth0 leads outside.
fabric=()
for path in "$net"/ens*; do if [ -e "$path" ]; then fabric+=("${path##*/}"); fi; done
if [ "${#fabric[@]}" -gt 1 ]; then
  put NCCL_SOCKET_IFNAME "${fabric[0]}"
  put GLOO_SOCKET_IFNAME "${fabric[0]}"
fi
if ! compgen -G "$infiniband/uverbs*" >/dev/null; then put NCCL_IB_DISABLE 1; fi

# What the provider or the user set for the container wins.
if [ -r "$environ" ]; then
  while IFS= read -r -d '' pair; do
    name=${pair%%=*}
    if [[ $name =~ $allowed ]]; then put "$name" "${pair#*=}"; fi
  done <"$environ"
fi

{
  printf '# written by launch/setup_node.sh; run it again to change this file\n'
  for name in "${names[@]}"; do printf 'export %s=%q\n' "$name" "${values[$name]}"; done
} >"$file.tmp"
mv -f -- "$file.tmp" "$file"

line='[ -r "$HOME/.saccade_env" ] && . "$HOME/.saccade_env"'
touch "$HOME/.bashrc"
grep -qxF -- "$line" "$HOME/.bashrc" || printf '%s\n' "$line" >>"$HOME/.bashrc"

if [ "$install" != 0 ]; then
  # shellcheck disable=SC1090
  . "$file"
  make .venv/.runtime
fi

printf 'wrote %s: %s\n' "$file" "${names[*]}"
