#!/bin/bash
# Two nodes on one machine, to try a multi-node run without a cluster: two network namespaces, each with its own address
# and loopback, joined by a cable. Each runs torchrun with the command that follows; run it as root, on Linux:
#
#   scripts/two_nodes.sh train_gpt.py --config configs/gpt.yaml train.steps=20
#
# WORKERS is the number of workers of each node (1).
set -euo pipefail

if ! ip netns add "moreh-probe-$$" 2>/dev/null; then
    echo "two_nodes.sh: network namespaces need root and the right to make them (ip netns add): use a machine of your own" >&2
    exit 2
fi
ip netns del "moreh-probe-$$"

nodes=("moreh0-$$" "moreh1-$$")
trap 'for node in "${nodes[@]}"; do ip netns del "$node" 2>/dev/null || true; done' EXIT
for number in 0 1; do
    ip netns add "${nodes[number]}"
    ip -n "${nodes[number]}" link set lo up
done
ip link add "cable0" netns "${nodes[0]}" type veth peer name "cable1" netns "${nodes[1]}"
for number in 0 1; do
    ip -n "${nodes[number]}" address add "10.99.0.$((number + 1))/24" dev "cable$number"
    ip -n "${nodes[number]}" link set "cable$number" up
done

agent() {
    ip netns exec "${nodes[$1]}" env GLOO_SOCKET_IFNAME="cable$1" NCCL_SOCKET_IFNAME="cable$1" \
        "${TORCHRUN:-torchrun}" --nnodes=2 --node-rank="$1" --nproc-per-node="${WORKERS:-1}" \
        --master-addr=10.99.0.1 --master-port=29500 "${@:2}"
}

agent 1 "$@" > /dev/null &
status=0
agent 0 "$@" || status=$?
wait $! || status=$?
exit "$status"
